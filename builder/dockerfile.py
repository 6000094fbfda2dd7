"""What a Dockerfile asks for, read without running anything of it.

    >>> facts = read_dockerfile(b"FROM debian:12", build_args={}, target=None)
    >>> [str(image) for image in facts.images]
    ['docker.io/library/debian:12']

This informs policy; it does not enforce anything. What only shows while building is decided when
the gateway is asked, so a builder that reads a line differently gains nothing.
"""

import csv
import posixpath
import re
from collections import ChainMap
from collections.abc import Mapping

from builder.dockerfile_lexer import (
    Instruction,
    Source,
    invalid,
    is_heredoc,
    json_form,
    quoted,
    read_source,
    split_words,
)
from builder.errors import DockerfileInvalid, StageUnknown
from builder.variables import expand
from policies.errors import InvalidReference
from policies.facts import DockerfileFacts, Stage
from policies.reference import ImageReference

_STAGES = 1000
_NAMES = 2000
"""That ENV sets in one stage; each stage that starts from it copies them."""
"""More would make the variables that stages inherit cost more than linear time."""
_UNKNOWN = 200
"""Sentences kept."""
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_NAME_CHARACTERS = 255
_FROM_WORDS = 3
_COPY_WORDS = 2
_MOUNTS = frozenset({"bind", "cache", "secret", "ssh", "tmpfs"})
_NETWORKS = frozenset({"default", "host", "none"})
_SECURITIES = frozenset({"insecure", "sandbox"})
_HARMLESS_FLAGS = frozenset(
    {"--checksum", "--chmod", "--chown", "--exclude", "--keep-git-dir", "--link", "--parents"}
    | {"--unpack"}
)
_REMOTE = re.compile(
    r"[a-z][a-z0-9+.-]*+://.*|[\w.-]++@[\w.-]++:.*|github\.com/.*|[^#]*\.git(?:#.*)?",
    re.IGNORECASE | re.DOTALL,
)
_USER_INFO = re.compile(r"(?<=://)[^/@]*+@")


def read_dockerfile(
    data: bytes,
    *,
    build_args: Mapping[str, str],
    target: str | None,
    platform: str = "linux/amd64",
) -> DockerfileFacts:
    """Reads a Dockerfile of at most 1 MiB, in linear time.

    The facts are the worst case: every stage counts, also one that ``target`` does not need, and
    triggers of ONBUILD count as if they ran here.

    Args:
        data: The file.
        build_args: Override the defaults of ARG, and of the predefined platform arguments.
            ``BUILDKIT_SYNTAX`` among them names the frontend, as BuildKit has it.
        target: Name or index of the stage to build.
        platform: Of the image, ``OS/ARCHITECTURE[/VARIANT]``; also taken as the builder's own.

    Raises:
        DockerfileInvalid: Outside the grammar, or an image's name is; with the line.
        StageUnknown: ``target`` names no stage.
    """
    source = read_source(data)
    reader = _Reader(source, build_args, _platform_args(platform, target))
    for instruction in source.instructions:
        reader.read(instruction)
    if not reader.stages:
        raise DockerfileInvalid("the Dockerfile has no FROM")
    if target is not None and target.lower() not in reader.stage_names:
        raise StageUnknown(f"the Dockerfile has no stage {quoted(target)}")
    return reader.facts()


def _platform_args(platform: str, target: str | None) -> dict[str, str]:
    """The arguments that BuildKit and buildah predefine for every FROM."""
    system, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    parts = {"PLATFORM": platform, "OS": system, "ARCH": architecture, "VARIANT": variant}
    return {
        **{f"{side}{key}": value for side in ("TARGET", "BUILD") for key, value in parts.items()},
        "TARGETSTAGE": target or "default",
    }


