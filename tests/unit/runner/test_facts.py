"""What base images bring along is read from their configurations, or unknown."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.bases import BaseImage
from builder.buildah import Buildah
from policies.facts import BaseFacts, BuildFacts, DockerfileFacts, Stage
from policies.loader import shipped
from policies.model import Isolation, Limits
from policies.reference import Digest, ImageReference
from runner.bases import read_bases
from runner.choice import candidates
from runner.context import snapshot
from runner.errors import BuilderUnknown, UsageError
from runner.facts import build_facts, named_builder, require_reproducible, survey
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.registry.auth import Anonymous
from runner.registry.image import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.request import BuildRequest
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.tools import Tools
from tests.support.backends import StatedBackend
from tests.support.gateway import FakeRegistry, decision

BASE = ImageReference.parse("r.example/base:1")
FACTS = BuildFacts(
    dockerfile=DockerfileFacts(
        images=(BASE,), stages=(Stage(name=None, base="x", image=BASE, line=1),)
    )
)
Bases = Callable[[], BaseImage | None]
Found = dict[ImageReference, BaseImage | None]


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def base(registry: FakeRegistry, tmp_path: Path) -> Bases:
    upstream = Upstream(
        Settings(), Anonymous(), ReachableSet(decision()), BlobStore(tmp_path / "cache"),
        fetching=lambda *_: None, local_images={},
    )  # fmt: skip
    upstream._anonymous = registry  # type: ignore[assignment] # has what is asked of it
    return lambda: read_bases(FACTS, upstream)[BASE]


def put(registry: FakeRegistry, name: str, config: Any) -> Digest:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    digest = Digest.of(data)
    registry.blobs[digest] = data
    descriptor = {"mediaType": OCI_CONFIG, "digest": digest, "size": len(data)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor, "layers": []}
    return registry.add(name, OCI_MANIFEST, json.dumps(manifest).encode())


def test_what_a_base_image_brings_along_is_read(registry: FakeRegistry, base: Bases) -> None:
    put(registry, str(BASE), {"config": {"OnBuild": ["RUN a", "RUN a"], "Env": ["A=b=c", "D"]}})
    assert base() == BaseImage({"A": "b=c", "D": ""}, ("RUN a", "RUN a"))


@pytest.mark.parametrize(
    "config", [{}, {"config": None}, {"config": {}}, {"config": {"OnBuild": None, "Env": None}},
               {"config": {"OnBuild": []}}]
)  # fmt: skip
def test_a_base_image_may_bring_nothing(registry: FakeRegistry, base: Bases, config: Any) -> None:
    put(registry, str(BASE), config)
    assert base() == BaseImage({}, ())


@pytest.mark.parametrize(
    "config", [b"", b"[]", {"config": []}, {"config": {"OnBuild": "RUN x"}},
               {"config": {"OnBuild": [1]}}, {"config": {"onbuild": ["RUN x"]}},
               {"config": {"Env": ["A=b"] * 2001}}]
)  # fmt: skip
def test_what_cannot_be_read_is_unknown(registry: FakeRegistry, base: Bases, config: Any) -> None:
    put(registry, str(BASE), config)
    assert base() is None


def index(registry: FakeRegistry, *entries: tuple[dict[str, Any], str | None]) -> None:
    listed = []
    for config, architecture in entries:
        digest = put(registry, "r.example/base:part", {"config": config})
        size = len(registry.images[BASE.at(digest)][1])
        platform = {"platform": {"os": "linux", "architecture": architecture}}
        listed.append({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": size,
            **(platform if architecture else {}),
        })  # fmt: skip
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    registry.add(str(BASE), OCI_INDEX, json.dumps(document).encode())


def test_of_an_index_the_entry_for_the_platform_counts(registry: FakeRegistry, base: Bases) -> None:
    index(registry, ({"OnBuild": ["RUN a"]}, "amd64"), ({"OnBuild": ["RUN b"]}, "arm64"))
    assert base() == BaseImage({}, ("RUN a",))


@pytest.mark.parametrize(
    "entries",
    [
        [({}, "amd64"), ({"OnBuild": ["RUN b"]}, "amd64")],
        [({}, "amd64"), ({"OnBuild": ["RUN b"]}, None)],
        [({}, "amd64"), ({"Env": ["A=b"]}, None)],
        [({}, "arm64")],
        [],
    ],
)
def test_which_entry_a_builder_takes_is_not_guessed(
    registry: FakeRegistry, base: Bases, entries: list[tuple[dict[str, Any], str | None]]
) -> None:
    index(registry, *entries)
    assert base() is None


def test_an_entry_that_is_served_as_an_index_is_unknown(
    registry: FakeRegistry, base: Bases
) -> None:
    index(registry, ({}, "amd64"))
    (digest,) = [image.digest for image in registry.images if image.digest and image.tag is None
                 and registry.images[image][0].media_type == OCI_MANIFEST]  # fmt: skip
    nested = registry.images[BASE][1]
    registry.images[BASE.at(digest)] = Descriptor(OCI_INDEX, digest, len(nested)), nested
    assert base() is None


# -- facts before and after the base images are resolved ----------------------------------------


def facts(
    text: str, place: Path, bases: dict[ImageReference, BaseImage | None] | None
) -> BuildFacts:
    place.mkdir()
    (place / "Dockerfile").write_text(text)
    request = BuildRequest(context=place, build_args={})
    context = snapshot(place, dockerfile=None, limits=Limits(), into=place.parent / "context.tar")
    return build_facts(
        request, context, builder=Buildah(), builder_digest=None, bases=bases,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "bases", "expected"),
    [
        ("FROM {}", None, BaseFacts()),
        ("FROM {}", {BASE: None}, BaseFacts(resolved=True)),
        (
            "FROM {}",
            {BASE: BaseImage({}, ("RUN a",))},
            BaseFacts(resolved=True, onbuild=("RUN a",)),
        ),
        ("FROM {}", {BASE: BaseImage({}, ())}, BaseFacts(resolved=True, onbuild=())),
        ("FROM --platform=linux/arm64 {}", {BASE: BaseImage({}, ())}, BaseFacts(resolved=True)),
        ("FROM {}\nFROM b:$T", {BASE: BaseImage({}, ())}, BaseFacts(resolved=True)),
        ("FROM scratch", {}, BaseFacts(resolved=True, onbuild=())),
    ],
)
def test_onbuild_is_known_where_every_base_was_read(
    text: str, bases: Found | None, expected: BaseFacts, tmp_path: Path
) -> None:  # fmt: skip
    assert facts(text.format(BASE), tmp_path / "context", bases).base == expected


# -- what a request names ----------------------------------------------------------------------


def tools(directory: Path) -> Tools:
    home: Any = SimpleNamespace(builders=directory)
    return Tools(
        settings=Settings(), home=home, policies=[shipped("default")],
        backends={"local": StatedBackend("local", Isolation.GVISOR)},
        builders={"buildah": Buildah()}, credentials=Anonymous(),
    )  # fmt: skip


def test_a_builder_that_is_not_there_is_named(tmp_path: Path) -> None:
    request = BuildRequest(context=tmp_path, build_args={}, builder="docker")
    with pytest.raises(BuilderUnknown, match="no builder 'docker'"):
        named_builder(request, tools(tmp_path))


def test_a_survey_reads_the_context_and_leaves_nothing(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM a.b/c:1\n")
    request, host = BuildRequest(context=context, build_args={"A": "b"}), tools(tmp_path / "no")
    choice = survey(request, host, candidates(request, host))
    facts = choice.facts
    assert choice.allowed().backend == facts.request.backend == "local"
    assert [str(image) for image in facts.dockerfile.images] == ["a.b/c:1"]
    assert facts.identity.authenticated
    assert facts.builder.digest is None
    assert facts.host.isolations == {Isolation.GVISOR}
    assert facts.request.build_args == ("A",)
    assert not facts.base.resolved
    assert facts.time is not None
    assert [path.name for path in tmp_path.iterdir()] == ["context"]


@pytest.mark.parametrize(
    ("text", "reproducible", "refused"),
    [
        ("FROM {}", True, False),
        ("FROM {}\nSHELL ['x']", False, False),
        ("FROM {}\nHEALTHCHECK CMD x", True, True),
    ],
)
def test_a_promise_that_the_builder_cannot_keep_is_refused(
    text: str, reproducible: bool, refused: bool, tmp_path: Path
) -> None:
    found = facts(text.format(BASE), tmp_path / "context", None)
    request = BuildRequest(context=tmp_path, build_args={}, reproducible=reproducible)
    with pytest.raises(UsageError) if refused else nullcontext():
        require_reproducible(request, Buildah(), found)


def test_what_a_base_image_triggers_counts(tmp_path: Path) -> None:
    brought: Found = {BASE: BaseImage({}, ("HEALTHCHECK CMD x",))}
    found = facts(f"FROM {BASE}", tmp_path / "context", brought)
    request = BuildRequest(context=tmp_path, build_args={}, reproducible=True)
    with pytest.raises(UsageError, match="has HEALTHCHECK"):
        require_reproducible(request, Buildah(), found)
