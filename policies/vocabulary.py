"""The facts that a condition can name: each with its type, its meaning and where it comes from.

>>> from policies.facts import BuildFacts
>>> values(BuildFacts())["dockerfile.frontend"]
''
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from policies.facts import BuildFacts, DockerfileFacts, TimeFacts
from policies.reference import ImageReference

Value = str | int | bool | tuple[str, ...]


class Kind(StrEnum):
    """Types of facts, as CEL names them."""

    BOOL = "bool"
    INT = "int"
    STRING = "string"
    LIST = "list(string)"


@dataclass(frozen=True, slots=True)
class Fact:
    """One name of the language.

    Attributes:
        read: Its value, or None where it is unknown.
        meaning: For the reference in docs/policy.md.
    """

    kind: Kind
    read: Callable[[BuildFacts], Value | None]
    meaning: str


def _sorted(values: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted(values))


def _written_out(images: Iterable[ImageReference]) -> tuple[str, ...]:
    """With the tag that stands for none, so that no condition has to think of it."""
    return tuple(str(image.explicit()) for image in images)


def _dockerfile(
    attribute: str, read: Callable[[DockerfileFacts], Value]
) -> Callable[..., Value | None]:
    """Unknown where something unreadable could change it."""

    def value(facts: BuildFacts) -> Value | None:
        spoiled = any(attribute in unknown.facts for unknown in facts.dockerfile.unknown)
        return None if spoiled else read(facts.dockerfile)

    return value


def _time(read: Callable[[TimeFacts], Value]) -> Callable[[BuildFacts], Value | None]:
    return lambda facts: None if facts.time is None else read(facts.time)


def _set(attribute: str) -> Callable[[BuildFacts], Value | None]:
    return _dockerfile(attribute, lambda d: _sorted(getattr(d, attribute)))


_B, _I, _S, _L = Kind.BOOL, Kind.INT, Kind.STRING, Kind.LIST

FACTS: Mapping[str, Fact] = MappingProxyType({
    "identity.kind": Fact(_S, lambda f: f.identity.kind,
        "Who vouches for the identity: `unix`, the kernel of this host; empty for nobody."),
    "identity.name": Fact(_S, lambda f: f.identity.name, "Who asks: the user's login name."),
    "identity.authenticated": Fact(_B, lambda f: f.identity.authenticated,
        "Whether anybody vouches for the identity."),
    "tenant": Fact(_S, lambda f: f.tenant,
        "On whose behalf the identity builds (`--tenant`). Unknown where nobody said."),
    "source.kind": Fact(_S, lambda f: f.source.kind, "How the source came: `directory`."),
    "source.url": Fact(_S, lambda f: f.source.url,
        "Of the repository, without user-info. Unknown where nobody said, as all of `source`."),
    "source.ref": Fact(_S, lambda f: f.source.ref, "Full name, such as `refs/heads/main`."),
    "source.pull_request": Fact(_B, lambda f: f.source.pull_request,
        "Whether it is a proposed change."),
    "source.fork": Fact(_B, lambda f: f.source.fork,
        "Whether it comes from somebody else's repository."),
    "source.signed": Fact(_B, lambda f: f.source.signed,
        "Whether the commit has a signature that somebody checked."),
    "dockerfile.frontend": Fact(_S, _dockerfile("frontend", lambda d: d.frontend or ""),
        "What `# syntax=` or `BUILDKIT_SYNTAX` names; empty for nothing."),
    "dockerfile.images": Fact(_L, _dockerfile("images", lambda d: _written_out(d.images)),
        "Every image that FROM, `COPY --from` or `RUN --mount=from=` names, written out with "
        "its tag or digest: `docker.io/library/debian:12`."),
    "dockerfile.remote_adds": Fact(_L, _dockerfile("remote_adds", lambda d: d.remote_adds),
        "URLs and Git repositories that ADD names."),
    "dockerfile.mounts": Fact(_L, _set("mounts"), "Kinds of `RUN --mount`."),
    "dockerfile.networks": Fact(_L, _set("networks"), "Values of `RUN --network`."),
    "dockerfile.securities": Fact(_L, _set("securities"), "Values of `RUN --security`."),
    "dockerfile.secrets": Fact(_L, _set("secrets"), "Ids of `RUN --mount=type=secret`."),
    "dockerfile.build_args": Fact(_L, _set("build_args"), "Names that ARG declares."),
    "dockerfile.onbuild": Fact(_B, _dockerfile("docker_only", lambda d: "ONBUILD" in d.docker_only),
        "Whether it has ONBUILD instructions of its own."),
    "dockerfile.unknown": Fact(_L, lambda f: tuple(u.sentence for u in f.dockerfile.unknown),
        "What could not be determined, a sentence each."),
    "base.onbuild": Fact(_L, lambda f: f.base.onbuild,
        "ONBUILD instructions of the base images. Open until these are resolved."),
    "context.bytes": Fact(_I, lambda f: f.context.bytes, "Of the context's files together."),
    "context.entries": Fact(_I, lambda f: f.context.entries, "Files, directories and links."),
    "context.links_leaving": Fact(_L, lambda f: f.context.links_leaving,
        "Symbolic links that point out of the context."),
    "destinations": Fact(_L, lambda f: _written_out(f.destinations),
        "Where the result is to go, written out."),
    "builder.name": Fact(_S, lambda f: f.builder.name, "The builder that was asked for."),
    "builder.digest": Fact(_S, lambda f: f.builder.digest,
        "Of its root filesystem. Unknown where it is not installed."),
    "request.untrusted": Fact(_B, lambda f: f.request.untrusted, "Whether it says `--untrusted`."),
    "request.backend": Fact(_S, lambda f: f.request.backend,
        "The backend: the one that was asked for, or each in turn."),
    "request.platform": Fact(_S, lambda f: f.request.platform, "Of the image: `linux/amd64`."),
    "request.target": Fact(_S, lambda f: f.request.target,
        "The stage to build; empty for the last."),
    "request.build_args": Fact(_L, lambda f: f.request.build_args,
        "Names that `--build-arg` gives values for."),
    "request.wall_seconds": Fact(_I, lambda f: f.request.wall_seconds or 0,
        "What `--timeout` asks for; 0 for as much as there is, as in the next two."),
    "request.memory_bytes": Fact(_I, lambda f: f.request.memory_bytes or 0, "`--memory`."),
    "request.cpu_millis": Fact(_I, lambda f: f.request.cpu_millis or 0,
        "`--cpus`, in thousandths."),
    "host.isolations": Fact(_L, lambda f: tuple(map(str, sorted(f.host.isolations))),
        "Isolations that the backend was seen to offer."),
    "time.date": Fact(_S, _time(lambda t: t.date), "In UTC, `YYYY-MM-DD`."),
    "time.hour": Fact(_I, _time(lambda t: t.hour), "In UTC, 0 to 23."),
    "time.weekday": Fact(_I, _time(lambda t: t.weekday), "1 for Monday to 7 for Sunday, in UTC."),
})  # fmt: skip

TRUST = "trust"
"""Decided by the ``trusted`` rules, and then a fact of its own for all others."""


def values(facts: BuildFacts) -> dict[str, Value]:
    """What is known, by name. Facts that are unknown are not in it."""
    known = ((name, fact.read(facts)) for name, fact in FACTS.items())
    return {name: value for name, value in known if value is not None}
