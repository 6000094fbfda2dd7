"""What the egress presets of a policy stand for on this host.

A session's rules, when it is opened (and again where its decision changes)::

    rules = expand(decision.grant.egress, settings)    # -> tuple[tuple[EgressRule, ...], ...]
    grant = dataclasses.replace(decision.grant, egress=rules)

Every rule that comes out has ``hosts``. One that stands for a preset keeps its name in ``preset``,
and has the ports of that ecosystem instead of the rule's own. A preset that nothing is known about
becomes one rule without hosts, which allows nothing; ``unknown`` names those, for a warning.

apt, pip and npm have the hosts that these tools are configured with on this host, so that a
company's mirror works; the others those of ``policies/library/egress/``. ``[egress.presets]`` of
our settings wins over both. Names and ports are taken from there, never a user or a password.
"""

import configparser
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from policies import marks
from policies.document import EgressDocument
from policies.model import EgressRule
from runner.settings import Settings

Rules = tuple[tuple[EgressRule, ...], ...]

MOST_FILE_BYTES = 1 << 20
"""A longer configuration file is left out."""
MOST_FILES = 1000
"""In one directory."""
MOST_TARGETS = 256
"""Of one preset."""

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A host, exactly, and a TCP port."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where the tools of this host are configured."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def etc(self, name: str) -> Path:
        return self.root / "etc" / name

    def home(self, name: str) -> Path:
        return Path(self.environ.get("HOME") or "/nonexistent") / name


def expand(egress: Rules, settings: Settings, where: Surroundings = Surroundings()) -> Rules:
    """The same sets of rules, each with its hosts."""
    return tuple(
        tuple(chain.from_iterable(_concrete(rule, settings, where) for rule in rules))
        for rules in egress
    )


def unknown(expanded: Rules) -> tuple[str, ...]:
    """The presets that nothing is known about on this host."""
    rules = chain.from_iterable(expanded)
    return tuple(sorted({rule.preset for rule in rules if rule.preset and not rule.hosts}))


def _concrete(rule: EgressRule, settings: Settings, where: Surroundings) -> tuple[EgressRule, ...]:
    if rule.preset is None:
        return (rule,)
    hosts: dict[int, list[str]] = {}
    for target in targets(rule.preset, settings, where):
        hosts.setdefault(target.port, []).append(target.host)
    if not hosts:
        return (rule,)
    return tuple(
        replace(rule, hosts=tuple(names), ports=(port,)) for port, names in sorted(hosts.items())
    )


def targets(preset: str, settings: Settings, where: Surroundings) -> tuple[Target, ...]:
    """What the preset stands for, in order; none where nothing is known about it."""
    stated = {str(name): hosts for name, hosts in settings.egress.presets.items()}
    if preset in stated:
        found = filter(None, map(target_of, (f"https://{text}" for text in stated[preset])))
    elif preset in _CONFIGURED:
        found = filter(None, map(target_of, _CONFIGURED[preset](where)))
    else:
        return shipped(preset)
    return tuple(sorted(set(found)))[:MOST_TARGETS]


@lru_cache
def shipped(preset: str) -> tuple[Target, ...]:
    """The preset of the library that comes with ``policies``."""
    file = resources.files("policies.library").joinpath("egress", f"{preset}.yaml")
    library = TypeAdapter(tuple[EgressDocument, ...])
    rules = library.validate_python(marks.load(file.read_bytes(), f"egress/{preset}").value)
    return tuple(
        sorted(Target(host, port) for rule in rules for host in rule.hosts for port in rule.ports)
    )


# -- URLs, and what of them counts -------------------------------------------------------------


def target_of(url: str) -> Target | None:
    """Host and port of an HTTP URL; None for any other, or where no policy could name them."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removesuffix(".")
        port = parts.port or _PORTS[parts.scheme]
        EgressDocument(hosts=(host,), ports=(port,))
    except (ValueError, KeyError, ValidationError):
        return None
    return Target(host, port) if not host.startswith("*") else None


# -- what tools are configured with: pure ------------------------------------------------------

_ONE_LINE = re.compile(r"[ \t]*deb(?:-src)?[ \t]+(?:\[[^\]]*\][ \t]*)?(\S+)")
_FIELD = re.compile(r"([!-9;-~]+):[ \t]*(.*)")
_PIP_KEYS = ("index-url", "extra-index-url", "find-links")


def apt_list(text: str) -> Iterator[str]:
    """URLs of the one-line format of sources.list(5)."""
    for line in text.splitlines():
        if match := _ONE_LINE.match(line):
            yield match[1]


def apt_sources(text: str) -> Iterator[str]:
    """URLs of the deb822 format, of all stanzas that are enabled."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if match := _FIELD.match(line):
                name = match[1].lower()
                fields[name] = match[2]
            elif name:
                fields[name] += f" {line}"
        if fields.get("enabled", "yes").strip().lower() not in {"no", "false", "without", "0"}:
            yield from fields.get("uris", "").split()


