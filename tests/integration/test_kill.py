"""Threat 22: whatever kills the runner, ``gc`` finds what is left, and nothing else."""

import json
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from runner.cancel import Cancellation
from runner.errors import Cancelled
from runner.events import Event, Observed, Stage
from tests.support.hosts import Person, read_until, write_context

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

_ALWAYS = {Stage.RESOLVE, Stage.LAUNCH, Stage.BUILD, Stage.PUBLISH}
"""`make test-all` kills at the others, too."""
ENDS_ALONE_SECONDS = 10
"""The first process inside ends when its standard input does, and with it the sandbox."""


def killed_at(person: Person, context: Path, line: str, *, after_seconds: float = 0) -> str:
    """The id of a build whose runner was killed when its events had come to ``line``."""
    with person.start("submit", "--json", context) as process:
        started = json.loads(read_until(process, process.stdout, '"event": "started"'))
        read_until(process, process.stdout, line)
        time.sleep(after_seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    build_id: str = started["build_id"]
    return build_id


def assert_ends_alone(person: Person) -> None:
    person.assert_nothing_left(ENDS_ALONE_SECONDS, kinds=("process", "mount"))


@pytest.fixture(scope="module")
def context(playground: Path, tools_base: str) -> Path:
    steps = f"FROM {tools_base}\nRUN echo here; sleep 0.5\n"
    return write_context(playground / "killed", steps)


@pytest.fixture(scope="module")
def finished(person: Person, context: Path) -> str:
    """The id of a build that ended well before: gc has no business with it."""
    ran = person.run("submit", "--json", context)
    assert ran.status == 0, ran.stderr
    build_id: str = ran.events("started")[0]["build_id"]
    return build_id


@pytest.mark.parametrize(
    "stage",
    [stage if stage in _ALWAYS else pytest.param(stage, marks=pytest.mark.slow) for stage in Stage],
)
def test_killed_at_a_stage_nothing_is_left_after_gc(
    person: Person, context: Path, finished: str, stage: Stage
) -> None:
    build_id = killed_at(person, context, f'"stagestarted", "stage": "{stage}"')
    assert_ends_alone(person)
    ran = person.run("gc")
    assert ran.status == 0, ran.stderr
    person.assert_nothing_left()
    assert not (person.home.builds / build_id).exists()
    assert (person.home.builds / finished / "image/index.json").is_file()


@pytest.mark.parametrize("after_seconds", [0.03, 0.06, 0.1, 0.2])
def test_killed_while_the_sandbox_starts_nothing_is_left_after_gc(
    person: Person, context: Path, after_seconds: float
) -> None:
    killed_at(person, context, '"stage": "launch"', after_seconds=after_seconds)
    assert_ends_alone(person)
    assert person.run("gc").status == 0
    person.assert_nothing_left()


@pytest.mark.parametrize("who", ["person", "stranger"])
def test_killed_while_it_builds_the_sandbox_ends_by_itself(
    request: pytest.FixtureRequest, who: str, place: Path, tools_base: str
) -> None:
    somebody: Person = request.getfixturevalue(who)
    steps = f"FROM {tools_base}\nRUN (sleep 600 &); trap '' TERM HUP; echo here; sleep 600\n"
    context = write_context(place / "context", steps)
    seconds = random.uniform(0, 2)
    killed_at(somebody, context, '"text": "here', after_seconds=seconds)
    assert_ends_alone(somebody)


def test_after_gc_the_next_build_works(person: Person, context: Path) -> None:
    killed_at(person, context, '"text": "here')
    first = person.run("gc")
    assert first.status == 0, first.stderr
    assert "removed" in first.stderr
    assert person.run("submit", context).status == 0
    person.assert_nothing_left()
    again = person.run("gc")
    assert again.stderr == f"{'gc':<10} 0 removed\n"


def test_gc_leaves_a_build_that_runs_alone(person: Person, context: Path) -> None:
    with person.start("submit", "--json", context) as process:
        read_until(process, process.stdout, '"text": "here')
        assert person.run("gc").stderr == f"{'gc':<10} 0 removed\n"
        process.communicate(timeout=60)
    assert process.returncode == 0
    person.assert_nothing_left()


@pytest.mark.parametrize("fault", [RuntimeError("whoever listened is gone"), None])
def test_what_goes_wrong_between_launch_and_build_leaves_no_sandbox(
    person: Person, context: Path, fault: Exception | None
) -> None:
    """Whatever is raised there, nobody waits for the sandbox any more."""
    cancellation = Cancellation()

    def interfere(event: Event) -> None:
        if isinstance(event, Observed):
            cancellation.cancel()
            if fault is not None:
                raise fault

    with pytest.raises(RuntimeError if fault is not None else Cancelled):
        person.submit(context, listen=interfere, cancellation=cancellation)
    assert [each.name for each in threading.enumerate() if each.name.startswith("sandbox")] == []
    person.assert_nothing_left()
