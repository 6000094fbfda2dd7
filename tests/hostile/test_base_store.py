"""One store of unpacked base images for everybody: threats 5, 22, 24, 25 and 26."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies import loader
from policies.model import MIB
from policies.reference import Digest
from runner import events
from runner.cancel import Cancellation
from runner.errors import Cancelled, RunnerError
from runner.pipeline import submit
from runner.registry.auth import Credentials, DockerConfig
from runner.request import BuildRequest, BuildResult
from runner.stores.unpacked import UnpackedStore
from runner.verify import StagedImage
from sandbox.local import place as places
from sandbox.model import Provided
from tests.support.hosts import Person, read_until, write_context
from tests.support.images import make_image, tar_of
from tests.support.push import layers_of, push
from tests.support.toolbox import install_as_buildah, toolbox_tar

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

UNPACK = '"stagestarted", "stage": "bases"'


def store_of(person: Person) -> UnpackedStore:
    return UnpackedStore(person.home.unpacked)


def store_files(person: Person) -> list[str]:
    """All that the store has, but for the lock of whoever evicts."""
    found = (path for path in person.home.unpacked.rglob("*") if path.is_file())
    names = (str(path.relative_to(person.home.unpacked)) for path in found)
    return sorted(name for name in names if name != "evicting")


def policy(directory: Path, **default: Any) -> Path:
    document = {"apiVersion": "runner/v1alpha1", "name": "test", "default": default}
    path = directory / "policy.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    path.chmod(0o644)
    return path


# -- tenants ---------------------------------------------------------------------------------------


@pytest.fixture
def login(place: Path, locked_registry: "RealRegistry") -> Credentials:
    import base64

    from tests.integration.conftest import PASSWORD, USER

    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    document = {"auths": {locked_registry.host: {"auth": auth}}}
    (place / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return DockerConfig({"DOCKER_CONFIG": str(place)})


@pytest.fixture
def both(newcomer: Person, registry: "RealRegistry", locked_registry: "RealRegistry") -> Person:
    """Reaches both registries."""
    registries = {**registry.settings.registries, **locked_registry.settings.registries}
    return replace(
        newcomer, settings=newcomer.settings.model_copy(update={"registries": registries})
    )


def answer(person: Person, context: Path) -> object:
    """All that a tenant is told of a build without credentials that fails, but for times."""
    told: list[events.Event] = []
    request = BuildRequest(context=context, build_args={})
    with pytest.raises(RunnerError) as caught:
        submit(request, person.tools(), told.append, Cancellation())
    error = caught.value
    timeless = (events.Started, events.StageEnded, events.Finished)
    shown = [event for event in told if not isinstance(event, timeless)]
    return error.code, error.message, error.advice, [
        replace(event, log="") if isinstance(event, events.Failed) else event for event in shown
    ]  # fmt: skip


def as_tenant(person: Person, context: Path, rules: Path, credentials: Credentials) -> BuildResult:
    """By somebody with a login that policy allows."""
    tools = person.tools(credentials=credentials)
    tools = replace(tools, policies=[loader.read(rules)])
    request = BuildRequest(context=context, build_args={})
    return submit(request, tools, lambda _: None, Cancellation())


def test_row_25_who_may_not_pull_a_base_image_cannot_tell_that_it_is_unpacked(
    both: Person,
    registry: "RealRegistry",
    locked_registry: "RealRegistry",
    login: Credentials,
    place: Path,
) -> None:
    private = f"{locked_registry.host}/team/private:1"
    image = make_image(tars=[tar_of(("secret", b"of team A"))])
    push(locked_registry.settings, private, image, login)
    stolen = _without_blobs(registry, image)
    theirs = write_context(place / "theirs", f"FROM {private}\nCOPY Dockerfile /\n")
    by_digest = private.replace(":1", f"@{image.root.digest}")
    tries = [
        write_context(place / f"try-{number}", f"FROM {name}\nCOPY Dockerfile /\n")
        for number, name in enumerate([private, by_digest, stolen])
    ]
    for _ in range(2):  # what their own repository gives is pulled once
        before = [answer(both, context) for context in tries]
    rules = policy(
        place,
        isolation="gvisor", backends=["local"], builders=["buildah"], network="registries",
        capabilities=["*"], base_images=["**"], destinations=["**"],
        pull_credentials=[private.removesuffix(":1")],
    )  # fmt: skip
    result = as_tenant(both, theirs, rules, login)
    assert result.provided == {private: Provided.COPIED}
    (unpacked,) = store_of(both).all()
    assert unpacked.identity.image == image.root.digest
    assert [answer(both, context) for context in tries] == before
    assert store_of(both).all() == [unpacked]
    assert as_tenant(both, theirs, rules, login).provided == {private: Provided.COPIED}
    both.assert_nothing_left()


def _without_blobs(registry: "RealRegistry", image: StagedImage) -> str:
    """The very manifest, in a repository of the thief's that has none of its layers."""
    name = f"{registry.host}/thief/copy:1"
    push(registry.settings, name, image)
    kept = registry.storage / "docker/registry/v2/repositories/thief/copy/_layers"
    for digest in layers_of(image):
        shutil.rmtree(kept / digest.replace(":", "/"))
    return name


