"""Which base images a build is given, and what is left where one cannot be unpacked.

The sandbox is played here; real ones are in ``tests/integration`` and ``tests/hostile``.
"""

import json
import tarfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from builder.buildah import Buildah
from builder.model import MOST_BASES
from policies.facts import DockerfileFacts
from policies.model import Isolation, Limits
from policies.reference import Digest, ImageReference
from runner import events
from runner.cancel import Cancellation
from runner.errors import (
    BaseImageCorrupt,
    BaseImageInvalid,
    Cancelled,
    DiskExceeded,
    ImageNotFound,
    RunnerError,
    SandboxFailed,
    TimeExceeded,
)
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.journal import Journal
from runner.registry.auth import Anonymous
from runner.registry.image import OCI_INDEX
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.stores.rootfs import Installed
from runner.stores.unpacked import UnpackedStore
from runner.unpack import Bases, Unpacking
from sandbox.model import Ending, Evidence, Offer, Outcome, Provided, SandboxSpec, Usage, unheard
from sandbox.rows import Row
from tests.support.erofs import erofs
from tests.support.gateway import FakeRegistry, decision
from tests.support.images import HELLO_TAR, MORE_TAR, entry, tar_of

IMAGE = ImageReference.parse("r.example/team/base:1")
OTHER = ImageReference.parse("r.example/team/other:1")
TARS = [tar_of(("one", b"1")), MORE_TAR]
Collect = Callable[[memoryview], None]


@dataclass
class Place:
    door: Path = Path("/nonexistent")
    peer_uid: int = 0
    released: bool = False

    def release(self) -> None:
        self.released = True


@dataclass
class PlayedSandbox:
    backend: "PlayedBackend"
    evidence: Evidence
    collect: Collect
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def abandon(self) -> None:
        """Nothing of it runs."""

    def wait(self) -> Outcome:
        self.backend.meanwhile(self)
        if self.backend.output is not None:
            self.collect(memoryview(self.backend.output))
        ending = Ending.CANCELLED if self.cancelled else self.backend.ending
        return Outcome(
            ending=ending,
            status=self.backend.status,
            command=self.backend.command,
            claim=None,
            evidence=self.evidence,
            usage=Usage(wall_seconds=0, cpu_seconds=0, memory_peak_bytes=0),
            enforced={},
        )


