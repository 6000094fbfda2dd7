"""Base images through the shared cache."""

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound, RegistryUnreachable
from runner.gateway.kept import Kept
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.registry.auth import Anonymous
from runner.registry.layout import LayoutClient, LayoutDirectory
from runner.settings import BaseImageSettings, Settings
from runner.stores.blobs import BlobStore, read_all
from tests.support.gateway import FakeRegistry, Gates, decision
from tests.support.images import MemoryBlobs, make_image

IMAGE = ImageReference.parse("r.example/team/base:1")


def opened(
    cache: Path, registry: FakeRegistry, *, cache_bytes: int = 1 << 30, **base_images: Any
) -> Upstream:
    settings = Settings(
        cache_bytes=cache_bytes, base_images=BaseImageSettings.model_validate(base_images)
    )
    upstream = Upstream(
        settings, Anonymous(), ReachableSet(decision()), BlobStore(cache),
        fetching=lambda *_: None, local_images={},
    )  # fmt: skip
    upstream.close()
    upstream._closed = False
    upstream._anonymous = registry  # type: ignore[assignment] # has what is asked of it
    upstream._as_user = registry  # type: ignore[assignment] # likewise
    return upstream


def layers(manifest: bytes) -> list[Digest]:
    return [Digest(layer["digest"]) for layer in json.loads(manifest)["layers"]]


def fetched(upstream: Upstream, image: ImageReference = IMAGE) -> Digest:
    """A layer of the image, fetched; its digest."""
    digest = layers(upstream.resolve(image)[1])[0]
    upstream.open_blob(digest)[0].close()
    return digest


@pytest.fixture
def registry() -> FakeRegistry:
    made = FakeRegistry()
    made.add_image(str(IMAGE))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def blob_requests(registry: FakeRegistry) -> list[str]:
    return [asked for asked in registry.asked if "@sha256" in asked]


# -- one fetch -----------------------------------------------------------------------------------