class _Reader:
    """Goes through the instructions once and keeps what policy asks about."""

    def __init__(
        self, source: Source, build_args: Mapping[str, str], predefined: Mapping[str, str]
    ) -> None:
        self._source = source
        self._build_args = build_args
        self._predefined = {k: build_args.get(k, v) for k, v in predefined.items()}
        self._global = dict(self._predefined)
        """What FROM sees: predefined arguments, and each ARG before the first FROM."""
        self._values: dict[str, str] = {}
        """What the current stage sees: its ARG and ENV."""
        self._environment: dict[str, str] = {}
        """The current stage's ENV alone, which stages built from it inherit."""
        self._environments: dict[str, dict[str, str]] = {}
        self.stages: list[Stage] = []
        self.stage_names: set[str] = set()
        """Names and indices that ``--target`` may use."""
        self._earlier: set[str] = set()
        """Those that stand for a stage in ``--from``: all but the current stage's."""
        self._images: dict[ImageReference, None] = {}
        self._remote_adds: dict[str, None] = {}
        self._mounts: set[str] = set()
        self._networks: set[str] = set()
        self._securities: set[str] = set()
        self._secrets: set[str] = set()
        self._docker_only: set[str] = set()
        self._names: set[str] = set()
        self._unknown = list(source.doubtful)

    def facts(self) -> DockerfileFacts:
        more = len(self._unknown) - _UNKNOWN
        return DockerfileFacts(
            frontend=self._build_args.get("BUILDKIT_SYNTAX") or self._source.frontend,
            stages=tuple(self.stages),
            images=tuple(self._images),
            remote_adds=tuple(self._remote_adds),
            mounts=frozenset(self._mounts),
            networks=frozenset(self._networks),
            securities=frozenset(self._securities),
            secrets=frozenset(self._secrets),
            build_args=frozenset(self._names),
            docker_only=frozenset(self._docker_only),
            unknown=(
                *self._unknown[:_UNKNOWN],
                *([f"{more} more things could not be determined."] if more > 0 else []),
            ),
        )

    def read(self, instruction: Instruction) -> None:
        """Takes one instruction in. Raises DockerfileInvalid."""
        if not self.stages and instruction.name not in {"ARG", "FROM"}:
            raise invalid(instruction.line, f"{instruction.name} before the first FROM")
        inner = instruction.trigger or instruction
        match inner.name:
            case "FROM":
                self._from(inner)
            case "ARG":
                self._arg(inner, declare=inner is instruction)
            case "ENV" if inner is instruction:
                self._env(inner)
            case "COPY" | "ADD":
                self._copy(inner)
            case "RUN":
                self._run(inner)
            case "HEALTHCHECK" | "SHELL":
                self._docker_only.add(inner.name)
            case _:
                pass
        if inner is not instruction:
            self._docker_only.add("ONBUILD")

    def _from(self, instruction: Instruction) -> None:
        line = instruction.line
        words = instruction.rest.split()
        if len(words) not in {1, _FROM_WORDS} or (len(words) > 1 and words[1].lower() != "as"):
            raise invalid(line, "FROM takes an image, or IMAGE AS NAME")
        if len(self.stages) == _STAGES:
            raise invalid(line, f"more than {_STAGES} stages")
        for flag in instruction.flags:
            if not flag.startswith("--platform="):
                raise invalid(line, f"FROM has no flag {quoted(flag)}")
            self._known(flag.partition("=")[2], self._global, line, "the platform")
        name = words[2].lower() if len(words) > 1 else None
        if name is not None and not _STAGE_NAME.fullmatch(name):
            raise invalid(line, f"{quoted(words[2])} cannot name a stage")
        expansion = expand(words[0], self._global, self._source.escape)
        base = expansion.text
        image = None
        if expansion.missing:
            nothing = {**self._global, **dict.fromkeys(expansion.missing, "")}
            if not expand(words[0], nothing, self._source.escape).text:
                names = ", ".join(map(quoted, expansion.missing))
                raise invalid(line, f"FROM names no image: no --build-arg gives {names}")
            self._note(line, "the base image", words[0], expansion.missing)
        elif base != "scratch" and base.lower() not in self._environments:
            image = self._image(base, line)
        self._earlier = set(self.stage_names)
        self.stages.append(Stage(name=name, base=base, image=image, line=line))
        self._environment = dict(self._environments.get(base.lower(), {}))
        self._values = dict(self._environment)
        if name is not None:
            self._environments[name] = self._environment
        self.stage_names |= {str(len(self.stages) - 1)} | ({name} if name else set())

    def _arg(self, instruction: Instruction, *, declare: bool) -> None:
        words = split_words(instruction.rest, self._source.escape)
        if not words:
            raise invalid(instruction.line, "ARG needs a name, and closed quotes")
        for word in words:
            name, has_default, default = word.partition("=")
            if not 0 < len(name) <= _NAME_CHARACTERS:
                raise invalid(instruction.line, f"ARG cannot declare {quoted(name)}")
            self._names.add(name)
            if not declare:
                continue
            scope = self._values if self.stages else self._global
            if name in self._build_args:
                scope[name] = self._build_args[name]
            elif has_default:
                expansion = expand(default, scope, self._source.escape)
                scope.pop(name, None)
                if not expansion.missing:
                    scope[name] = expansion.text
            elif self.stages and name in self._global:
                scope[name] = self._global[name]
            if name in self._environment:  # ENV wins over ARG
                scope[name] = self._environment[name]

    def _env(self, instruction: Instruction) -> None:
        words = split_words(instruction.rest, self._source.escape)
        if not words:
            raise invalid(instruction.line, "ENV needs NAME=VALUE, and closed quotes")
        if "=" not in words[0]:
            words = ["=".join(instruction.rest.split(None, 1))]
        pairs = [word.partition("=")[::2] for word in words]
        # All values see what stood before this instruction.
        expansions = [expand(value, self._values, self._source.escape) for _, value in pairs]
        if len(self._environment) + len(pairs) > _NAMES:
            raise invalid(instruction.line, f"more than {_NAMES} names in ENV")
        for (name, _), expansion in zip(pairs, expansions, strict=True):
            for scope in (self._environment, self._values):
                scope.pop(name, None)
                if not expansion.missing:
                    scope[name] = expansion.text

    def _copy(self, instruction: Instruction) -> None:
        line = instruction.line
        for flag in instruction.flags:
            name, equals, value = flag.partition("=")
            if name == "--from" and instruction.name == "COPY":
                self._other(value if equals else "", line)
            elif name not in _HARMLESS_FLAGS:
                self._unknown.append(f"Line {line}: the flag {quoted(name)} is not known.")
        words = instruction.words
        if len(words) < _COPY_WORDS:
            raise invalid(line, f"{instruction.name} needs a source and a destination")
        if instruction.name == "ADD":
            plain = json_form(instruction.rest) is not None
            for word in words[:-1]:
                if plain or not is_heredoc(word):
                    self._add(word, line)

    def _add(self, word: str, line: int) -> None:
        expansion = expand(word, self._values, self._source.escape)
        if _REMOTE.fullmatch(expansion.text):
            self._remote_adds[_USER_INFO.sub("", expansion.text)] = None
        elif not expansion.missing or not word.lstrip("\"'").startswith("$"):
            return
        if expansion.missing:
            self._note(line, "the source of ADD", word, expansion.missing)

    def _run(self, instruction: Instruction) -> None:
        line = instruction.line
        for flag in instruction.flags:
            name, _, value = flag.partition("=")
            if name == "--mount":
                self._mount(value, line)
            elif name == "--network":
                self._one_of(_NETWORKS, self._networks, value, line, "network")
            elif name == "--security":
                self._one_of(_SECURITIES, self._securities, value, line, "security mode")
            else:
                self._unknown.append(f"Line {line}: the flag {quoted(name)} is not known.")

    def _mount(self, value: str, line: int) -> None:
        try:
            rows = list(csv.reader([value], strict=True))
        except csv.Error:
            raise invalid(line, f"not a mount: {quoted(value)}") from None
        fields: dict[str, str] = {}
        for field in rows[0] if rows else []:
            key, _, text = field.partition("=")
            key = {"dst": "target", "destination": "target"}.get(key.lower(), key.lower())
            fields[key] = text
        kind = fields.get("type", "bind")
        self._one_of(_MOUNTS, self._mounts, kind, line, "kind of mount")
        if "from" in fields:
            self._other(fields["from"], line)
        if kind.lower() == "secret":
            wanted = fields.get("id") or posixpath.basename(fields.get("target", ""))
            secret = self._known(wanted, self._values, line, "the id of a secret")
            if secret:
                self._secrets.add(secret)
            elif not wanted:
                self._unknown.append(f"Line {line}: the secret that is mounted has no id.")

    def _one_of(
        self, allowed: frozenset[str], found: set[str], value: str, line: int, what: str
    ) -> None:
        known = self._known(value, self._values, line, f"the {what}")
        if known is None:
            return
        if known.lower() not in allowed:
            raise invalid(line, f"{quoted(known)} is no {what}")
        found.add(known.lower())

    def _other(self, written: str, line: int) -> None:
        """Takes in what ``--from=`` or ``from=`` names: a stage, or an image."""
        if not written:
            raise invalid(line, "from needs a stage or an image")
        scope = ChainMap(self._values, self._global)
        name = self._known(written, scope, line, "what is copied from")
        if name and name != "scratch" and name.lower() not in self._earlier:
            self._image(name, line)

    def _image(self, text: str, line: int) -> ImageReference:
        try:
            image = ImageReference.parse(text)
        except InvalidReference:
            raise invalid(line, f"not an image: {quoted(text)}") from None
        self._images[image] = None
        return image

    def _known(self, word: str, values: Mapping[str, str], line: int, what: str) -> str | None:
        expansion = expand(word, values, self._source.escape)
        if expansion.missing:
            self._note(line, what, word, expansion.missing)
            return None
        return expansion.text

    def _note(self, line: int, what: str, word: str, missing: tuple[str, ...]) -> None:
        names = ", ".join(missing[:3])
        self._unknown.append(f"Line {line}: {what} {quoted(word)} cannot be determined ({names}).")