def pip_config(text: str) -> dict[tuple[str, str], str]:
    """What a file of pip's says about where packages come from, by section and key."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(text)
    except configparser.Error:
        return {}
    return {
        (section, name): value
        for section in parser.sections()
        for key, value in parser.items(section)
        if (name := key.removeprefix("--").replace("_", "-")) in _PIP_KEYS
    }


def npmrc(text: str) -> dict[str, str]:
    """The registries that a file of npm's names, by their key."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        key = key.strip()
        if key == "registry" or (key.startswith("@") and key.endswith(":registry")):
            found[key] = value.strip().strip("\"'")
    return found


# -- where they are configured: this host's files and environment ------------------------------


def _read(path: Path) -> str:
    """The file's text; nothing where it is missing, closed to us, or no file of a sane size."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as stream:
            data = stream.read(MOST_FILE_BYTES + 1)
    except OSError:
        return ""
    return data.decode("utf-8", "replace") if len(data) <= MOST_FILE_BYTES else ""


def _listed(directory: Path, pattern: str) -> list[Path]:
    try:
        return sorted(directory.glob(pattern))[:MOST_FILES]
    except OSError:
        return []


def _apt(where: Surroundings) -> Iterable[str]:
    apt = where.etc("apt")
    parts = apt / "sources.list.d"
    for path in [apt / "sources.list", *_listed(parts, "*.list")]:
        yield from apt_list(_read(path))
    for path in _listed(parts, "*.sources"):
        yield from apt_sources(_read(path))


def _pip(where: Surroundings) -> Iterable[str]:
    """A later file overrides an earlier one, and the environment overrides them all."""
    environ = where.environ
    systems = environ.get("XDG_CONFIG_DIRS") or str(where.etc("xdg"))
    config_home = environ.get("XDG_CONFIG_HOME")
    files = [
        *(Path(environ[name]) for name in ("PIP_CONFIG_FILE",) if environ.get(name)),
        *(Path(directory, "pip", "pip.conf") for directory in systems.split(":") if directory),
        where.etc("pip.conf"),
        where.home(".pip/pip.conf"),
        (Path(config_home) if config_home else where.home(".config")) / "pip" / "pip.conf",
    ]
    if environ.get("PIP_CONFIG_FILE") == os.devnull:  # pip's way to say: no file at all
        files = []
    found: dict[tuple[str, str], str] = {}
    for path in files:
        found |= pip_config(_read(path))
    for key in _PIP_KEYS:
        stated = environ.get(f"PIP_{key.upper().replace('-', '_')}")
        if stated is not None:
            found = {place: value for place, value in found.items() if place[1] != key}
            found["", key] = stated
    return chain.from_iterable(value.split() for value in found.values())


def _npm(where: Surroundings) -> Iterable[str]:
    """A later file overrides an earlier one, and the environment overrides them all."""
    stated = {name.lower(): value for name, value in where.environ.items() if value}
    system = stated.get("npm_config_globalconfig")
    user = stated.get("npm_config_userconfig")
    files = [
        *([Path(system)] if system else [where.etc("npmrc"), where.root / "usr/local/etc/npmrc"]),
        Path(user) if user else where.home(".npmrc"),
    ]
    found: dict[str, str] = {}
    for path in files:
        found |= npmrc(_read(path))
    prefix = "npm_config_"
    found |= npmrc(
        "\n".join(
            f"{name.removeprefix(prefix)}={value}"
            for name, value in stated.items()
            if name.startswith(prefix)
        )
    )
    return found.values()


_CONFIGURED: Mapping[str, Callable[[Surroundings], Iterable[str]]] = {
    "apt": _apt,
    "pip": _pip,
    "npm": _npm,
}