@dataclass
class PlayedBackend:
    """Ends every sandbox as it is told to."""

    evidence: Evidence
    name: str = "played"
    confined: bool = False
    mounts: bool = True
    output: bytes | None = erofs(b"unpacked")
    ending: Ending = Ending.EXITED
    status: int = 0
    command: int = 0
    log: bytes = b""
    refuses: Exception | None = None
    meanwhile: Callable[[PlayedSandbox], None] = lambda _: None
    places: list[Place] = field(default_factory=list)
    specs: list[SandboxSpec] = field(default_factory=list)

    def offer(self) -> Offer:
        return Offer(refused={}, rootless=True)

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        raise NotImplementedError

    def clean(self, directory: Path) -> None:
        raise NotImplementedError

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        raise NotImplementedError

    def reserve(self, build_id: str) -> Place:
        self.places.append(Place())
        return self.places[-1]

    def provides(self, isolation: Isolation) -> Provided:
        if isolation is Isolation.CONTAINER:
            return Provided.PULLED
        return Provided.MOUNTED if self.mounts else Provided.COPIED

    def launch(
        self,
        place: Any,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Collect | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> PlayedSandbox:
        if self.refuses is not None:
            raise self.refuses
        self.specs.append(spec)
        log(self.log)
        assert collect is not None
        assert all(path.is_file() for path in spec.inputs.values())
        return PlayedSandbox(self, self.evidence, collect)


def provide(unpacking: Unpacking, *images: ImageReference) -> Bases:
    """What a build gets whose Dockerfile names these images, once they are resolved."""
    for image in images:
        unpacking._upstream.resolve(image.pulled())
    return unpacking.provide(DockerfileFacts(images=images))


@dataclass
class House:
    """What several builds share, and the registry beside it."""

    directory: Path
    backend: PlayedBackend
    registry: FakeRegistry
    granted: dict[str, Any] = field(default_factory=dict)
    told: list[events.Event] = field(default_factory=list)
    cancellation: Cancellation = field(default_factory=Cancellation)

    @property
    def store(self) -> UnpackedStore:
        (self.directory / "unpacked").mkdir(exist_ok=True)
        return UnpackedStore(self.directory / "unpacked")

    @property
    def root(self) -> Path:
        """With every program that the builder needs, by name."""
        programs = self.directory / "root/usr/bin"
        programs.mkdir(parents=True, exist_ok=True)
        for program in Buildah.recipe.needs:
            (programs / program).touch()
        return self.directory / "root"

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self.told if isinstance(event, events.Warned)]

    @contextmanager
    def unpacking(self, registry: FakeRegistry | None = None) -> Iterator[Unpacking]:
        """One build's."""
        decided = decision(**self.granted)
        upstream = Upstream(
            Settings(), Anonymous(), ReachableSet(decided), BlobStore(self.directory / "cache"),
            fetching=lambda *_: None, local_images={},
        )  # fmt: skip
        upstream.close()
        upstream._closed = False
        upstream._anonymous = registry or self.registry  # type: ignore[assignment] # has what is used
        unpacking = Unpacking(
            name="build",
            backend=self.backend,
            builder=Buildah(),
            root=Installed(
                name="buildah", digest=Digest.of(b"root"), version="1", source="test",
                entries=0, size_bytes=0, root=self.root,
            ),
            decision=decided,
            platform="linux/amd64",
            store=self.store,
            upstream=upstream,
            journal=Journal(self.told.append, self.cancellation),
            cancellation=self.cancellation,
        )  # fmt: skip
        try:
            yield unpacking
        finally:
            unpacking.release()
            upstream.release()

    def provide(self, *images: ImageReference) -> Bases:
        with self.unpacking() as unpacking:
            return provide(unpacking, *images)

    def assert_nothing_is_left(self) -> None:
        assert self.store.all() == []
        found = [path for path in (self.directory / "unpacked").rglob("*") if path.is_file()]
        assert found == []
        assert all(place.released for place in self.backend.places)


@pytest.fixture
def house(tmp_path: Path, evidence: Evidence) -> House:
    registry = FakeRegistry()
    registry.add_image(str(IMAGE), tars=TARS)
    return House(tmp_path, PlayedBackend(evidence), registry)


# -- what a build is given -----------------------------------------------------------------------


def test_an_image_is_unpacked_once_whoever_asks(house: House) -> None:
    with house.unpacking() as first, house.unpacking() as second:
        given = [provide(unpacking, IMAGE) for unpacking in (first, second)]
        paths = [bases.images["/var/lib/containers/base-0"] for bases in given]
        assert paths[0].samefile(paths[1])
        assert paths[0].read_bytes() == house.backend.output
    assert given[0].provided == given[1].provided == {IMAGE: Provided.MOUNTED}
    assert len(house.backend.specs) == 1
    assert given[0].bases[0].names == (str(IMAGE),)
    assert [layer.compression for layer in given[0].bases[0].layers] == ["gzip", "gzip"]