def test_row_25_no_other_user_of_the_host_may_look_into_the_store(newcomer: Person) -> None:
    newcomer.home.prepare()
    store_of(newcomer)
    assert newcomer.home.unpacked.stat().st_mode & 0o077 == 0
    assert newcomer.home.base_images.stat().st_mode & 0o077 == 0


# -- several at once -----------------------------------------------------------------------------


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sandboxes that unpacked something."""
    names: list[str] = []
    reserve = places.reserve

    def spy(sandboxes: Path, name: str, uids: range) -> places.LocalPlace:
        if "-base-" in name:
            names.append(name)
        return reserve(sandboxes, name, uids)

    monkeypatch.setattr(places, "reserve", spy)
    return names


@pytest.fixture
def large(registry: "RealRegistry", request: pytest.FixtureRequest) -> tuple[str, StagedImage]:
    """An image that takes a second or two to unpack, of each test's own."""
    own = tar_of(("own", str(request.node.name).encode()))
    image = make_image(tars=[toolbox_tar(), own])
    name = f"{registry.host}/large/{Digest.of(own).hex[:20]}:1"
    return push(registry.settings, name, image), image


def test_two_builds_of_an_unknown_base_share_one_sandbox(
    newcomer: Person, large: tuple[str, StagedImage], reserved: list[str], place: Path
) -> None:
    context = write_context(place / "context", f"FROM {large[0]}\nRUN cat /own\n")
    found: list[object] = []

    def build() -> None:
        found.append(newcomer.submit(context).result.provided)

    builds = [threading.Thread(target=build) for _ in range(2)]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join(120)
    assert found == [{large[0]: Provided.COPIED}] * 2
    assert len(reserved) == 1
    assert len(store_of(newcomer).all()) == 1
    newcomer.assert_nothing_left()


