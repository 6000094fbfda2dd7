"""What a Dockerfile asks for, read without running anything of it.

    >>> facts = read_dockerfile(b"FROM debian:12", build_args={}, target=None)
    >>> [str(image) for image in facts.images]
    ['docker.io/library/debian:12']

This informs policy; it does not enforce anything. What only shows while building is decided when
the gateway is asked, so a builder that reads a line differently gains nothing.

What base images bring along counts once they are known (``bases``).
"""

import posixpath
import re
from collections.abc import Mapping
from types import MappingProxyType

from builder.bases import BaseImage, instructions
from builder.dockerfile_lexer import (
    ARGUMENT_SPACE,
    Instruction,
    invalid,
    is_heredoc,
    json_form,
    quoted,
    read_source,
    split_words,
)
from builder.errors import DockerfileInvalid, StageUnknown
from builder.variables import Expansion, Values, Variables, platform_arguments
from policies.errors import InvalidReference
from policies.facts import DockerfileFacts, Stage, Unknown
from policies.reference import ImageReference

_STAGES = 1000
_NAMES = 2000
"""That ENV sets. Stages copy those of their base: more would cost more than linear time."""
_UNKNOWN = 200
"""Sentences kept."""
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9_./:+-]{1,255}")
"""Of a variable. Quotes and variables in it are read differently by builders."""
_FROM_WORDS = 3
_COPY_WORDS = 2
_HARMLESS_FLAGS = frozenset(
    {"--checksum", "--chmod", "--chown", "--exclude", "--keep-git-dir", "--link", "--parents"}
    | {"--unpack"}
)
_IMAGES = frozenset({"images"})
_ADDED = frozenset({"remote_adds"})
_MOUNTED = frozenset({"images", "mounts", "secrets"})
_RUN = _MOUNTED | {"networks", "securities"}
_SECRETS = frozenset({"secrets"})
_ANY = _RUN | _ADDED | {"build_args", "docker_only"}
"""What an instruction that nobody sees could ask for."""
_CHOICES = {
    "mounts": ("kind of mount", frozenset({"bind", "cache", "secret", "ssh", "tmpfs"})),
    "networks": ("network", frozenset({"default", "host", "none"})),
    "securities": ("security mode", frozenset({"insecure", "sandbox"})),
}
_MOUNT_KEY = re.compile(r"[A-Za-z-]*")
_SIMPLE_VARIABLE = re.compile(r"\$(?:[A-Za-z_][A-Za-z0-9_]*+|\{[A-Za-z_][A-Za-z0-9_]*+\})")
_LOCAL = re.compile(r"[^:@$/]*+/")
"""How a source of ADD starts that is local whatever its variables stand for."""
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
    bases: Mapping[ImageReference, BaseImage | None] = MappingProxyType({}),
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
        bases: What was read of base images; None for one that cannot be read.

    Raises:
        DockerfileInvalid: Outside the grammar, or an image's name is; with the line.
        StageUnknown: ``target`` names no stage.
    """
    source = read_source(data)
    variables = Variables(source.escape, build_args, platform_arguments(platform))
    frontend = build_args.get("BUILDKIT_SYNTAX") or source.frontend
    doubtful = [Unknown(_ANY, sentence) for sentence in source.doubtful]
    reader = _Reader(variables, platform, bases, doubtful)
    for instruction in source.instructions:
        reader.read(instruction)
    if not reader.stages:
        raise DockerfileInvalid("the Dockerfile has no FROM")
    if target is not None and target.lower() not in reader.numbers:
        raise StageUnknown(f"the Dockerfile has no stage {quoted(target)}")
    return reader.facts(frontend)


class _Reader:
    """Goes through the instructions once and keeps what policy asks about."""

    def __init__(
        self,
        variables: Variables,
        platform: str,
        bases: Mapping[ImageReference, BaseImage | None],
        unknown: list[Unknown],
    ) -> None:
        self._variables = variables
        self._platform = platform
        self._bases = bases
        self._unknown = unknown
        self.stages: list[Stage] = []
        self.numbers: dict[str, int] = {}
        """Of stages by name in lower case, and by number."""
        self._written: set[str] = set()
        """The same as they were written: buildah tells upper case from lower."""
        self._images: dict[ImageReference, None] = {}
        self._remote_adds: dict[str, None] = {}
        self._chosen: dict[str, set[str]] = {fact: set() for fact in _CHOICES}
        self._secrets: set[str] = set()
        self._docker_only: set[str] = set()
        self._names: set[str] = set()

    def facts(self, frontend: str | None) -> DockerfileFacts:
        kept, dropped = self._unknown[:_UNKNOWN], self._unknown[_UNKNOWN:]
        if dropped:
            spoiled = frozenset[str]().union(*(unknown.facts for unknown in dropped))
            sentence = f"{len(dropped)} more things could not be determined."
            kept.append(Unknown(spoiled, sentence))
        return DockerfileFacts(
            frontend=frontend,
            stages=tuple(self.stages),
            images=tuple(self._images),
            remote_adds=tuple(self._remote_adds),
            mounts=frozenset(self._chosen["mounts"]),
            networks=frozenset(self._chosen["networks"]),
            securities=frozenset(self._chosen["securities"]),
            secrets=frozenset(self._secrets),
            build_args=frozenset(self._names),
            docker_only=frozenset(self._docker_only),
            unknown=tuple(kept),
        )

    def read(self, instruction: Instruction) -> None:
        """Takes one instruction in. Raises DockerfileInvalid."""
        if not self.stages and instruction.name not in {"ARG", "FROM"}:
            raise invalid(instruction.line, f"{instruction.name} before the first FROM")
        self._variables.triggered = instruction.trigger is not None
        if self._variables.triggered:
            self._docker_only.add("ONBUILD")
        inner = instruction.trigger or instruction
        match inner.name:
            case "FROM":
                self._from(inner)
            case "ARG":
                self._arg(inner)
            case "ENV":
                self._env(inner)
            case "COPY" | "ADD":
                self._copy(inner)
            case "RUN":
                self._run(inner)
            case "HEALTHCHECK" | "SHELL":
                self._docker_only.add(inner.name)
            case _:
                pass

    # -- stages and variables ----------------------------------------------------------------

    def _from(self, instruction: Instruction) -> None:
        line, words = instruction.line, instruction.words
        if len(words) not in {1, _FROM_WORDS} or (len(words) > 1 and words[1].lower() != "as"):
            raise invalid(line, "FROM takes an image, or IMAGE AS NAME")
        if len(self.stages) == _STAGES:
            raise invalid(line, f"more than {_STAGES} stages")
        foreign = True in [self._is_foreign(flag, line) for flag in instruction.flags]
        written = words[2] if len(words) > 1 else None
        name = written.lower() if written is not None else None
        if name is not None and not _STAGE_NAME.fullmatch(name):
            raise invalid(line, f"{quoted(words[2])} cannot name a stage")
        if name in self.numbers:
            self._doubt(line, _ANY, f"which stage {quoted(words[2])} is")
        expansion = self._base(words[0], line)
        base, lower = expansion.text, expansion.text.lower()
        if expansion.missing or base == "scratch" or (lower in self.numbers and not base.isdigit()):
            image = None
        else:
            image = self._image(base, line)
        self._variables.enter_stage(name, None if expansion.missing else lower)
        number = len(self.stages)
        self.stages.append(Stage(name=name, base=base, image=image, line=line, foreign=foreign))
        self.numbers |= {str(number): number} | ({name: number} if name else {})
        self._written |= {str(number), written or str(number)}
        if image is not None and image in self._bases:
            self._inherit(None if foreign else self._bases[image], line)

    def _is_foreign(self, flag: str, line: int) -> bool:
        """Whether FROM asks for another platform than the request does, or could."""
        name, _, value = flag.partition("=")
        if name != "--platform":
            raise invalid(line, f"FROM has no flag {quoted(flag)}")
        return self._variables.expand(value, self._variables.outside).text != self._platform

    def _inherit(self, base: BaseImage | None, line: int) -> None:
        """Takes in what the base image of the stage that just began brings along."""
        if base is None:
            self._say(line, _ANY, "what the base image brings along cannot be determined")
            return
        self._variables.inherit(base.environment)
        try:
            for instruction in instructions(base.triggers, line):
                self.read(instruction)
        except DockerfileInvalid:
            self._say(line, _ANY, "an ONBUILD instruction of the base image cannot be determined")

    def _base(self, word: str, line: int) -> Expansion:
        expansion = self._variables.expand(word, self._variables.outside)
        base = expansion.text
        if expansion.missing:
            nothing = {**dict.fromkeys(expansion.missing, ""), **self._variables.outside}
            if not self._variables.expand(word, nothing).text:
                names = ", ".join(map(quoted, expansion.missing[:3]))
                raise invalid(line, f"FROM names no image: no --build-arg gives {names}")
            # Its ENV and ONBUILD are as little known as its name.
            self._note(line, _ANY, "the base image", word, expansion.missing)
        elif base.lower() in self.numbers and (base.isdigit() or base not in self._written):
            self._doubt(line, _ANY, f"whether {quoted(base)} is a stage")
        return expansion

    def _arg(self, instruction: Instruction) -> None:
        words = split_words(instruction.rest, self._variables.escape)
        if not words:
            raise invalid(instruction.line, "ARG needs a name, and closed quotes")
        for word in words:
            name, has_default, default = word.partition("=")
            if not _NAME.fullmatch(name):
                raise invalid(instruction.line, f"ARG cannot declare {quoted(name)}")
            self._names.add(name)
            if self._variables.triggered:
                self._set(name, None, instruction.line)
            else:
                self._variables.declare(name, default if has_default else None)

    def _env(self, instruction: Instruction) -> None:
        words = split_words(instruction.rest, self._variables.escape)
        if not words:
            raise invalid(instruction.line, "ENV needs NAME=VALUE, and closed quotes")
        if "=" not in words[0]:
            words = ["=".join(ARGUMENT_SPACE.split(instruction.rest, maxsplit=1))]
        pairs = [word.partition("=")[::2] for word in words]
        # All values see what stood before this instruction.
        inside = self._variables.inside
        expansions = [self._variables.expand(value, inside) for _, value in pairs]
        for (name, _), expansion in zip(pairs, expansions, strict=True):
            if not _NAME.fullmatch(name):
                raise invalid(instruction.line, f"ENV cannot set {quoted(name)}")
            self._set(name, None if expansion.missing else expansion.text, instruction.line)

    def _set(self, name: str, value: str | None, line: int) -> None:
        self._variables.set(name, value)
        if len(self._variables.set_by_env) > _NAMES:
            raise invalid(line, f"more than {_NAMES} names in ENV")

    # -- what instructions ask for -----------------------------------------------------------

    def _copy(self, instruction: Instruction) -> None:
        line = instruction.line
        for flag in instruction.flags:
            name, equals, value = flag.partition("=")
            if name == "--from" and instruction.name == "COPY":
                self._copied_from(value if equals else "", line)
            elif name not in _HARMLESS_FLAGS:
                self._say(line, _IMAGES | _ADDED, f"the flag {quoted(name)} is not known")
        listed = json_form(instruction.rest)
        words = listed or instruction.words
        if len(words) < _COPY_WORDS:
            raise invalid(line, f"{instruction.name} needs a source and a destination")
        if instruction.name == "ADD":
            for word in words[:-1]:
                if listed or not is_heredoc(word):
                    self._add(word, line)

    def _add(self, word: str, line: int) -> None:
        expansion = self._variables.expand(word, self._variables.inside)
        if _REMOTE.fullmatch(expansion.text):
            self._remote_adds[_USER_INFO.sub("", expansion.text)] = None
        elif not expansion.missing or _LOCAL.match(word):
            return
        if expansion.missing:
            self._note(line, _ADDED, "the source of ADD", word, expansion.missing)

    def _run(self, instruction: Instruction) -> None:
        line = instruction.line
        for flag in instruction.flags:
            name, _, value = flag.partition("=")
            if name == "--mount":
                self._mount(value, line)
            elif name == "--network":
                self._choice("networks", value, line)
            elif name == "--security":
                self._choice("securities", value, line)
            else:
                self._say(line, _RUN, f"the flag {quoted(name)} is not known")

    def _mount(self, value: str, line: int) -> None:
        fields = value.split(",")
        if any(map(self._hides, fields)):
            self._say(line, _MOUNTED, f"the mount {quoted(value)} cannot be determined")
        pairs = [(key.lower(), text) for key, _, text in (f.partition("=") for f in fields)]
        kinds = [text for key, text in pairs if key == "type"] or ["bind"]
        if "secret" in [self._choice("mounts", kind, line) for kind in kinds]:
            self._secret(dict(pairs), line)
        for key, text in pairs:
            if key == "from":
                self._mounted_from(text, line)

    def _hides(self, field: str) -> bool:
        """Whether a field could be more fields, or another, once its variables are replaced.

        BuildKit reads the fields as CSV and then replaces variables; buildah replaces them first
        and then cuts at each comma, quoted or not.
        """
        key, _, _ = field.partition("=")
        expansion = self._variables.expand(field, self._variables.inside)
        return (
            not _MOUNT_KEY.fullmatch(key)
            or "," in expansion.text
            or any(name in self._variables.inside for name in expansion.missing)
            or (bool(expansion.missing) and "$" in _SIMPLE_VARIABLE.sub("", field))
            or (self._variables.triggered and "$" in field)
        )

    def _secret(self, fields: Mapping[str, str], line: int) -> None:
        target = fields.get("target") or fields.get("dst") or fields.get("destination") or ""
        wanted = fields.get("id") or posixpath.basename(target)
        secret = self._known(wanted, self._variables.inside, line, "the id of a secret", _SECRETS)
        if secret:
            self._secrets.add(secret)
        elif not wanted:
            self._say(line, _SECRETS, "the secret that is mounted has no id")

    def _choice(self, fact: str, value: str, line: int) -> str | None:
        what, allowed = _CHOICES[fact]
        spoils = {fact} | (_SECRETS if fact == "mounts" else set())
        known = self._known(value, self._variables.inside, line, f"the {what}", frozenset(spoils))
        if known is None:
            return None
        if known.lower() not in allowed:
            raise invalid(line, f"{quoted(known)} is no {what}")
        self._chosen[fact].add(known.lower())
        return known.lower()

    # -- stages and images that others are copied or mounted from ---------------------------------

    def _copied_from(self, written: str, line: int) -> None:
        """Takes in ``COPY --from=``, in which buildah replaces what ARG declares alone."""
        variables = self._variables
        name = self._other(written, variables.arguments, line)
        if name is None:
            return
        if variables.expand(written, variables.inside).text != name:
            self._doubt(line, _IMAGES, f"what {quoted(written)} stands for")
        self._needs(name, variables.expand(written, variables.planned).text, line)

    def _mounted_from(self, written: str, line: int) -> None:
        name = self._other(written, self._variables.inside, line)
        if name is not None:
            self._needs(name, "" if written.isdigit() else written, line)

    def _other(self, written: str, values: Values, line: int) -> str | None:
        if not written:
            raise invalid(line, "from needs a stage or an image")
        return self._known(written, values, line, "what is copied from", _IMAGES)

    def _needs(self, name: str, planned: str, line: int) -> None:
        """Takes in the name of a stage or image.

        Args:
            name: What it is when the instruction runs.
            planned: What buildah takes it for when it plans which stages to build. One that it
                has not planned it leaves out, and pulls an image of that name.
            line: Of the instruction.
        """
        number = self.numbers.get(name.lower(), len(self.stages) - 1)
        if number == len(self.stages) - 1:
            if name and name != "scratch":
                self._image(name, line)
        elif name not in self._written or name != planned or self._variables.triggered:
            self._doubt(line, _IMAGES, f"whether {quoted(name)} is a stage")

    def _image(self, text: str, line: int) -> ImageReference:
        try:
            image = ImageReference.parse(text)
        except InvalidReference:
            raise invalid(line, f"not an image: {quoted(text)}") from None
        self._images[image] = None
        return image

    # -- what is known and what is not ---------------------------------------------------------

    def _known(
        self, word: str, values: Values, line: int, what: str, spoils: frozenset[str]
    ) -> str | None:
        expansion = self._variables.expand(word, values)
        if expansion.missing:
            self._note(line, spoils, what, word, expansion.missing)
            return None
        return expansion.text

    def _note(
        self, line: int, spoils: frozenset[str], what: str, word: str, missing: tuple[str, ...]
    ) -> None:
        names = ", ".join(name[:100] for name in missing[:3])
        self._say(line, spoils, f"{what} {quoted(word)} cannot be determined ({names})")

    def _doubt(self, line: int, spoils: frozenset[str], what: str) -> None:
        self._say(line, spoils, f"builders differ on {what}")

    def _say(self, line: int, spoils: frozenset[str], what: str) -> None:
        self._unknown.append(Unknown(spoils, f"Line {line}: {what}."))
