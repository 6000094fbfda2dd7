"""What buildah is told. Nothing that came from outside can become an option of it."""

import base64
import json
import sqlite3
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import blobcache
from builder.buildah import BUILDER_CAPABILITIES, RUN_CAPABILITIES, Buildah
from builder.model import (
    CONFIG,
    MOST_BASES,
    WORKSPACE,
    BaseLayer,
    BuildInput,
    UnpackedBase,
)
from policies.model import Isolation
from sandbox.report import COMMANDS

TOKEN = "only-for-this-session"
INPUT = BuildInput(
    dockerfile=b"FROM scratch\n",
    ignored=(),
    build_args={},
    target=None,
    platform="linux/amd64",
    isolation=Isolation.GVISOR,
    image_format="oci",
    registry="127.0.0.1:5000",
    repository="build",
    token=TOKEN,
    upstreams={},
)
BUILD = (
    "buildah", "build", "--isolation=oci", "--network=host", "--format=oci",
    f"--signature-policy={CONFIG}/policy.json", "--short-name-alias-conf=/run/short-names.conf",
    "--tls-verify=false", "--platform=linux/amd64",
    f"--file={CONFIG}/Dockerfile", f"--ignorefile={CONFIG}/ignore",
    "--tag=127.0.0.1:5000/build:latest",
)  # fmt: skip


def plan_of(**changed: object) -> tuple[str, ...]:
    return Buildah().plan(replace(INPUT, **changed)).commands[1]  # type: ignore[arg-type]


def test_the_three_commands() -> None:
    plan = Buildah().plan(INPUT)
    unpack, build, push = plan.commands
    assert unpack == (
        "tar", "--extract", "--file=/run/runner/door/context.tar", "--directory=/workspace",
        "--preserve-permissions", "--numeric-owner",
    )  # fmt: skip
    assert build == (*BUILD, WORKSPACE)
    assert push == (
        "buildah", "push", "--tls-verify=false", "--digestfile=/run/runner-claim",
        "127.0.0.1:5000/build:latest",
    )  # fmt: skip
    assert plan.commands[plan.build_command] is build
    assert plan.claim == "/run/runner-claim"
    assert plan.capabilities == Buildah.capabilities == BUILDER_CAPABILITIES
    assert plan.uid == Buildah.uid


def test_the_format_is_the_one_asked_for() -> None:
    assert "--format=docker" in plan_of(image_format="docker")


def test_no_clock_shows_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert plan_of() == (*BUILD, WORKSPACE)
    assert plan_of(reproducible=True) == (*BUILD, "--timestamp=0", WORKSPACE)
    for reproducible in (False, True):
        plan = Buildah().plan(replace(INPUT, reproducible=reproducible))
        assert "SOURCE_DATE_EPOCH" not in plan.environment


def test_every_file_that_the_environment_names_is_in_the_plan() -> None:
    plan = Buildah().plan(INPUT)
    named = {v.removeprefix(f"{CONFIG}/") for v in plan.environment.values() if CONFIG in v}
    assert named <= set(plan.files)
    assert plan.files["Dockerfile"] == INPUT.dockerfile


def test_the_token_stands_in_one_file_alone() -> None:
    plan = Buildah().plan(replace(INPUT, build_args={"A": "b"}, upstreams={"docker.io": "d"}))
    encoded = base64.b64encode(f"session:{TOKEN}".encode()).decode()
    auth = json.loads(plan.files["auth.json"])
    assert auth == {"auths": {"127.0.0.1:5000": {"auth": encoded}}}
    others = [data for name, data in plan.files.items() if name != "auth.json"]
    shown = repr((plan.commands, plan.environment, others, plan.claim))
    assert TOKEN not in shown
    assert encoded not in shown


def test_a_proxy_is_of_the_process_alone() -> None:
    proxy = f"http://session:{TOKEN}@127.0.0.1:5000"
    plain, proxied = Buildah().plan(INPUT), Buildah().plan(replace(INPUT, proxy=proxy))
    added = dict(proxied.environment.items() - plain.environment.items())
    assert added == {
        "HTTP_PROXY": proxy, "http_proxy": proxy, "HTTPS_PROXY": proxy, "https_proxy": proxy,
        "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip
    assert replace(proxied, environment=plain.environment) == plain
    assert not [name for name in plain.environment if "PROXY" in name.upper()]


hostile = st.sampled_from(["--privileged", "-v/:/x", "a b", "", "x\n--y", "=", "'\"$(id)"])


@given(st.dictionaries(st.sampled_from("ABC"), hostile | st.text()), st.none() | hostile)
def test_hostile_values_stay_within_their_own_word(
    build_args: dict[str, str], target: str | None
) -> None:
    words = plan_of(build_args=build_args, target=target)
    expected = [f"--build-arg={name}={value}" for name, value in build_args.items()]
    expected += [f"--target={target}"] if target is not None else []
    assert words == (*BUILD, *expected, WORKSPACE)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("Dockerfile", "/Dockerfile"),
        ("!x", "/!x"),
        ("#x", "/#x"),
        ("a*[b]?\\", "/a\\*\\[b\\]\\?\\\\"),
        ("caf\udce9", "/caf\udce9"),
    ],
)
def test_an_ignored_path_is_a_pattern_of_itself_alone(path: str, line: str) -> None:
    data = Buildah().plan(replace(INPUT, ignored=(path, "other"))).files["ignore"]
    assert data == f"{line}\n/other\n".encode("utf-8", "surrogateescape")


