"""What a base image brings into a stage that starts from it: its ENV, and what its ONBUILD runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from builder.dockerfile_lexer import Instruction, invalid, read_source

_ODD = re.compile(r"[\r\n\0]|<<|^\s*#|[\\`]\s*$")
"""Builders join triggers to one file and read that: no line may reach into the next."""


@dataclass(frozen=True, slots=True)
class BaseImage:
    """Of the image's configuration, what the Dockerfile's reader asks for.

    Attributes:
        environment: Wins over ARG in the stage.
        triggers: Instructions that run as if they stood behind FROM; hostile text.
    """

    environment: Mapping[str, str]
    triggers: tuple[str, ...]


def instructions(triggers: Sequence[str], line: int) -> list[Instruction]:
    """The triggers, as instructions that stand at ``line``.

    Raises:
        DockerfileInvalid: One of them cannot be read, or two builders could read it in two ways.
    """
    return [_instruction(trigger, line) for trigger in triggers]


def _instruction(trigger: str, line: int) -> Instruction:
    if _ODD.search(trigger):
        raise invalid(line, "an ONBUILD instruction of the base image is ambiguous")
    source = read_source(trigger.encode("utf-8", "surrogatepass"))
    if source.doubtful or len(source.instructions) != 1:
        raise invalid(line, "an ONBUILD instruction of the base image is ambiguous")
    (instruction,) = source.instructions
    if instruction.name in {"FROM", "MAINTAINER", "ONBUILD"}:
        raise invalid(line, f"{instruction.name} stands in an ONBUILD of the base image")
    return replace(instruction, line=line)