class SlowRegistry(FakeRegistry):
    """Says when it was asked, and delivers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    @contextmanager
    def read_blob(self, *what: Any) -> Iterator[Iterator[bytes]]:
        with super().read_blob(*what) as pieces:
            self.begun.set()
            assert self.go_on.wait(10)
            yield pieces


def test_many_builds_that_want_a_blob_ask_for_it_once(cache: Path) -> None:
    registry = SlowRegistry()
    registry.add_image(str(IMAGE))
    builds = [opened(cache, registry) for _ in range(4)]
    got: list[Digest] = []
    threads = [
        threading.Thread(target=lambda each=each: got.append(fetched(each))) for each in builds
    ]
    for thread in threads:
        thread.start()
    assert registry.begun.wait(5)
    registry.go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(got) == 4
    assert len(blob_requests(registry)) == 1


def _in_a_process(cache: Path, manifest: bytes, blobs: dict[str, bytes], log: Path) -> None:
    registry = FakeRegistry()
    registry.add(str(IMAGE), "application/vnd.oci.image.manifest.v1+json", manifest)
    registry.blobs = {Digest(digest): data for digest, data in blobs.items()}
    fetched(opened(cache, registry))
    with log.open("a") as file:
        file.write("".join(f"{asked}\n" for asked in blob_requests(registry)))
    os._exit(0)


def test_processes_share_one_fetch_too(cache: Path, registry: FakeRegistry, tmp_path: Path) -> None:
    manifest = registry.images[IMAGE][1]
    blobs = {str(digest): data for digest, data in registry.blobs.items()}
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_in_a_process, args=(cache, manifest, blobs, log)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(log.read_text().splitlines()) == 1


def test_whoever_waits_tries_when_the_other_failed(cache: Path, registry: FakeRegistry) -> None:
    empty = FakeRegistry()
    empty.images = registry.images
    first, second = opened(cache, empty), opened(cache, registry)
    with pytest.raises(ImageNotFound):
        fetched(first)
    fetched(second)
    assert list(cache.rglob("*.turn")) == []


def test_who_waits_for_a_fetch_hears_that_the_session_ended(cache: Path) -> None:
    registry = SlowRegistry()
    registry.add_image(str(IMAGE))
    one, other = opened(cache, registry), opened(cache, registry)
    thread = threading.Thread(target=fetched, args=(one,))
    thread.start()
    assert registry.begun.wait(5)
    other.resolve(IMAGE)
    other._closed = True
    with pytest.raises(RegistryUnreachable):
        fetched(other)
    registry.go_on.set()
    thread.join(10)


def test_another_repository_has_to_deliver_for_itself(cache: Path, registry: FakeRegistry) -> None:
    fetched(opened(cache, registry))
    other = ImageReference.parse("r.example/other/base:1")
    registry.images[other] = registry.images[IMAGE]
    fetched(opened(cache, registry), other)
    assert len(blob_requests(registry)) == 2
    registry.blobs.clear()
    third = ImageReference.parse("r.example/evil/base:1")
    registry.images[third] = registry.images[IMAGE]
    with pytest.raises(ImageNotFound):
        fetched(opened(cache, registry), third)


# -- bounded -------------------------------------------------------------------------------------


def test_the_cache_is_bounded_while_builds_run_and_keeps_what_they_use(
    cache: Path, registry: FakeRegistry
) -> None:
    first = opened(cache, registry, cache_bytes=0)
    digest = fetched(first)
    other = ImageReference.parse("r.example/other:1")
    registry.add_image(str(other), compression="zstd")
    second = opened(cache, registry, cache_bytes=0)
    fetched(second, other)
    store = BlobStore(cache)
    assert store.size(digest) is not None
    assert Digest.of(read_all(first, digest, 1 << 20)) == digest
    first.close()
    assert Digest.of(read_all(first, digest, 1 << 20)) == digest  # verify comes after the end
    first.release()
    assert store.path(digest) in store.evict(0)
    assert first.size(digest) is None
    second.release()


def test_what_the_cache_has_of_a_resolved_image_stays_until_the_end(
    cache: Path, registry: FakeRegistry
) -> None:
    digest = fetched(opened(cache, registry))
    later = opened(cache, registry)
    later.resolve(IMAGE)  # a builder that has the base already asks for no blob
    BlobStore(cache).evict(0)
    assert later.size(digest) is not None


# -- elsewhere, and nowhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "asked"),
    [
        ({"r.example/**": "m.example/hub/**"}, "m.example/hub/team/base:1"),
        ({"r.example/team/*": "m.example/*"}, "m.example/base:1"),
        ({"r.example/team/base": "m.example/a/b"}, "m.example/a/b:1"),
        ({"r.example/*": "m.example/*"}, "r.example/team/base:1"),
        ({"r.example/team": "m.example/x"}, "r.example/team/base:1"),
        ({"r.example/tea/*": "m.example/*"}, "r.example/team/base:1"),
        ({"r.example/team/*": "m.example/1/*", "r.example/**": "m.example/2/**"},
         "m.example/1/base:1"),
    ],
)  # fmt: skip
def test_what_is_rewritten_is_asked_for_elsewhere(
    rules: dict[str, str], asked: str, cache: Path
) -> None:
    registry = FakeRegistry()
    registry.add_image(asked)
    upstream = opened(cache, registry, rewrite=rules)
    digest = fetched(upstream)
    name = asked.removesuffix(":1")
    assert registry.asked == [asked, f"{name}@{digest}"]
    assert list(upstream.resolved()) == [IMAGE]


def test_a_rewritten_image_needs_leave_under_its_own_name(cache: Path) -> None:
    registry = FakeRegistry()
    registry.add_image("r.example/allowed:1")
    upstream = opened(cache, registry, rewrite={"other.example/*": "r.example/*"})
    with pytest.raises(Exception, match="may not start from"):
        upstream.resolve(ImageReference.parse("other.example/allowed:1"))
    assert registry.asked == []


def test_credentials_go_where_the_decision_names_them(cache: Path) -> None:
    upstream = opened(cache, FakeRegistry(), rewrite={"r.example/**": "m.example/**"})
    upstream._reachable.decide(decision(pull_credentials=(("r.example/**",),)))
    upstream._anonymous, upstream._as_user = FakeRegistry(), FakeRegistry()  # type: ignore[assignment] # have what is used
    upstream._anonymous.add_image("m.example/team/base:1")  # type: ignore[attr-defined] # the fake's
    upstream.resolve(IMAGE)
    assert upstream._as_user.asked == []  # type: ignore[attr-defined] # the fake's


LOCAL = ("r.example/team/*",)


def test_offline_the_cache_gives_what_is_named_local_by_digest(
    cache: Path, registry: FakeRegistry
) -> None:
    online = opened(cache, registry, local=LOCAL)
    digest = fetched(online)
    by_digest = IMAGE.at(online.resolve(IMAGE)[0].digest)
    nobody = FakeRegistry()
    offline = opened(cache, nobody, local=LOCAL, offline=True)
    assert offline.resolve(by_digest) == online.resolve(IMAGE)
    with offline.open_blob(digest)[0] as stream:
        assert Digest.of(stream.read()) == digest
    for missing in (replace(IMAGE, tag="2"), IMAGE.at(Digest.of(b"x"))):
        with pytest.raises(ImageNotFound, match="no registry is asked"):
            offline.resolve(missing)
    assert nobody.asked == []


def test_offline_a_tag_is_what_it_was_last(cache: Path, registry: FakeRegistry) -> None:
    opened(cache, registry, local=LOCAL).resolve(IMAGE)
    registry.add_image(str(IMAGE), compression="zstd")
    last = opened(cache, registry, local=LOCAL).resolve(IMAGE)
    nobody = FakeRegistry()
    offline = opened(cache, nobody, local=LOCAL, offline=True)
    assert offline.resolve(IMAGE) == last
    assert nobody.asked == []


def test_offline_a_rewritten_tag_is_found_under_what_is_asked_for(cache: Path) -> None:
    rules: dict[str, Any] = {"rewrite": {"r.example/team/*": "m.example/hub/*"}, "local": LOCAL}
    registry = FakeRegistry()
    registry.add_image("m.example/hub/base:1")
    online = opened(cache, registry, **rules).resolve(IMAGE)
    assert opened(cache, FakeRegistry(), offline=True, **rules).resolve(IMAGE) == online
    with pytest.raises(ImageNotFound):  # the repository of this name has delivered nothing
        opened(cache, FakeRegistry(), offline=True, local=LOCAL).resolve(IMAGE)


def test_what_an_offline_build_has_resolved_stays_until_its_end(
    cache: Path, registry: FakeRegistry
) -> None:
    online = opened(cache, registry, local=LOCAL)
    digest = online.resolve(IMAGE)[0].digest
    online.release()
    offline = opened(cache, FakeRegistry(), local=LOCAL, offline=True)
    offline.resolve(IMAGE)
    store = BlobStore(cache)
    store.evict(0)
    assert store.size(digest) is not None
    offline.release()
    store.evict(0)
    assert store.size(digest) is None


def test_a_tag_whose_manifest_was_evicted_is_none(cache: Path, registry: FakeRegistry) -> None:
    online = opened(cache, registry, local=LOCAL)
    digest = online.resolve(IMAGE)[0].digest
    online.release()
    store = BlobStore(cache)
    store.evict(0)
    with pytest.raises(ImageNotFound):
        opened(cache, FakeRegistry(), local=LOCAL, offline=True).resolve(IMAGE)
    assert Kept(store).tagged(IMAGE) == digest
    assert Kept(store).collect() == [str(IMAGE)]
    assert Kept(store).tagged(IMAGE) is None
    assert list((cache / "tags").iterdir()) == []


def test_a_manifest_that_is_forgotten_takes_its_tags_along(
    cache: Path, registry: FakeRegistry
) -> None:
    online = opened(cache, registry, local=LOCAL)
    digest = online.resolve(IMAGE)[0].digest
    other = replace(IMAGE, tag="other")
    registry.add_image(str(other), compression="zstd")
    online.resolve(other)
    Kept(BlobStore(cache)).forget(digest)
    offline = opened(cache, FakeRegistry(), local=LOCAL, offline=True)
    assert offline.resolve(other) == online.resolve(other)
    for gone in (IMAGE, IMAGE.at(digest)):
        with pytest.raises(ImageNotFound):
            offline.resolve(gone)


def test_a_tag_that_nobody_can_read_is_none(cache: Path, registry: FakeRegistry) -> None:
    opened(cache, registry, local=LOCAL).resolve(IMAGE)
    (tag,) = (cache / "tags").iterdir()
    for spoilt in (b"", b"\xff", b"sha256:12 x"):
        tag.write_bytes(spoilt)
        with pytest.raises(ImageNotFound):
            opened(cache, FakeRegistry(), local=LOCAL, offline=True).resolve(IMAGE)


def test_a_tag_is_kept_for_images_that_are_named_local_alone(
    cache: Path, registry: FakeRegistry
) -> None:
    opened(cache, registry).resolve(IMAGE)
    assert not (cache / "tags").exists()


def layout_of(directory: Path, **parts: Any) -> LayoutClient:
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs, **parts).root
    store = BlobStore(directory)
    for data in blobs.blobs.values():
        store.add(data)
    entry = {"mediaType": root.media_type, "digest": root.digest, "size": root.size}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (directory / "index.json").write_text(json.dumps(index))
    return LayoutClient(LayoutDirectory(directory))


@pytest.mark.parametrize("rewrite", [{}, {"r.example/team/*": "m.example/*"}])
def test_a_layout_in_a_registrys_place_is_what_offline_builds_find(
    cache: Path, tmp_path: Path, rewrite: dict[str, str]
) -> None:
    settings = Settings(base_images=BaseImageSettings(offline=True, local=LOCAL, rewrite=rewrite))
    pulling = Upstream(
        settings, Anonymous(), ReachableSet(decision()), BlobStore(cache),
        fetching=lambda *_: None, local_images={IMAGE: layout_of(tmp_path / "layout")},
    )  # fmt: skip
    digest = fetched(pulling)
    pulling.close()
    shutil.rmtree(tmp_path / "layout")
    nobody = FakeRegistry()
    offline = opened(cache, nobody, local=LOCAL, offline=True, rewrite=rewrite)
    assert fetched(offline) == digest
    assert nobody.asked == []


def test_offline_nothing_else_is_given_though_the_cache_has_it(
    cache: Path, registry: FakeRegistry
) -> None:
    online = opened(cache, registry, local=LOCAL)
    fetched(online)
    by_digest = IMAGE.at(online.resolve(IMAGE)[0].digest)
    nobody = FakeRegistry()
    for local in ((), ("r.example/*",), ("other.example/**",)):
        with pytest.raises(ImageNotFound):
            opened(cache, nobody, local=local, offline=True).resolve(by_digest)
    elsewhere = ImageReference("r.example", "team/other", digest=by_digest.digest)
    with pytest.raises(ImageNotFound):
        opened(cache, nobody, local=LOCAL, offline=True).resolve(elsewhere)
    assert nobody.asked == []


def test_a_layer_is_no_manifest_offline(cache: Path, registry: FakeRegistry) -> None:
    digest = fetched(opened(cache, registry, local=LOCAL))
    offline = opened(cache, FakeRegistry(), local=LOCAL, offline=True)
    with pytest.raises(Exception, match="media"):
        offline.resolve(IMAGE.at(digest))


def test_two_sessions_do_not_share_what_they_hold(tmp_path: Path) -> None:
    with Gates(tmp_path) as gates:
        one, other = gates.open(), gates.open()
        assert one.session.upstream._held is not other.session.upstream._held


# -- what others do meanwhile ---------------------------------------------------------------------


def test_what_a_build_has_taken_outlives_its_eviction(cache: Path, registry: FakeRegistry) -> None:
    first = opened(cache, registry)
    digest = fetched(first)
    store = BlobStore(cache)
    store.remove(digest)
    shutil.rmtree(store.notes(digest))
    assert first.size(digest) is not None
    first.open(digest).close()
    assert opened(cache, registry).size(digest) is None


def test_notes_that_were_evicted_while_a_blob_came_are_made_again(
    cache: Path, registry: FakeRegistry
) -> None:
    upstream = opened(cache, registry)
    digest = layers(upstream.resolve(IMAGE)[1])[0]
    store = BlobStore(cache)
    upstream._fetching = lambda *_: shutil.rmtree(store.notes(digest), ignore_errors=True)
    content, size = upstream.open_blob(digest)
    content.close()
    assert size == upstream.size(digest)


def test_an_image_that_names_what_it_lacks_takes_nothing_from_the_others(
    cache: Path, registry: FakeRegistry
) -> None:
    evil = ImageReference.parse("r.example/evil/base:1")
    manifest = registry.images[IMAGE][1]
    registry.add(str(evil), registry.images[IMAGE][0].media_type, manifest)
    digest = layers(manifest)[0]
    upstream = opened(cache, Lacking(registry, "r.example/evil/base"))
    upstream.resolve(evil)
    with pytest.raises(ImageNotFound):
        upstream.open_blob(digest, "r.example/evil/base")
    upstream.resolve(IMAGE)
    for name in ("r.example/team/base", "r.example/evil/base", ""):
        content, size = upstream.open_blob(digest, name)
        content.close()
        assert size == upstream.size(digest)


class Lacking(FakeRegistry):
    """A registry in which one repository has manifests and no blobs."""

    def __init__(self, registry: FakeRegistry, name: str) -> None:
        super().__init__(registry.images, registry.blobs)
        self._name = name

    @contextmanager
    def read_blob(self, reference: ImageReference, *what: Any) -> Iterator[Iterator[bytes]]:
        if reference.name == self._name:
            raise ImageNotFound(f"{reference} lacks it")
        with super().read_blob(reference, *what) as pieces:
            yield pieces
