"""What base images bring along counts as if it stood behind FROM, or is unknown."""

from collections.abc import Sequence

import pytest

from builder.bases import BaseImage
from builder.dockerfile import read_dockerfile
from policies.facts import DockerfileFacts
from policies.reference import ImageReference

BASE = ImageReference.parse("a.b/base:1")
EVERYTHING = {"images", "remote_adds", "mounts", "networks", "securities", "secrets"}


def read(
    text: str, *triggers: str, env: dict[str, str] | None = None, **build_args: str
) -> DockerfileFacts:
    base = BaseImage(env or {}, triggers)
    return read_dockerfile(
        f"FROM {BASE}\n{text}".encode(), build_args=build_args, target=None, bases={BASE: base}
    )


def is_doubted(facts: DockerfileFacts) -> bool:
    return any(unknown.facts >= EVERYTHING for unknown in facts.unknown)


def test_what_triggers_ask_for_is_added() -> None:
    found = read(
        "",
        "COPY --from=a.b/other:1 /x /x",
        "RUN --mount=type=secret,id=key --security=insecure cat /run/secrets/key",
        "ADD https://a.b/c /c",
        "HEALTHCHECK NONE",
    )
    assert found.images == (BASE, ImageReference.parse("a.b/other:1"))
    assert found.mounts == {"secret"}
    assert found.secrets == {"key"}
    assert found.securities == {"insecure"}
    assert found.remote_adds == ("https://a.b/c",)
    assert found.docker_only == {"HEALTHCHECK"}
    assert found.unknown == ()


def test_triggers_see_the_stages_and_arguments_of_the_build() -> None:
    text = f"FROM scratch AS first\nFROM {BASE}\nARG U=x\nADD $U /"
    triggers = ("COPY --from=first /x /", "ARG URL=x", "ADD $URL /", "ENV U=https://a.b/u")
    found = read_dockerfile(
        text.encode(), build_args={"URL": "https://a.b/arg"}, target=None,
        bases={BASE: BaseImage({}, triggers)},
    )  # fmt: skip
    assert found.images == (BASE,)
    assert found.remote_adds == ("https://a.b/arg", "https://a.b/u")


@pytest.mark.parametrize(
    "triggers",
    [
        ["# escape=`", "RUN true \\", "ADD https://evil/x /x"],
        ["RUN echo \\", "RUN true", "ADD https://evil/x /x"],
        ["RUN true `"],
        ["RUN x\nADD https://evil/x /x"],
        ["RUN x\rADD https://evil/x /x"],
        ["RUN <<EOF", "ADD https://evil/x /x"],
        ["RUN \0"],
        ["NONSENSE"],
        [""],
        ["FROM a.b/c"],
        ["ONBUILD RUN x"],
        ["MAINTAINER x"],
        ["COPY --from=A/B /x /"],
        ["ADD x"],
        ["RUN \x1c"],
        ["RUN \udcff <<"],
        ["x" * (2 << 20)],
    ],
)
def test_triggers_that_could_be_read_in_two_ways_leave_everything_unknown(
    triggers: Sequence[str],
) -> None:
    assert is_doubted(read("", *triggers))


def test_the_environment_of_the_base_wins_over_arguments() -> None:
    remote = {"URL": "https://a.b/c"}
    for text in ("ARG URL=local\nADD $URL /x", "ADD ${URL:-local} /x"):
        assert read(text).remote_adds == ()
        assert read(text, env=remote).remote_adds == ("https://a.b/c",)
    assert read("ARG T=bind\nRUN --mount=type=$T x", env={"T": "secret"}).mounts == {"secret"}
    assert read("ENV URL=y\nADD $URL /", env=remote).remote_adds == ()


def test_a_stage_inherits_it_from_the_stage_that_it_starts_from() -> None:
    text = f"FROM {BASE} AS one\nFROM one\nARG U=x\nADD $U /".encode()
    base = BaseImage({"U": "https://a.b/c"}, ())
    found = read_dockerfile(text, build_args={}, target=None, bases={BASE: base})
    assert found.remote_adds == ("https://a.b/c",)


def test_a_base_that_cannot_be_read_leaves_everything_unknown() -> None:
    found = read_dockerfile(f"FROM {BASE}".encode(), build_args={}, target=None, bases={BASE: None})
    assert is_doubted(found)


@pytest.mark.parametrize(
    ("flag", "foreign"),
    [("linux/amd64", False), ("$BUILDPLATFORM", False), ("linux/arm64", True), ("$P", True)],
)
def test_a_base_for_another_platform_was_not_looked_at(flag: str, foreign: bool) -> None:
    text = f"FROM --platform={flag} {BASE}".encode()
    base = BaseImage({}, ("RUN x",))
    found = read_dockerfile(text, build_args={}, target=None, bases={BASE: base})
    assert found.stages[0].foreign is foreign
    assert is_doubted(found) is foreign