@pytest.mark.parametrize(
    "after_seconds",
    [0.4, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.0, 0.8, 1.2))],
)
def test_row_22_killed_while_it_unpacks(
    after_seconds: float, newcomer: Person, large: tuple[str, StagedImage], place: Path
) -> None:
    context = write_context(place / "context", f"FROM {large[0]}\nRUN cat /own; sleep 2\n")
    with newcomer.start("submit", "--json", context) as process:
        read_until(process, process.stdout, UNPACK)
        time.sleep(after_seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    newcomer.assert_nothing_left(10, kinds=("process", "mount"))
    ran = newcomer.run("gc")
    assert ran.status == 0, ran.stderr
    newcomer.assert_nothing_left()
    whole = store_of(newcomer).all()
    names = {f"records/{each.identity.key}.json" for each in whole}
    names |= {f"blobs/sha256/{each.packed.hex}" for each in whole}
    assert set(store_files(newcomer)) == names
    assert all(store_of(newcomer).is_sound(each) for each in whole)
    ran = newcomer.run("submit", context)
    assert ran.status == 0, ran.stderr
    newcomer.assert_nothing_left()


@pytest.mark.parametrize("after_seconds", [0.0, 0.3, 0.6, 0.9])
def test_cancelling_while_it_unpacks_takes_no_time(
    after_seconds: float, newcomer: Person, large: tuple[str, StagedImage], place: Path
) -> None:
    context = write_context(place / "context", f"FROM {large[0]}\nRUN sleep 9\n")
    cancellation = Cancellation()
    asked: list[float] = []

    def cancel() -> None:
        asked.append(time.monotonic())
        cancellation.cancel()

    def listen(event: events.Event) -> None:
        if event == events.StageStarted(events.Stage.BASES):
            threading.Timer(after_seconds, cancel).start()

    with pytest.raises(Cancelled):
        newcomer.submit(context, listen=listen, cancellation=cancellation)
    assert time.monotonic() - asked[0] < 2
    newcomer.assert_nothing_left()
    whole = store_of(newcomer).all()
    assert len(store_files(newcomer)) == 2 * len(whole)


@pytest.mark.parametrize("runsc", ["packaged", "current"])
def test_an_image_that_is_removed_while_a_build_uses_it_stays_there_for_the_build(
    runsc: str,
    newcomer: Person,
    large: tuple[str, StagedImage],
    place: Path,
    request: pytest.FixtureRequest,
) -> None:
    person = newcomer
    if runsc == "current":
        person = newcomer.with_runsc(request.getfixturevalue("current_runsc"))
    steps = "RUN echo here; sleep 1; cat /usr/bin/* /own >/dev/null && echo all there\n"
    context = write_context(place / "context", f"FROM {large[0]}\n{steps}")

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Output) and b"\nhere\n" in b"\n" + event.data:
            store = store_of(person)
            assert store.evict(0) == []
            (made,) = store.all()
            store.remove(made)
            assert store.all() == []

    built = person.submit(context, listen=listen)
    assert "all there" in built.log
    assert store_files(person) == []
    assert person.submit(context).result.provided.keys() == {large[0]}


