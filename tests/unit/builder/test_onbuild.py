"""What base images make a build run counts as if the Dockerfile said it."""

from builder.onbuild import with_triggers
from policies.facts import DockerfileFacts
from policies.reference import ImageReference

DEBIAN, OTHER = (ImageReference.parse(name) for name in ("debian:12", "a.b/other:1"))
FACTS = DockerfileFacts(images=(DEBIAN,), mounts=frozenset({"cache"}))


def test_no_triggers_change_nothing() -> None:
    assert with_triggers(FACTS, ()) is FACTS


def test_what_triggers_ask_for_is_added() -> None:
    found = with_triggers(
        FACTS,
        [
            "COPY --from=a.b/other:1 /x /x",
            "RUN --mount=type=secret,id=key --security=insecure cat /run/secrets/key",
            "ADD https://a.b/c /c",
        ],
    )
    assert found.images == (DEBIAN, OTHER)
    assert found.mounts == {"cache", "secret"}
    assert found.secrets == {"key"}
    assert found.securities == {"insecure"}
    assert found.remote_adds == ("https://a.b/c",)
    assert found.unknown == ()


def test_triggers_that_cannot_be_read_leave_everything_unknown() -> None:
    for hostile in (
        "NONSENSE x",
        "FROM debian AS",
        "RUN \0",
        "ONBUILD RUN x\nFROM",
        "x" * (2 << 20),
    ):
        (unknown,) = with_triggers(FACTS, [hostile]).unknown
        assert {"images", "mounts", "securities", "frontend"} <= unknown.facts


def test_a_trigger_whose_image_depends_on_a_variable_leaves_the_images_unknown() -> None:
    found = with_triggers(FACTS, ["COPY --from=$IMAGE /x /x"])
    assert any("images" in unknown.facts for unknown in found.unknown)