def test_the_sandbox_that_unpacks_has_no_door_and_one_image(house: House) -> None:
    manifest = house.registry.add_image(str(OTHER), tars=[HELLO_TAR])
    house.provide(IMAGE, OTHER)
    blobs = {manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    names = {f"base/{digest.partition(':')[2]}" for digest in blobs}
    assert set(house.backend.specs[1].inputs) == {"base/manifest.json", *names}
    for spec in house.backend.specs:
        assert not spec.gateway
        assert spec.images == {}
        assert "auth.json" not in spec.plan.files
        assert not any("PROXY" in name or "TOKEN" in name for name in spec.plan.environment)


@pytest.mark.parametrize("rootless", [False, True])
def test_whoever_unpacks_is_on_the_host_what_policy_wants(rootless: bool, house: House) -> None:
    house.granted["rootless"] = rootless
    house.provide(IMAGE)
    assert [spec.rootless for spec in house.backend.specs] == [rootless]


@pytest.mark.parametrize(("mounts", "how"), [(True, Provided.MOUNTED), (False, Provided.COPIED)])
def test_what_cannot_be_mounted_is_copied(mounts: bool, how: Provided, house: House) -> None:
    house.backend.mounts = mounts
    given = house.provide(IMAGE)
    assert given.provided == {IMAGE: how}
    assert set(given.inputs) == (set() if mounts else {"base-0.erofs"})
    assert given.bases[0].packed == (None if mounts else "/run/runner/door/base-0.erofs")


@pytest.mark.parametrize("again", [False, True])
def test_what_a_mount_would_lose_is_copied(again: bool, house: House) -> None:
    house.registry.add_image(str(OTHER), tars=[tar_of(entry("null", tarfile.CHRTYPE))])
    assert house.provide(OTHER).provided == {OTHER: Provided.COPIED}
    if again:
        assert house.provide(OTHER).provided == {OTHER: Provided.COPIED}
        assert len(house.backend.specs) == 1


def test_file_capabilities_are_pulled(house: House) -> None:
    capable = entry("file")
    capable.pax_headers = {"SCHILY.xattr.security.capability": "x"}
    house.registry.add_image(str(OTHER), tars=[tar_of(capable)])
    assert house.provide(OTHER).provided == {OTHER: Provided.PULLED}
    assert house.backend.specs == []
    assert "capabilities" in house.warnings[0]
    house.assert_nothing_is_left()


def test_two_names_of_one_digest_are_one_image(house: House) -> None:
    house.registry.images[OTHER] = house.registry.images[IMAGE]
    by_digest = ImageReference.parse(f"{OTHER.name}@{house.registry.images[IMAGE][0].digest}")
    house.registry.images[by_digest] = house.registry.images[IMAGE]
    given = house.provide(IMAGE, OTHER, by_digest)
    assert given.provided == dict.fromkeys((IMAGE, OTHER, by_digest), Provided.MOUNTED)
    (base,) = given.bases
    digest = str(by_digest.digest).partition(":")[2]
    assert base.names == (str(IMAGE), str(OTHER), f"{OTHER.name}:by-digest-{digest[:12]}")
    assert len(house.backend.specs) == 1


def test_one_more_than_the_most_is_pulled(house: House) -> None:
    images = [ImageReference.parse(f"r.example/many/{n}:1") for n in range(MOST_BASES + 1)]
    for number, image in enumerate(images):
        house.registry.add_image(str(image), tars=[tar_of(("n", b"%d" % number))])
    given = house.provide(*images)
    ways = [given.provided[image] for image in images]
    assert ways == [Provided.MOUNTED] * MOST_BASES + [Provided.PULLED]
    assert len(given.images) == len(given.bases) == MOST_BASES


def indexed(registry: FakeRegistry, *architectures: str | None) -> None:
    """IMAGE as an index whose entries are all the same image."""
    found, _ = registry.images[IMAGE]
    named = {"mediaType": found.media_type, "digest": str(found.digest), "size": found.size}
    entries = [
        named | ({"platform": {"os": "linux", "architecture": each}} if each else {})
        for each in architectures
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    registry.add(str(OTHER), OCI_INDEX, json.dumps(document).encode())
    registry.images[OTHER.pulled().at(found.digest)] = registry.images[IMAGE]


def test_of_an_index_the_platform_is_unpacked(house: House) -> None:
    indexed(house.registry, "arm64", "amd64")
    assert house.provide(OTHER).provided == {OTHER: Provided.MOUNTED}
    (spec,) = house.backend.specs
    digest = house.registry.images[IMAGE][0].digest
    assert {"base/manifest.json", f"base/{digest.hex}.manifest.json"} <= set(spec.inputs)


def test_an_index_that_leaves_a_choice_is_pulled(house: House) -> None:
    indexed(house.registry, "amd64", None)
    assert house.provide(OTHER).provided == {OTHER: Provided.PULLED}
    assert house.backend.specs == []


def test_an_index_without_the_platform_is_told_at_once(house: House) -> None:
    indexed(house.registry, "arm64", "s390x")
    with pytest.raises(ImageNotFound, match="no image for linux/amd64"):
        house.provide(OTHER)


# -- several at once -----------------------------------------------------------------------------


def test_two_builds_that_want_the_same_image_share_one_sandbox(house: House) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(_: PlayedSandbox) -> None:
        begun.set()
        assert go_on.wait(10)

    house.backend.meanwhile = slowly
    found: list[Bases] = []
    threads = [threading.Thread(target=lambda: found.append(house.provide(IMAGE))) for _ in "123"]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert [given.provided for given in found] == [{IMAGE: Provided.MOUNTED}] * 3
    assert len(house.backend.specs) == 1


def test_whoever_waits_makes_it_when_the_other_failed(house: House) -> None:
    def fail_once(_: PlayedSandbox) -> None:
        house.backend.status = 1 if len(house.backend.specs) == 1 else 0
        house.backend.command = 1

    house.backend.meanwhile = fail_once
    assert house.provide(IMAGE).provided == {IMAGE: Provided.PULLED}
    assert house.provide(IMAGE).provided == {IMAGE: Provided.MOUNTED}


def test_cancelling_ends_the_wait_for_another_build(house: House) -> None:
    with house.unpacking() as unpacking:
        house.provide(IMAGE)
        (made,) = house.store.all()
        house.store.remove(made)
        with house.store.turn(made.identity, lambda: None):
            threading.Timer(0.2, house.cancellation.cancel).start()
            with pytest.raises(Cancelled):
                provide(unpacking, IMAGE)


# -- what goes wrong -----------------------------------------------------------------------------


def test_cancelling_ends_the_sandbox(house: House) -> None:
    def cancelled(sandbox: PlayedSandbox) -> None:
        house.backend.output = None
        house.cancellation.cancel()
        assert sandbox.cancelled

    house.backend.meanwhile = cancelled
    with pytest.raises(Cancelled):
        house.provide(IMAGE)
    house.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ({"ending": Ending.TIME}, "took longer"),
        ({"ending": Ending.MEMORY}, "of memory"),
        ({"ending": Ending.PIDS}, "tasks"),
        ({"ending": Ending.LOG}, "of output"),
        ({"ending": Ending.BROKEN}, "without a report"),
        ({"status": 1, "log": b"x: No space left on device"}, "is full"),
        ({"status": 1, "command": 1}, "mkfs.erofs failed"),
        ({"refuses": SandboxFailed("no sandbox here")}, "no sandbox here"),
        ({"refuses": DiskExceeded("the disk is full")}, "the disk is full"),
        ({"output": b"garbage" * 1000}, "no EROFS image"),
        ({"output": erofs(b"a")[:-1]}, "no EROFS image"),
        ({"output": None}, "no EROFS image"),
    ],
)
def test_what_cannot_be_unpacked_is_pulled(ended: Any, told: str, house: House) -> None:
    for name, value in ended.items():
        setattr(house.backend, name, value)
    given = house.provide(IMAGE)
    assert given.provided == {IMAGE: Provided.PULLED}
    assert (given.bases, given.images, given.inputs) == ((), {}, {})
    (warning,) = house.warnings
    assert str(IMAGE) in warning
    assert told in warning
    house.assert_nothing_is_left()


