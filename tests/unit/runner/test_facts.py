"""What base images bring along is read from their configurations, or unknown."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.buildah import Buildah
from policies.facts import BuildFacts, DockerfileFacts, Stage, Unknown
from policies.loader import shipped
from policies.model import Isolation
from policies.reference import Digest, ImageReference
from runner.errors import BuilderUnknown, IsolationUnavailable, UsageError
from runner.facts import named_parts, offered, survey, with_bases
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.registry.auth import Anonymous
from runner.registry.image import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from runner.request import BuildRequest
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.tools import Tools
from tests.support.gateway import FakeRegistry, decision

BASE = ImageReference.parse("r.example/base:1")
FACTS = BuildFacts(
    dockerfile=DockerfileFacts(
        images=(BASE,), stages=(Stage(name=None, base="x", image=BASE, line=1),)
    )
)
Bases = Callable[[BuildFacts], BuildFacts]


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def bases(registry: FakeRegistry, tmp_path: Path) -> Bases:
    upstream = Upstream(
        Settings(), Anonymous(), ReachableSet(decision()), BlobStore(tmp_path / "cache"),
        fetching=lambda *_: None, local_images={},
    )  # fmt: skip
    upstream._anonymous = registry  # type: ignore[assignment] # has what is asked of it
    return lambda facts: with_bases(facts, upstream)


def put(registry: FakeRegistry, name: str, config: Any, **platform: str) -> Digest:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    digest = Digest.of(data)
    registry.blobs[digest] = data
    descriptor = {"mediaType": OCI_CONFIG, "digest": digest, "size": len(data)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor, "layers": []}
    return registry.add(name, OCI_MANIFEST, json.dumps(manifest).encode())


def test_the_triggers_of_a_base_image_are_facts(registry: FakeRegistry, bases: Bases) -> None:
    put(registry, str(BASE), {"config": {"OnBuild": ["COPY --from=a.b/c /x /", "RUN make"]}})
    found = bases(FACTS)
    assert found.base.resolved
    assert found.base.onbuild == ("COPY --from=a.b/c /x /", "RUN make")
    assert ImageReference.parse("a.b/c") in found.dockerfile.images


@pytest.mark.parametrize(
    "config", [{}, {"config": None}, {"config": {}}, {"config": {"OnBuild": None}},
               {"config": {"OnBuild": []}}]
)  # fmt: skip
def test_a_base_image_without_triggers_has_none(
    registry: FakeRegistry, bases: Bases, config: Any
) -> None:
    put(registry, str(BASE), config)
    assert bases(FACTS).base.onbuild == ()


@pytest.mark.parametrize(
    "config", [b"", b"[]", {"config": []}, {"config": {"OnBuild": "RUN x"}},
               {"config": {"OnBuild": [1]}}, {"config": {"onbuild": ["RUN x"]}}]
)  # fmt: skip
def test_what_cannot_be_read_is_unknown(registry: FakeRegistry, bases: Bases, config: Any) -> None:
    put(registry, str(BASE), config)
    found = bases(FACTS)
    assert found.base.resolved
    assert found.base.onbuild is None


def test_a_base_image_that_nobody_could_read_is_unknown(bases: Bases) -> None:
    doubt = DockerfileFacts(unknown=(Unknown(frozenset({"images"}), "Line 1"),))
    assert bases(BuildFacts(dockerfile=doubt)).base.onbuild is None


def test_every_entry_of_an_index_that_suits_counts(registry: FakeRegistry, bases: Bases) -> None:
    entries = []
    for architecture, trigger in (("amd64", "RUN a"), ("arm64", "RUN b"), ("amd64", "RUN c")):
        digest = put(registry, "r.example/base:part", {"config": {"OnBuild": [trigger]}})
        size = len(registry.images[BASE.at(digest)][1])
        entries.append({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture},
        })  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    registry.add(str(BASE), OCI_INDEX, json.dumps(index).encode())
    assert bases(FACTS).base.onbuild == ("RUN a", "RUN c")


# -- the parts that a request names ------------------------------------------------------------


class Backend:
    name = "local"

    def __init__(self, *isolations: Isolation) -> None:
        self._isolations = isolations

    def require(self, isolation: Isolation) -> None:
        if isolation not in self._isolations:
            raise IsolationUnavailable(f"no {isolation} here")


def test_what_a_backend_offers_is_asked_one_by_one() -> None:
    backend: Any = Backend(Isolation.GVISOR)
    assert offered(backend) == (frozenset({Isolation.GVISOR}), None)
    nothing: Any = Backend()
    found, why = offered(nothing)
    assert found == frozenset()
    assert why is not None
    assert why.message == "no gvisor here"


def tools(directory: Path) -> Tools:
    home: Any = SimpleNamespace(builders=directory)
    backend: Any = Backend(Isolation.GVISOR)
    return Tools(
        settings=Settings(), home=home, policies=[shipped("default")],
        backends={"local": backend}, builders={"buildah": Buildah()}, credentials=Anonymous(),
    )  # fmt: skip


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    request = BuildRequest(context=tmp_path, build_args={}, backend="cloud")
    with pytest.raises(UsageError, match="no backend 'cloud'"):
        named_parts(request, tools(tmp_path))
    request = BuildRequest(context=tmp_path, build_args={}, builder="docker")
    with pytest.raises(BuilderUnknown, match="no builder 'docker'"):
        named_parts(request, tools(tmp_path))


def test_a_survey_reads_the_context_and_leaves_nothing(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM a.b/c:1\n")
    facts = survey(BuildRequest(context=context, build_args={"A": "b"}), tools(tmp_path / "no"))
    assert [str(image) for image in facts.dockerfile.images] == ["a.b/c:1"]
    assert facts.identity.authenticated
    assert facts.builder.digest is None
    assert facts.host.isolations == {Isolation.GVISOR}
    assert facts.request.build_args == ("A",)
    assert not facts.base.resolved
    assert facts.time is not None
    assert [path.name for path in tmp_path.iterdir()] == ["context"]
