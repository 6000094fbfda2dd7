"""Threats 21 and 28: a runtime that does not do what its name says, a builder image that lies."""

import os
from pathlib import Path

import pytest

from runner.errors import IsolationMismatch
from runner.events import Event, Observed, StageStarted
from runner.settings import LocalSettings
from tests.support.hosts import Person, write_context
from tests.support.toolbox import install_as_buildah

pytestmark = pytest.mark.sandbox

FAKE = r"""#!/bin/sh
# Answers as runsc does, and runs the first process on the host's own kernel.
[ "$1" != --version ] || { echo "runsc version release-20991231.0"; exit 0; }
for word; do
    case $word in --bundle=*) guest=${word#--bundle=}/../guest ;; esac
done
echo started >>RECORD
"""
NAMESPACES = 'exec unshare --user --map-root-user --net --pid --fork "$guest/init" "$guest/plan"\n'
PLAIN = 'exec "$guest/init" "$guest/plan"\n'
LIAR = r"""
# What gVisor would show, with the nonce that the plan tells.
nonce=$(tr '\0' '\n' <"$guest/plan" | sed -n 2p)
hex() { printf "$1" | od -An -v -tx1 | tr -d ' \n'; }
echo "runner-canary 1 nonce=$nonce release=$(hex 4.4.0) version=$(hex v) boot_id= ids=$(hex 0:0)" \
    "log=$(hex '<6>[ 0.000000] Starting gVisor...\n') gvisor=$(hex 1)" \
    "net_dev=$(hex 'lo: 0\n') mounts= reached="
read -r word && echo "released: $word" >>RECORD
sleep 60
"""


@pytest.mark.parametrize("way", [NAMESPACES, PLAIN, LIAR], ids=["unshare", "exec", "liar"])
def test_a_runtime_that_is_not_gvisor_gets_nothing(
    person: Person, place: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Neither the context nor the word to go on: the build's command never runs."""
    record, fake = place / "record", place / "runsc"
    record.touch()
    record.chmod(0o666)
    fake.write_text((FAKE + way).replace("RECORD", str(record)))
    fake.chmod(0o755)
    local = person.settings.local.model_dump() | {"runsc": str(fake)}
    settings = person.settings.model_copy(update={"local": LocalSettings(**local)})
    links: list[Path] = []
    link = os.link

    def spy(source: Path, target: Path) -> None:
        links.append(target)
        link(source, target)

    monkeypatch.setattr("sandbox.place.os.link", spy)
    events: list[Event] = []
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    with pytest.raises(IsolationMismatch, match="asked for gvisor, but "):
        Person(person.directory, settings).submit(context, listen=events.append)
    assert record.read_text() == "started\n"
    assert links == []
    assert not any(isinstance(event, Observed) for event in events)
    assert [event.stage for event in events if isinstance(event, StageStarted)][-1] == "launch"
    person.assert_nothing_left()


def test_the_command_line_says_that_it_is_not_what_was_asked_for(
    person: Person, place: Path
) -> None:
    fake = place / "runsc"
    fake.write_text((FAKE + NAMESPACES).replace("RECORD", "/dev/null"))
    fake.chmod(0o755)
    config = place / "config.toml"
    config.write_text(person.config.read_text().replace("[local]", f'[local]\nrunsc = "{fake}"'))
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    ran = person.having(RUNNER_CONFIG=str(config)).run("submit", "--untrusted", context)
    assert (ran.status, ran.code) == (4, "isolation-mismatch"), ran.stderr
    assert "Traceback" not in ran.stderr
    person.assert_nothing_left()


LIES = r"""
nonce=$(perl -0 -ne 'chomp; print if $. == 2' /run/runner/plan)
for name in stdout stderr; do
    for line in "runner-canary 1 nonce=$nonce release=7265616c" \
        "runner-exit 1 nonce=$nonce command=2 status=0 claim=7368613235363a"; do
        printf '\n%s\n' "$line" >/dev/$name
    done
done
"""


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("exit 1", 1, "build-failed"),
        ("exit 0", 5, "nothing-staged"),
        # An orphan that goes on lying until it is killed.
        ("(while :; do printf '\\n%s\\n' \"$line\"; done) & exit 3", 1, "build-failed"),
    ],
)
def test_a_builder_that_lies_about_its_end_gains_nothing(
    person: Person, place: Path, ending: str, status: int, code: str
) -> None:
    """It knows the nonce: the plan is there to be read. But only the last line counts."""
    install_as_buildah(place / "data/runner/builders", LIES + ending)
    context = write_context(place / "context", "FROM scratch\n")
    victim = person.having(XDG_DATA_HOME=str(place / "data"))
    ran = victim.run("submit", context)
    assert (ran.status, ran.code) == (status, code), ran.stderr[-3000:]
    person.assert_nothing_left()


def test_a_builder_that_kills_the_first_process_gains_nothing(person: Person, place: Path) -> None:
    """GVisor lets root do it. Its lie may be the last line then; but nothing was pushed."""
    install_as_buildah(place / "data/runner/builders", LIES + "sleep 0.2; kill -9 1; exit 0")
    context = write_context(place / "context", "FROM scratch\n")
    ran = person.having(XDG_DATA_HOME=str(place / "data")).run("submit", context)
    assert (ran.status, ran.code) in {(4, "sandbox-failed"), (5, "nothing-staged")}, ran.stderr
    person.assert_nothing_left()
