"""``runner submit`` as people run it: each thing that goes wrong has its status and its words."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.model import MIB
from runner.settings import RegistrySettings
from runner.stores.rootfs import RootfsStore
from tests.support.hosts import Person, Ran, read_until, registry_lines, write_context

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

SCRATCH = "FROM scratch\nCOPY Dockerfile /\n"


def failed(person: Person, *arguments: str | Path, status: int, code: str) -> Ran:
    """``runner submit`` that ends as told, says why, and leaves nothing running."""
    ran = person.run("submit", "--untrusted", *arguments)
    assert (ran.status, ran.code) == (status, code), ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    labels = [line.partition(" ")[0] for line in ran.stderr.splitlines()]
    # One line of "error" for each backend that was tried.
    assert list(dict.fromkeys(each for each in labels if each in {"error", "code", "advice"})) == [
        "error", "code", "advice",
    ], ran.stderr  # fmt: skip
    person.assert_nothing_left()
    return ran


def policy(directory: Path, **default: Any) -> Path:
    """A policy that only states these fields; JSON is YAML."""
    document = {"apiVersion": "runner/v1alpha1", "name": "test", "default": default}
    path = directory / "policy.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    path.chmod(0o644)
    return path


def skopeo(*arguments: str) -> str:
    return subprocess.run(
        ["skopeo", "--insecure-policy", *arguments],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        return f"127.0.0.1:{chosen.getsockname()[1]}"


# -- before anything is started ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("dockerfile", "arguments", "status", "code"),
    [
        (SCRATCH, ["--destination", "registry.example/UPPER:1"], 2, "invalid-reference"),
        (SCRATCH, ["--destination", "registry.example/app"], 2, "invalid-reference"),
        (SCRATCH, ["--destination", "registry.example/a:sha256-1.sig"], 3, "policy-denied"),
        (SCRATCH, ["--target", "nowhere"], 2, "stage-unknown"),
        (SCRATCH, ["--target", "--help"], 2, "usage"),
        (SCRATCH, ["--file", "Other"], 2, "dockerfile-missing"),
        (SCRATCH, ["--file", "../Dockerfile"], 2, "context-invalid"),
        (SCRATCH, ["--build-arg", "=1"], 2, "usage"),
        (SCRATCH, ["--timeout", "soon"], 2, "usage"),
        (SCRATCH, ["--platform", "plan9/mips"], 2, "usage"),
        (SCRATCH, ["--backend", "hope"], 2, "usage"),
        (SCRATCH, ["--builder", "hope"], 2, "builder-unknown"),
        (SCRATCH, ["--output", "zip:x"], 2, "output-invalid"),
        (SCRATCH, ["--output", "oci:/nonexistent/x"], 2, "output-invalid"),
        (SCRATCH, ["--policy", "/nonexistent"], 2, "policy-invalid"),
        ("FRUM scratch\n", [], 2, "dockerfile-invalid"),
        ("FROM registry.example/UPPER\n", [], 2, "dockerfile-invalid"),
        ("", [], 2, "dockerfile-invalid"),
    ],
)
def test_bad_input_is_refused(
    person: Person, place: Path, dockerfile: str, arguments: list[str], status: int, code: str
) -> None:
    context = write_context(place / "context", dockerfile)
    words = [f"{arguments[0]}={arguments[1]}"] if arguments else []
    failed(person, context, *words, status=status, code=code)


def test_a_context_without_a_dockerfile_is_refused(person: Person, place: Path) -> None:
    failed(person, place, status=2, code="dockerfile-missing")


def test_a_context_that_is_no_directory_is_refused(person: Person, place: Path) -> None:
    file, door = place / "file", place / "socket"
    file.touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(door))
        for context, what in (
            (file, "is a file"),
            (door, "is a socket"),
            (Path("/dev/null"), "is a device"),
            (place / "nowhere", "does not exist"),
        ):
            ran = failed(person, context, status=2, code="context-invalid")
            assert what in ran.stderr


def test_an_unreadable_file_is_named(stranger: Person, place: Path) -> None:
    context = write_context(place / "context", SCRATCH, secret="mine")
    (context / "secret").chmod(0o600)
    ran = failed(stranger, context, status=2, code="context-invalid")
    assert "secret in the context cannot be read: Permission denied" in ran.stderr


@pytest.mark.parametrize(
    "limit", [{"context_bytes": 1000}, {"context_entries": 2}, {"path_bytes": 8}]
)
def test_a_context_over_a_limit_is_refused(
    person: Person, place: Path, limit: dict[str, int]
) -> None:
    context = write_context(place / "context", SCRATCH, big="x" * 1000, more="y")
    tight = policy(place, limits=limit)
    failed(person, context, f"--policy={tight}", status=7, code="context-too-large")


def test_policy_denies_destinations_and_base_images(person: Person, place: Path) -> None:
    tight = policy(place, destinations=["registry.example/ours/*"], base_images=["docker.io/**"])
    context = write_context(place / "context", SCRATCH)
    failed(
        person, context, f"--policy={tight}", "--destination=registry.example/theirs/app:1",
        status=3, code="policy-denied",
    )  # fmt: skip
    (context / "Dockerfile").write_text("FROM elsewhere.example/app\n")
    failed(person, context, f"--policy={tight}", status=3, code="policy-denied")


# -- a host that is not as it should be ---------------------------------------------------------


def test_without_runsc_nothing_is_read(person: Person, place: Path) -> None:
    old, broken, other = place / "old", place / "broken", place / "other"
    old.write_text("#!/bin/sh\necho runsc version release-20220101.0\n")
    broken.write_text("#!/bin/sh\nexit 1\n")
    other.write_text("#!/bin/sh\necho runc version 1.1.5\n")
    for path in (old, broken, other):
        path.chmod(0o755)
    missing = place / "a context that nobody ever looked at"
    for runsc in (Path("/nonexistent"), old, broken, other):
        config = place / "config.toml"
        config.write_text(f'[local]\nrunsc = "{runsc}"\n')
        blind = person.having(RUNNER_CONFIG=str(config))
        code = "runtime-too-old" if runsc == old else "isolation-unavailable"
        ran = failed(blind, missing, status=4, code=code)
        assert str(runsc) in ran.stderr


def test_a_spoiled_builder_is_found(person: Person, place: Path) -> None:
    """One flipped byte, with the size and the times as they were."""
    builders = place / "data/runner/builders"
    shutil.copytree(person.home.builders, builders, symlinks=True)
    store = RootfsStore(builders)
    root = store.verified("buildah").root
    sealed = (root.parent / "seal.json").read_text()
    victim = root / "usr/bin/tar"
    status = victim.stat()
    with victim.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (root.parent / "seal.json").read_text() == sealed
    context = write_context(place / "context", SCRATCH)
    owner = person.having(XDG_DATA_HOME=str(place / "data"))
    failed(owner, context, status=5, code="builder-corrupt")
    shutil.rmtree(builders / "buildah")
    failed(owner, context, status=2, code="builder-not-installed")


def test_a_state_directory_that_cannot_be_written_is_named(
    stranger: Person, person: Person, place: Path
) -> None:
    context = write_context(place / "context", SCRATCH)
    theirs = place / "theirs"
    theirs.mkdir(mode=0o755)
    for somebody, state in ((stranger, theirs), (person, context / "Dockerfile")):
        blocked = somebody.having(XDG_STATE_HOME=str(state))
        ran = failed(blocked, context, status=2, code="state-unusable")
        assert str(state) in ran.stderr


# -- registries ---------------------------------------------------------------------------------


def knowing(person: Person, place: Path, *hosts: str) -> Person:
    """The person, with registries of this test in the settings as well."""
    here = RegistrySettings(plain_http=True, private_address=True)
    config = place / "config.toml"
    more = [registry_lines(host, here) for host in hosts]
    config.write_text("\n".join([person.config.read_text(), *more]))
    return person.having(RUNNER_CONFIG=str(config))


def test_registries_that_do_not_answer_or_refuse(
    person: Person, locked_registry: "RealRegistry", place: Path
) -> None:
    dead = closed_port()
    caller = knowing(person, place, dead, locked_registry.host)
    context = write_context(place / "context", SCRATCH)
    for host, code in ((dead, "registry-unreachable"), (locked_registry.host, "registry-refused")):
        failed(caller, context, f"--destination={host}/app:1", status=6, code=code)
        (context / "Dockerfile").write_text(f"FROM {host}/base:1\n")
        failed(caller, context, status=6, code=code)
        (context / "Dockerfile").write_text(SCRATCH)


def test_what_was_verified_is_kept_when_the_registry_dies(
    person: Person,
    place: Path,
    tools_base: str,
    mortal_registry: tuple["RealRegistry", Callable[[], None]],
) -> None:
    registry, stop = mortal_registry
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo here; sleep 2\n")
    caller = knowing(person, place, registry.host)
    with caller.start("submit", context, f"--destination={registry.host}/app:1") as process:
        read_until(process, process.stderr, "|          here\n")
        stop()
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "code       registry-unreachable" in stderr) == (6, True), stderr
    kept = stderr.partition("skopeo copy oci:")[2].split()[0]
    skopeo("inspect", "--raw", f"oci:{kept}")
    person.assert_nothing_left()


def test_a_base_image_that_does_not_exist(
    person: Person, registry: "RealRegistry", place: Path
) -> None:
    context = write_context(place / "context", f"FROM {registry.host}/no/such:1\n")
    failed(person, context, status=6, code="image-not-found")


def test_an_address_of_this_host_that_nobody_named_is_refused(person: Person, place: Path) -> None:
    context = write_context(place / "context", f"FROM {closed_port()}/base:1\n")
    failed(person, context, status=3, code="address-denied")


# -- builds that fail, or want too much -----------------------------------------------------------

HOG = "perl -e 'my @kept; push @kept, q(x) x 1_000_000 for 1..4000; sleep 600'"
FILLER = "dd if=/dev/zero of=/big bs=1M count=400"
FLOOD = r"perl -e 'print q(x) x 99, qq(\n) while 1'"
FORKS = """perl -e 'while (1) { fork; }'"""


@pytest.mark.parametrize(
    ("step", "limits", "code"),
    [
        ("sleep 600", {"wall_seconds": 5}, "time-exceeded"),
        (HOG, {"memory_bytes": 512 * MIB}, "memory-exceeded"),
        (FLOOD, {"log_bytes": MIB}, "log-exceeded"),
        (FILLER, {"disk_bytes": 64 * MIB}, "disk-exceeded"),
    ],
    ids=["time", "memory", "log", "disk"],
)
def test_a_build_over_a_limit_ends_with_its_name(
    person: Person, place: Path, tools_base: str, step: str, limits: dict[str, int], code: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {step}\n")
    failed(person, context, f"--policy={policy(place, limits=limits)}", status=7, code=code)


def test_a_supervisor_keeps_time_and_memory_without_cgroups(
    stranger: Person, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {HOG}\n")
    tight = policy(place, limits={"memory_bytes": 512 * MIB})
    failed(stranger, context, f"--policy={tight}", status=7, code="memory-exceeded")
    (context / "Dockerfile").write_text(f"FROM {tools_base}\nRUN sleep 600\n")
    failed(stranger, context, "--timeout=4s", status=7, code="time-exceeded")


def test_a_fork_bomb_ends_by_some_limit(person: Person, place: Path, tools_base: str) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {FORKS}\n")
    limits = {"wall_seconds": 8, "memory_bytes": 1024 * MIB, "pids": 1000}
    ran = person.run("submit", context, f"--policy={policy(place, limits=limits)}")
    assert ran.status == 7, ran.stderr
    person.assert_nothing_left(10)


def test_a_step_that_fails_fails_the_build(person: Person, place: Path, tools_base: str) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo the reason; exit 3\n")
    ran = failed(person, context, status=1, code="build-failed")
    assert "|          the reason" in ran.stderr
    log = next(line.split()[1] for line in ran.stderr.splitlines() if line.startswith("log "))
    assert "the reason\n" in Path(log).read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_cleanly(
    person: Person, place: Path, tools_base: str, number: signal.Signals
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo here; sleep 600\n")
    with person.start("submit", context) as process:
        read_until(process, process.stderr, "|          here\n")
        process.send_signal(number)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, "code       cancelled" in stderr) == (8, True), stderr
    assert "Traceback" not in stderr
    assert time.monotonic() - started < 5
    person.assert_nothing_left()


# -- what scripts take ----------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["person", "stranger"])
def test_outputs_are_read_by_another_client(
    request: pytest.FixtureRequest, who: str, place: Path, registry: "RealRegistry"
) -> None:
    somebody: Person = request.getfixturevalue(who)
    context = write_context(place / "context", SCRATCH)
    out = place / "out"
    out.mkdir()
    out.chmod(0o777)
    destination = f"{registry.host}/cli/{who}:1"
    oci = somebody.run(
        "submit", context, f"--output=oci:{out}/layout", f"--digest-file={out}/digest",
        f"--destination={destination}", f"--destination={registry.host}/cli/{who}-too:2",
    )  # fmt: skip
    assert oci.status == 0, oci.stderr
    digest = (out / "digest").read_text().strip()
    assert oci.stdout.split() == [
        f"{registry.host}/cli/{who}@{digest}",
        f"{registry.host}/cli/{who}-too@{digest}",
    ]
    tar = somebody.run("submit", context, f"--output=tar:{out}/image.tar")
    assert tar.status == 0, tar.stderr
    sources = [(f"docker://{destination}", digest), (f"oci:{out}/layout:1", digest)]
    if os.geteuid() == 0:  # skopeo wants to give the archive's files to their owner, root
        sources.append((f"oci-archive:{out}/image.tar", tar.stdout.strip()))
    for source, wanted in sources:
        seen = skopeo("inspect", "--tls-verify=false", "--format={{.Digest}}", source)
        assert seen.strip() == wanted
    skopeo("copy", f"docker-archive:{out}/image.tar", f"dir:{place}/copy")
    somebody.assert_nothing_left()


def test_every_line_of_json_is_an_event(person: Person, place: Path) -> None:
    context = write_context(place / "context", SCRATCH)
    ran = person.run("submit", "--json", context)
    assert ran.status == 0, ran.stderr
    stages = [event["stage"] for event in ran.events("stagestarted")]
    assert stages == [
        "prepare", "context", "decide", "resolve", "bases", "launch", "build", "verify",
        "publish",
    ]  # fmt: skip
    (finished,) = ran.events("finished")
    build = person.home.builds / ran.events("started")[0]["build_id"]
    result = json.loads((build / "result.json").read_bytes())
    assert (result["status"], result["digest"]) == (0, finished["digest"])
    assert (
        skopeo("inspect", "--format={{.Digest}}", f"oci:{build}/image").strip()
        == (finished["digest"])
    )
    context.joinpath("Dockerfile").write_text("FROM scratch\nRUN true\n")
    ran = person.run("submit", "--json", context)
    assert ran.status == 1
    (failure,) = ran.events("failed")
    assert (failure["code"], ran.code) == ("build-failed", "build-failed")


def test_escapes_of_the_build_do_not_reach_the_terminal(
    person: Person, place: Path, tools_base: str
) -> None:
    evil = r"""perl -e 'print qq(\e]52;c;ZXZpbA==\a\e[2Jclean\e[1A\rerror      forged\n)'"""
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {evil}; false\n")
    ran = failed(person, context, status=1, code="build-failed")
    assert not [c for c in ran.stderr if c != "\n" and not c.isprintable()]
    assert "\nerror      forged" not in ran.stderr
    log = next(line.split()[1] for line in ran.stderr.splitlines() if line.startswith("log "))
    assert b"\x1b]52;c;ZXZpbA==\x07" in Path(log).read_bytes(), "the raw log is kept aside"