def test_an_image_that_the_builder_refuses_is_at_fault(house: House) -> None:
    house.backend.status, house.backend.log = 125, b"no such layer"
    with pytest.raises(BaseImageInvalid, match="cannot be unpacked: buildah ended with 125"):
        house.provide(IMAGE)
    assert events.Output(b"no such layer") in house.told
    house.assert_nothing_is_left()


def test_an_error_that_is_nobodys_fault_is_not_swallowed(house: House) -> None:
    house.backend.refuses = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        house.provide(IMAGE)
    house.assert_nothing_is_left()


def test_a_blob_that_the_registry_lacks_is_told(house: House) -> None:
    manifest = json.loads(house.registry.images[IMAGE][1])
    del house.registry.blobs[Digest(manifest["layers"][1]["digest"])]
    with pytest.raises(ImageNotFound):
        house.provide(IMAGE)
    assert house.backend.specs == []
    house.assert_nothing_is_left()


def test_who_serves_the_manifest_without_the_blobs_gets_nothing_of_the_store(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the image, nor another answer than where nobody has it."""
    monkeypatch.setattr("runner.unpack.FETCHED_AT_A_TIME", 1)  # which is missing first
    thief = FakeRegistry()
    thief.images = {OTHER: house.registry.images[IMAGE]}
    told: list[RunnerError] = []
    for _ in range(2):
        with house.unpacking(thief) as unpacking, pytest.raises(ImageNotFound) as caught:
            provide(unpacking, OTHER)
        told.append(caught.value)
        assert house.provide(IMAGE).provided == {IMAGE: Provided.MOUNTED}
    assert told[0].message == told[1].message
    assert told[0].advice == told[1].advice


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"spoil_layer": lambda data: data[:-1]}, "layer-stream"),
        ({"spoil_layer": lambda data: data + b"x"}, "layer-stream"),
        ({"tars": [tar_of(("../x", b""))]}, "entry-escape"),
        ({"edit_config": lambda c: c["rootfs"]["diff_ids"].reverse()}, "diff-id"),
    ],
)
def test_an_image_that_breaks_a_rule_reaches_no_sandbox(
    parts: Any, rule: str, house: House
) -> None:
    house.registry.add_image(str(OTHER), **parts)
    with pytest.raises(BaseImageInvalid) as caught:
        house.provide(OTHER)
    assert caught.value.rule == rule
    assert caught.value.message.count(f"[{rule}]") == 1
    assert house.backend.specs == []
    house.assert_nothing_is_left()


def test_looking_through_an_image_has_its_time(house: House) -> None:
    house.granted["limits"] = replace(Limits(), wall_seconds=0)
    with pytest.raises(TimeExceeded, match="took longer than 0 s"):
        house.provide(IMAGE)


def test_waiting_for_another_build_has_its_time_too(house: House) -> None:
    assert house.provide(IMAGE).provided == {IMAGE: Provided.MOUNTED}
    (made,) = house.store.all()
    house.store.remove(made)
    house.granted["limits"] = replace(Limits(), wall_seconds=1)
    with house.store.turn(made.identity, lambda: None):
        given = house.provide(IMAGE)
    assert given.provided == {IMAGE: Provided.PULLED}
    assert "took longer than 1 s" in house.warnings[0]


def test_a_blob_that_was_damaged_here_is_forgotten_and_fetched_again(house: House) -> None:
    with house.unpacking() as unpacking:
        unpacking._upstream.resolve(IMAGE)
        base = unpacking._parts(IMAGE)[0]
        unpacking._fetch([base])
        path = unpacking._upstream.path(base.parsed.layers[0].digest)
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BaseImageCorrupt, match="damaged on this host"):
            provide(unpacking, IMAGE)
    assert house.provide(IMAGE).provided == {IMAGE: Provided.MOUNTED}


def test_a_builder_that_unpacks_in_another_way_unpacks_anew(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.provide(IMAGE)
    plan = Buildah().unpack("linux/amd64")
    other = replace(plan, environment={**plan.environment, "A": "b"})
    monkeypatch.setattr(Buildah, "unpack", lambda *_: other)
    house.provide(IMAGE)
    assert len(house.backend.specs) == len(house.store.all()) == 2


def test_all_images_together_have_the_time_of_the_build(house: House) -> None:
    house.registry.add_image(str(OTHER), tars=[tar_of(("other", b""))])
    house.granted["limits"] = replace(Limits(), wall_seconds=1)
    house.backend.meanwhile = lambda _: time.sleep(1.1)
    given = house.provide(IMAGE, OTHER)
    assert given.provided == {IMAGE: Provided.MOUNTED, OTHER: Provided.PULLED}
    (spec,) = house.backend.specs
    assert spec.limits.wall_seconds == 1
    assert "took longer than 1 s" in house.warnings[0]


def test_a_builder_of_an_older_recipe_is_told_and_nothing_is_tried(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(Buildah.recipe, needs=(*Buildah.recipe.needs, "new"))
    with house.unpacking() as unpacking:
        monkeypatch.setattr(Buildah, "recipe", recipe)
        given = provide(unpacking, IMAGE)
    assert given.provided == {IMAGE: Provided.PULLED}
    assert "has no new: run `runner builder install`" in house.warnings[0]
    assert house.backend.specs == []
