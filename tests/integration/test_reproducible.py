"""With ``--reproducible``, no clock and no place shows in an image: it has one digest."""

import json
import time
from pathlib import Path

import pytest

from runner.errors import UsageError
from tests.support.hosts import Built, Person, write_context

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

DOCKERFILE = """\
ARG BASE
FROM ${BASE} AS made
WORKDIR /src
COPY file .
RUN mkdir -p deep/er && cp file deep/er/copy && ln file linked && ln -s file link
FROM ${BASE}
ENV WHEN=never
COPY --from=made /src /src
COPY --chmod=600 file /a/new/directory/
RUN echo made >/made && chmod 4755 /made && chown 12:34 /src/file && rm /a/new/directory/file
LABEL org.example.label=x
CMD ["/bin/true"]
"""


def context(place: Path) -> Path:
    return write_context(place / "context", DOCKERFILE, file="x")


def twice(person: Person, made: Path, base: str, *, reproducible: bool) -> list[Built]:
    """Two builds that begin in different seconds."""
    built = []
    for _ in range(2):
        args = {"BASE": base}
        built.append(person.submit(made, build_args=args, reproducible=reproducible))
        time.sleep(1.1)
    return built


def test_two_reproducible_builds_have_one_digest(
    person: Person, place: Path, tools_base: str
) -> None:
    builds = twice(person, context(place), tools_base, reproducible=True)
    assert len({built.result.digest for built in builds}) == 1
    for built in builds:
        recorded = person.home.builds / built.result.build_id / "result.json"
        assert json.loads(recorded.read_bytes())["reproducible"] is True


def test_without_the_option_their_digests_differ(
    person: Person, place: Path, tools_base: str
) -> None:
    builds = twice(person, context(place), tools_base, reproducible=False)
    assert len({built.result.digest for built in builds}) == 2
    assert not any(built.result.reproducible for built in builds)


def test_who_builds_it_does_not_show(
    person: Person, stranger: Person, place: Path, tools_base: str
) -> None:
    """As root with a range of host uids, and as an ordinary user with one; by the command line."""
    made, found = context(place), set()
    for number, who in enumerate((person, stranger)):
        ran = who.having(SOURCE_DATE_EPOCH=str(number)).run(
            "submit", "--untrusted", "--reproducible", f"--build-arg=BASE={tools_base}", made
        )
        assert ran.status == 0, ran.stderr
        found.add(ran.stdout)
    assert len(found) == 1


def test_the_environment_makes_no_build_reproducible(
    person: Person, place: Path, tools_base: str
) -> None:
    made, who = context(place), person.having(SOURCE_DATE_EPOCH="0")
    arguments = ("submit", "--untrusted", f"--build-arg=BASE={tools_base}", made)
    one, other = (who.run(*arguments) for _ in range(2))
    assert (one.status, other.status) == (0, 0), one.stderr + other.stderr
    assert one.stdout != other.stdout


def test_what_buildah_cannot_reproduce_is_refused_before_anything_is_fetched(
    person: Person, place: Path
) -> None:
    dockerfile = 'FROM registry.example/never:asked\nSHELL ["/bin/sh"]\nHEALTHCHECK CMD true\n'
    made = write_context(place / "context", dockerfile)
    with pytest.raises(UsageError, match=r"and the Dockerfile .* has HEALTHCHECK, SHELL") as caught:
        person.submit(made, reproducible=True)
    assert caught.value.advice == "Leave out --reproducible, or those instructions."