# -- what is broken --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [pytest.param("cut", marks=pytest.mark.slow), "flipped"])
def test_a_changed_file_in_the_store_is_not_used(
    change: str,
    newcomer: Person,
    large: tuple[str, StagedImage],
    reserved: list[str],
    place: Path,
) -> None:
    context = write_context(place / "context", f"FROM {large[0]}\nRUN cat /own\n")
    newcomer.submit(context)
    (made,) = store_of(newcomer).all()
    path = newcomer.home.unpacked / "blobs/sha256" / made.packed.hex
    path.chmod(0o600)
    with path.open("r+b") as file:
        if change == "cut":
            file.truncate(made.size_bytes - 4096)
        else:
            file.seek(made.size_bytes // 2)
            file.write(b"\xff")
    assert not store_of(newcomer).is_sound(made)
    built = newcomer.submit(context)
    assert built.result.provided == {large[0]: Provided.COPIED}
    assert len(reserved) == 2
    (again,) = store_of(newcomer).all()
    assert again.packed != made.packed
    assert store_of(newcomer).is_sound(again)


@pytest.mark.root
def test_row_15_a_full_disk_while_the_image_comes_out(
    newcomer: Person, large: tuple[str, StagedImage], place: Path
) -> None:
    """The build goes on without it, and the file system is as empty as before."""
    newcomer.home.prepare()
    mount = 'mount -t tmpfs -o size=2m none "$0" && "$@"; s=$?; find "$0" -type f >&2; exit $s'
    words = ("unshare", "--mount", "sh", "-c", mount, str(newcomer.home.unpacked))
    context = write_context(place / "context", f"FROM {large[0]}\nRUN cat /own\n")
    ran = replace(newcomer, before=words).run("submit", context)
    assert ran.status == 0, ran.stderr
    assert f"could not be unpacked before the build, which pulls it now: {_full(newcomer)}" in (
        " ".join(ran.stderr.split())
    )
    found = [line for line in ran.stderr.splitlines() if line.startswith(str(newcomer.home.data))]
    assert [line for line in found if not line.endswith("/evicting")] == []
    newcomer.assert_nothing_left()


def _full(person: Person) -> str:
    return f"the file system of {person.home.unpacked}"


# -- taken over ------------------------------------------------------------------------------------

SEND = r"""
use Socket;
socket(my $out, AF_UNIX, SOCK_STREAM, 0) or die;
connect($out, pack_sockaddr_un("/run/runner/door/outlet.sock")) or die "connect: $!";
my $piece = "x" x 1048576;
if ($ARGV[0] eq "endless") { 1 while defined syswrite $out, $piece }
else { syswrite $out, $piece; if (fork() == 0) { setpgrp; sleep 600 } }
"""


@contextmanager
def taken_over(place: Path, settings: Any, script: str) -> Iterator[Person]:
    """Somebody whose builder's programs are ``script``, with an empty store."""
    builders = place / "hostile-builders"
    install_as_buildah(builders, script, **{"send.pl": SEND})
    person = Person.move_in(place / "victim", settings, builders)
    yield person
    person.move_out()


PACK = 'case "$0" in *mkfs.erofs) {};; esac; exit 0'


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (PACK.format("head -c 9999999 /dev/urandom >/run/base.erofs"), "no EROFS image"),
        (PACK.format("ln -s /proc/kmsg /run/base.erofs"), "failed around the build"),
        (PACK.format("ln -s /dev/zero /run/base.erofs"), f"more than {64 * MIB} bytes"),
        (PACK.format("mkdir /run/base.erofs"), "failed around the build"),
        (PACK.format("true"), "failed around the build"),
        (PACK.format("perl /send.pl endless"), f"more than {64 * MIB} bytes"),
        (PACK.format("perl /send.pl first; echo >/run/base.erofs"), "failed around the build"),
        (PACK.format("sleep 600"), "took longer than 5 s"),
        (PACK.format("yes"), "bytes of output"),
        (PACK.format("kill -9 -1; kill -9 1; perl -e 'fork while 1'"), ""),
    ],
    ids=["garbage", "kmsg", "zeros", "directory", "nothing", "endless", "twice", "sleep", "log",
         "killer"],
)  # fmt: skip
def test_row_25_whoever_takes_over_the_sandbox_that_unpacks_spoils_nothing(
    script: str, told: str, settings: Any, registry: "RealRegistry", place: Path
) -> None:
    base = push(registry.settings, f"{registry.host}/spoiled/base:1", make_image())
    limits = {"disk_bytes": 64 * MIB, "wall_seconds": 5, "log_bytes": MIB, "pids": 64}
    warned: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Warned):
            warned.append(event.message)

    with taken_over(place, settings, script) as person:
        context = write_context(place / "context", f"FROM {base}\n")
        with pytest.raises(RunnerError):  # a builder like this builds nothing
            person.submit(context, policies=(policy(place, limits=limits),), listen=listen)
        (warning,) = [text for text in warned if "could not be unpacked" in text]
        assert told in warning
        assert store_files(person) == []
        person.assert_nothing_left()


# -- caches ----------------------------------------------------------------------------------------


def test_row_26_nothing_that_a_build_made_stays_for_another(
    newcomer: Person, tools_base: str, registry: "RealRegistry", place: Path
) -> None:
    """What is kept is the base image, as its registry has it, and nothing of the build."""
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo mine >/mine\n")
    built = newcomer.submit(context, destination=f"{registry.host}/out/row26:1")
    ours = {Digest(built.result.base_images[tools_base])}
    (unpacked,) = store_of(newcomer).all()
    assert {unpacked.identity.image} == ours
    kept = {path.name for path in (newcomer.home.base_images / "blobs").glob("*/*")}
    assert built.result.starts_from is not None
    assert len(kept) == 1 + built.result.starts_from.layers, "its configuration and its layers"
    assert built.result.digest.hex not in kept
