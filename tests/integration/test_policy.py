"""Policy as a build meets it: decided before anything runs, again when base images are known."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.hosts import Person, Ran, write_context

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]


@pytest.fixture
def with_onbuild(person: Person, place: Path, registry: "RealRegistry") -> str:
    """A base image whose ONBUILD adds something from elsewhere, and whose ENV says what."""
    base = f"{registry.host}/bases/onbuild:1"
    context = write_context(
        place / "base",
        "FROM scratch\nENV WHERE=https://a.invalid/x\nONBUILD ADD $WHERE /x\n",
    )
    ran = person.run("submit", context, "--destination", base)
    assert ran.status == 0, ran.stderr
    return base


def policy(directory: Path, **sections: Any) -> Path:
    document = {"apiVersion": "runner/v1alpha1", "name": "test", **sections}
    path = directory / "policy.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    path.chmod(0o644)
    return path


def directory_of(ran: Ran, person: Person) -> Path:
    build = next(row for row in ran.stderr.splitlines() if row.startswith("build "))
    return person.home.builds / build.split()[1]


def submitted(person: Person, place: Path, base: str, rules: Path) -> Ran:
    context = write_context(place / "context", f"FROM {base}\nCOPY Dockerfile /\n")
    return person.run("submit", "--untrusted", context, f"--policy={rules}")


def test_what_a_base_image_brings_along_is_denied_before_anything_runs(
    person: Person, place: Path, with_onbuild: str
) -> None:
    deny = [{"name": "adds", "when": "size(dockerfile.remote_adds) > 0", "reason": "no adds"}]
    ran = submitted(person, place, with_onbuild, policy(place, deny=deny))
    assert (ran.status, ran.code) == (3, "policy-denied"), ran.stderr
    assert "no adds (deny/adds)" in ran.stderr
    assert "launch" not in ran.stderr
    found = json.loads((directory_of(ran, person) / "decision.json").read_bytes())
    assert found["facts"]["dockerfile"]["remote_adds"] == ["https://a.invalid/x"]
    assert found["facts"]["base"]["onbuild"] == ["ADD $WHERE /x"]
    assert found["decision"]["rule"] == "deny/adds"
    person.assert_nothing_left()


def test_why_a_build_ran_as_it_did_is_told_by_one_command(person: Person, place: Path) -> None:
    rules = policy(
        place, floors=[{"name": "short", "when": "source.fork", "limits": {"wall_seconds": 300}}]
    )
    context = write_context(place / "context", "FROM scratch\nCOPY . /\n")
    ran = person.run("submit", context, f"--policy={rules}")
    assert ran.status == 0, ran.stderr
    latest = directory_of(ran, person)
    result = json.loads((latest / "result.json").read_bytes())
    assert result["facts"]["source"]["fork"] is None
    assert result["decision"]["grant"]["limits"]["wall_seconds"] == 300
    told = person.run("policy", "explain", "--build", latest.name, f"--policy={rules}")
    assert told.status == 0, told.stderr
    line = next(row for row in told.stdout.splitlines() if "floors/short" in row)
    assert "unknown" in line
    assert "wall_seconds 3600 -> 300" in line
    assert "decided then: the same" in told.stdout
