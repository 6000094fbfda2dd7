"""Which image a build starts from, by whatever stages in between."""

from pathlib import Path

import pytest

from builder.dockerfile import read_dockerfile
from policies.reference import ImageReference
from runner.bases import parts, read_config, started_from
from runner.errors import BaseImageDenied, VerificationFailed
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.registry.auth import Anonymous
from runner.registry.image import Platform
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from tests.support.gateway import FakeRegistry, decision

AMD64 = Platform("linux", "amd64")
IMAGE = ImageReference.parse("r.example/base:1")


@pytest.mark.parametrize(
    ("dockerfile", "target", "image"),
    [
        ("FROM a", None, "a"),
        ("FROM a:2@sha256:" + "0" * 64, None, "a:2@sha256:" + "0" * 64),
        ("FROM a\nFROM b", None, "b"),
        ("FROM a\nFROM b", "0", "a"),
        ("FROM a AS x\nFROM b AS y", "X", "a"),
        ("FROM a AS x\nFROM x AS y\nFROM Y", None, "a"),
        ("FROM a AS x\nFROM b\nFROM x AS z", "z", "a"),
        ("FROM a AS x\nFROM x AS x", None, None),
        ("FROM scratch", None, None),
        ("FROM scratch AS x\nFROM x", None, None),
        ("FROM a\nCOPY --from=b / /", None, "a"),
        ("ARG B=a:1\nFROM $B", None, "a:1"),
        ("ARG B\nFROM ${B%x}", None, None),
    ],
)
def test_the_image_that_the_stage_begins_with(
    dockerfile: str, target: str | None, image: str | None
) -> None:
    facts = read_dockerfile(
        dockerfile.encode(), build_args={}, target=target, platform="linux/amd64"
    )
    wanted = ImageReference.parse(f"docker.io/library/{image}") if image else None
    assert started_from(facts, target) == wanted


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def upstream(registry: FakeRegistry, tmp_path: Path) -> Upstream:
    upstream = Upstream(
        Settings(), Anonymous(), ReachableSet(decision()), BlobStore(tmp_path / "cache"),
        fetching=lambda *_: None, local_images={},
    )  # fmt: skip
    upstream._anonymous = registry  # type: ignore[assignment] # has what is asked of it
    return upstream


def test_an_image_has_its_manifest_configuration_and_layers(
    registry: FakeRegistry, upstream: Upstream
) -> None:
    manifest = registry.add_image(str(IMAGE))
    (found,) = parts(IMAGE, upstream, AMD64)
    assert found.root == found.manifest
    assert [blob.digest for blob in found.blobs] == [
        manifest["config"]["digest"],
        *(layer["digest"] for layer in manifest["layers"]),
    ]
    assert len(read_config(found, upstream).diff_ids) == 2


def test_a_configuration_that_is_none_is_refused(
    registry: FakeRegistry, upstream: Upstream
) -> None:
    registry.add_image(str(IMAGE), spoil_config=lambda _: b"[]")
    (found,) = parts(IMAGE, upstream, AMD64)
    with pytest.raises(VerificationFailed):
        read_config(found, upstream)


def test_what_may_not_be_resolved_has_no_parts(upstream: Upstream) -> None:
    with pytest.raises(BaseImageDenied):
        parts(ImageReference.parse("other.example/base:1"), upstream, AMD64)