def test_each_upstream_is_a_path_of_the_one_registry() -> None:
    upstreams = {"docker.io": "u0", "a.b:5000": "u1"}
    data = Buildah().plan(replace(INPUT, upstreams=upstreams)).files["registries.conf"]
    document = tomllib.loads(data.decode())
    assert document["unqualified-search-registries"] == ["docker.io"]
    assert document["short-name-mode"] == "disabled"
    assert document["registry"] == [
        {"prefix": host, "location": f"127.0.0.1:5000/{alias}", "insecure": True}
        for host, alias in upstreams.items()
    ]


def test_run_steps_have_dockers_default_set_of_capabilities() -> None:
    document = tomllib.loads(Buildah().plan(INPUT).files["containers.conf"].decode())
    wanted = [f"CAP_{name}" for name in RUN_CAPABILITIES]
    assert document["containers"]["default_capabilities"] == wanted
    assert not {"SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN"} & set(RUN_CAPABILITIES)


def test_storage_and_signature_files_are_sound() -> None:
    files = Buildah().plan(INPUT).files
    assert tomllib.loads(files["storage.conf"].decode())["storage"]["driver"] == "overlay"
    assert json.loads(files["policy.json"])["default"]


def test_the_recipe_has_a_mount_point_for_every_writable_place() -> None:
    assert set(Buildah().plan(INPUT).writable) <= set(Buildah.recipe.directories)


# -- base images that are there already ----------------------------------------------------------

LAYER = BaseLayer("sha256:" + "a" * 64, "sha256:" + "b" * 64, "gzip")
MOUNTED = UnpackedBase(
    config="sha256:" + "c" * 64, names=("a.b/c:1", "d.e/f:2"), at="/store/base-0", packed=None,
    layers=(LAYER,),
)  # fmt: skip
COPIED = replace(MOUNTED, at="/store/base-1", packed="/door/base-1.erofs", names=("a.b/d:1",))


def test_a_base_image_gets_the_names_that_the_dockerfile_uses() -> None:
    plan = Buildah().plan(replace(INPUT, bases=(MOUNTED,)))
    cache, tag = plan.commands[1:-2]
    assert cache == (
        "tar", "--extract", f"--file={CONFIG}/cache.tar", "--directory=/var/lib/containers",
    )  # fmt: skip
    assert tag == ("buildah", "tag", "c" * 64, "a.b/c:1", "d.e/f:2")
    assert plan.commands[plan.build_command][:2] == ("buildah", "build")
    storage = tomllib.loads(plan.files["storage.conf"].decode())
    assert storage["storage"]["options"]["additionalimagestores"] == ["/store/base-0"]


def test_what_cannot_be_mounted_is_copied_before_anything_uses_it() -> None:
    plan = Buildah().plan(replace(INPUT, bases=(MOUNTED, COPIED)))
    copy = ("fsck.erofs", "-d0", "--xattrs", "--extract=/store/base-1", "/door/base-1.erofs")
    first_use = next(n for n, command in enumerate(plan.commands) if command[0] == "buildah")
    assert plan.commands.index(copy) < first_use


def test_without_base_images_there_is_no_cache() -> None:
    plan = Buildah().plan(INPUT)
    assert "cache.tar" not in plan.files
    assert len(plan.commands) == 3


def test_the_most_base_images_fit_into_one_plan() -> None:
    bases = tuple(replace(COPIED, at=Buildah().base_at(n)) for n in range(MOST_BASES))
    assert len(Buildah().plan(replace(INPUT, bases=bases)).commands) < COMMANDS


def test_the_cache_pairs_each_layer_with_its_compressed_form(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(blobcache.database([LAYER, replace(LAYER, compression="")]))
    with sqlite3.connect(path) as connection:
        pairs = set(connection.execute("SELECT * FROM DigestUncompressedPairs"))
        compressors = dict(connection.execute("SELECT * FROM DigestCompressors"))
    connection.close()
    assert pairs == {(LAYER.digest, LAYER.diff_id), (LAYER.diff_id, LAYER.diff_id)}
    assert compressors == {LAYER.digest: "uncompressed", LAYER.diff_id: "uncompressed"}


def test_unpacking_pulls_packs_and_hands_out() -> None:
    plan = Buildah().unpack("linux/amd64")
    pull, pack = plan.commands
    assert pull[:2] == ("buildah", "pull")
    assert pull[-2:] == ("--platform=linux/amd64", "dir:/run/runner/door/base")
    assert pack[-2:] == (plan.output, "/var/lib/containers/storage")
    assert b"auth.json" not in b"".join(name.encode() for name in plan.files)
