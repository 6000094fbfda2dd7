"""The backend of a build is policy's choice where nobody names one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from policies import loader
from policies.model import Isolation
from runner.cancel import Cancellation
from runner.errors import IsolationUnavailable, SandboxFailed
from runner.pipeline import submit
from runner.request import BuildRequest, BuildResult
from sandbox.model import Backend
from tests.support.backends import StatedBackend, WatchedBackend, on_host
from tests.support.hosts import Person, write_context

pytestmark = pytest.mark.sandbox

POLICY = """
apiVersion: runner/v1alpha1
name: own
extends: default
default: {backends: [away, watched, other]}
"""


def build(
    person: Person, directory: Path, *backends: Backend, asked: str | None = None, more: str = ""
) -> BuildResult:
    """``FROM scratch``, with these backends in this order."""
    context = directory / "context"
    if not context.exists():
        write_context(context, "FROM scratch\nCOPY file /\n", file="x")
    found: Mapping[str, Backend] = {backend.name: backend for backend in backends}
    tools = replace(
        person.tools(),
        backends=found,
        policies=[loader.parse(f"{POLICY}{more}".encode(), "own.yaml")],
    )
    request = BuildRequest(context=context, build_args={}, backend=asked)
    return submit(request, tools, lambda _: None, Cancellation())


@pytest.fixture
def watched(person: Person) -> WatchedBackend:
    return WatchedBackend("watched", person.tools().backends["local"])


def test_a_backend_that_cannot_be_had_does_not_end_the_build(
    person: Person, watched: WatchedBackend, tmp_path: Path
) -> None:
    away, other = StatedBackend("away"), StatedBackend("other", Isolation.GVISOR)
    result = build(person, tmp_path, away, watched, other)
    assert result.decision.backend == result.facts.request.backend == "watched"
    assert result.facts.host.isolations == {Isolation.GVISOR}
    assert away.asked == 1
    assert other.asked == 0
    (spec,) = watched.specs
    assert not spec.rootless


def test_one_that_was_asked_for_is_not_left_for_another(
    person: Person, watched: WatchedBackend, tmp_path: Path
) -> None:
    away = StatedBackend("away")
    with pytest.raises(IsolationUnavailable, match="no gvisor by away"):
        build(person, tmp_path, away, watched, asked="away")
    assert watched.specs == []


def test_one_that_fails_when_it_was_chosen_is_not_left_either(
    person: Person, watched: WatchedBackend, tmp_path: Path
) -> None:
    """It might have seen something of the build."""
    other = StatedBackend("other", Isolation.GVISOR)
    with pytest.raises(SandboxFailed, match="other has no place"):
        build(person, tmp_path, other, watched)
    assert watched.specs == []


def test_who_the_sandbox_is_on_the_host_is_what_policy_wants(
    person: Person, watched: WatchedBackend, tmp_path: Path
) -> None:
    """And the local backend keeps it, whoever runs it."""
    floors = "floors: [{name: nobody, rootless: true}]"
    result = build(person, tmp_path, watched, more=floors)
    (spec,) = watched.specs
    assert spec.rootless
    assert all(process.uid != 0 for process in on_host(result.evidence))
