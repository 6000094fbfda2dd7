"""Dockerfiles by which the reader is judged, each in a directory with what is expected of it.

``Dockerfile`` holds the bytes as they are. ``expected.json`` says::

    about       what the file is an example of
    build_args  that it is built with (may be missing, like the next)
    target      stage to build
    facts       what the reader finds, fact by fact, without those that are empty; ``unknown`` are
                the facts that it calls incomplete
    error       instead of facts: a part of the message with which the reader refuses the file
    buildah     ``builds``, or ``fails``
    because     why the reader refuses what buildah builds
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.dockerfile import read_dockerfile
from policies.facts import DockerfileFacts

_FACTS = (
    *("images", "remote_adds", "mounts", "networks", "securities", "secrets", "build_args"),
    "docker_only",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One directory; see above."""

    name: str
    dockerfile: bytes
    build_args: Mapping[str, str]
    target: str | None
    facts: Mapping[str, list[str]] | None
    error: str | None
    builds: bool
    because: str | None

    def read(self) -> DockerfileFacts:
        """What the reader makes of it. Raises its errors."""
        return read_dockerfile(self.dockerfile, build_args=self.build_args, target=self.target)


def shown(facts: DockerfileFacts) -> dict[str, list[str]]:
    """``facts`` in the form of ``expected.json``."""
    found = {name: sorted(map(str, getattr(facts, name))) for name in _FACTS}
    found["frontend"] = [facts.frontend] if facts.frontend else []
    found["unknown"] = sorted({fact for unknown in facts.unknown for fact in unknown.facts})
    return {name: values for name, values in found.items() if values}


def _case(directory: Path) -> Case:
    document = json.loads((directory / "expected.json").read_text(encoding="utf-8"))
    return Case(
        name=directory.name,
        dockerfile=(directory / "Dockerfile").read_bytes(),
        build_args=document.get("build_args", {}),
        target=document.get("target"),
        facts=document.get("facts"),
        error=document.get("error"),
        builds=document["buildah"] == "builds",
        because=document.get("because"),
    )


CASES = [_case(path.parent) for path in sorted(Path(__file__).parent.glob("*/expected.json"))]
