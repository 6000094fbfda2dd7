"""YAML that is plain data, and where each piece of it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from policies.errors import PolicyInvalid

Path = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value starts, from 1.

    Attributes:
        text: Line and column of its first character where it is a text that stands as it is:
            in one line, or in a literal block; None where columns cannot be told.
    """

    line: int
    column: int
    text: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """A document and its marks, by path."""

    value: Any
    marks: Mapping[tuple[str | int, ...], Mark]
    source: str

    def mark(self, path: Path) -> Mark:
        """Of the value at ``path``, or of the innermost there is around it."""
        for length in range(len(path), -1, -1):
            if (found := self.marks.get(tuple(path[:length]))) is not None:
                return found
        return Mark(1, 1)

    def error(
        self, path: Path, message: str, within: tuple[int, int] | None = None
    ) -> PolicyInvalid:
        """An error about the value at ``path``.

        Args:
            path: Keys and indices.
            message: What is wrong with it.
            within: Line and column inside its text, from 1.
        """
        mark = self.mark(path)
        line, column = mark.line, mark.column
        if within is not None and mark.text is not None:
            line, column = mark.text[0] + within[0] - 1, mark.text[1] + within[1] - 1
        return PolicyInvalid(f"{self.source}:{line}:{column}: {message}")


class _Loader(yaml.SafeLoader):
    """Safe, with text for keys, none of them twice.

    Without aliases, which can grow without bound, and without tags, which the loader trusts to
    suit their values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - untyped upstream
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if self.peek_event().tag is not None:  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("tags are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: ANN401 - upstream's signature
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise yaml.YAMLError(f"duplicate key or no text: {key!r} at {key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(data: bytes, source: str) -> Marked:
    """Reads one YAML document.

    Raises:
        PolicyInvalid: Not UTF-8, no YAML, or more of YAML than plain data needs.
    """
    try:
        loader = _Loader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
        marks: dict[tuple[str | int, ...], Mark] = {}
        _mark(node, (), marks, data.decode().split("\n"))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        where = f":{at.line + 1}:{at.column + 1}" if at is not None else ""
        raise PolicyInvalid(f"{source}{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: no UTF-8, and what only looks like a date or a number, such as 2026-13-45.
        raise PolicyInvalid(f"{source}: {error}") from None
    return Marked(value, marks, source)


def _mark(
    node: Any,  # noqa: ANN401 - untyped upstream
    path: tuple[str | int, ...],
    marks: dict[tuple[str | int, ...], Mark],
    lines: Sequence[str],
) -> None:
    if node is None:
        return
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    text = None
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark(value, (*path, key.value), marks, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _mark(value, (*path, index), marks, lines)
    elif node.style == "|":
        indent = _indent_after(lines, line)
        text = (line + 1, indent + 1) if indent is not None else None
    elif node.start_mark.line == node.end_mark.line:
        text = (line, column + (node.style in {"'", '"'}))
    marks[path] = Mark(line, column, text)


def _indent_after(lines: Sequence[str], line: int) -> int | None:
    """Of the first line below that is not empty."""
    for number in range(line, len(lines)):
        if lines[number].strip():
            return len(lines[number]) - len(lines[number].lstrip())
    return None
