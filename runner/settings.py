"""Every number and place that is not a policy's business, in one frozen object.

Read from ``/etc/runner/config.toml``, then ``$XDG_CONFIG_HOME/runner/config.toml`` (or the file
that ``RUNNER_CONFIG`` names instead of the latter); later files add registries and override keys.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from policies.document import EgressDocument, Preset
from policies.errors import InvalidReference
from policies.patterns import matches
from policies.reference import ImageReference
from runner.errors import ConfigInvalid

SYSTEM_CONFIG = Path("/etc/runner/config.toml")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RegistrySettings(Frozen):
    """How one registry, named by ``HOST`` or ``HOST:PORT``, is reached."""

    plain_http: bool = False
    """Speak HTTP without TLS."""
    private_address: bool = False
    """Its address may be private, loopback or link-local."""
    mirrors: tuple[str, ...] = ()
    """``HOST[:PORT][/PREFIX]`` to ask first, in order; each has settings of its own."""
    redirect_hosts: tuple[str, ...] = ()
    """``HOST[:PORT]`` of its storage, where their own entries count when it redirects there."""
    token_hosts: tuple[str, ...] = ()
    """Hosts besides the registry's own domain that its token realm may name."""


def _absolute(path: str) -> str:
    if not Path(path).is_absolute():
        raise ValueError("an absolute path")
    return path


class LocalSettings(Frozen):
    """The local backend."""

    runsc: str = "runsc"
    """Name on PATH, or a path."""
    first_uid: Annotated[int, Field(ge=65536, le=4_000_000_000)] = 1_900_000_000
    """Run as root, each running build gets a host uid of its own from here on."""
    uids: Annotated[int, Field(ge=1, le=65536)] = 1024


class DockerSettings(Frozen):
    """The docker backend."""

    socket: Annotated[str, AfterValidator(_absolute)] = "/var/run/docker.sock"
    """Unix socket of an Engine on this host."""
    runsc: str = "runsc"
    """What the Engine calls the runtime for gvisor."""
    kata: str | None = None
    """Likewise for kata: an entry of its daemon.json or, from Engine 23 on, a shim's name. Absent
    for the first entry whose name begins with kata, else ``io.containerd.kata.v2``."""
    kata_older: bool = False
    """Take a Kata before 3.31.0, which has known holes; evidence will say so."""
    runc: str = "runc"
    """Likewise for container, which policy has to allow; and for the relay of a network door."""


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) <= _PORTS:
        raise ValueError("A.B.C.D:PORT")
    return f"{IPv4Address(host)}:{int(port)}"


_PORTS = 65535
Address = Annotated[str, AfterValidator(_address)]


class TolerationSettings(Frozen):
    """Of a taint that the nodes for builds have."""

    key: str
    value: str = ""
    effect: str = ""


class KubernetesSettings(Frozen):
    """The kubernetes backend."""

    gateway: Address | None = None
    """Where pods find ``runner gateway serve``: address and port of its Service. Absent, nobody
    builds in a cluster."""
    repository: str | None = None
    """Where ``runner builder push`` puts builders, and nodes pull them: ``HOST/PATH``."""
    kubeconfig: Annotated[str, AfterValidator(_absolute)] | None = None
    """Absent for the pod's own identity where there is one, else as kubectl finds it."""
    context: str | None = None
    namespace: str = "runner-builds"
    gvisor: str = "gvisor"
    """Name of the RuntimeClass for gvisor."""
    kata: str = "kata"
    container: str = ""
    """Likewise for container, which policy has to allow; empty for the nodes' default runtime."""
    forbidden: tuple[Address, ...] = ()
    """What a pod must not reach, besides the API server and the metadata address: what it does
    reach of that ends it before it is given anything."""
    node_selector: Mapping[str, str] = {}
    tolerations: tuple[TolerationSettings, ...] = ()
    priority_class: str = ""
    queue: str = ""
    """LocalQueue of Kueue."""
    pull_secrets: tuple[str, ...] = ()
    """Secrets of the builds' namespace with which nodes pull the builder's image."""
    pending_seconds: Annotated[int, Field(ge=10, le=86_400)] = 600
    """For a pod to be scheduled and started."""


class HttpLimits(Frozen):
    """Bounds on what is read from any peer, registry or sandbox."""

    manifest_bytes: int = 4 << 20
    """The distribution specification recommends registries to accept at least 4 MiB."""
    token_bytes: int = 1 << 20
    error_bytes: int = 64 << 10
    blob_bytes: int = 64 << 30
    redirects: int = 5
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    attempts: int = 4
    publish_seconds: float = 3600.0
    """For one destination, from its first request to its last."""


def _target(text: str) -> str:
    host, colon, port = text.partition(":")
    try:
        EgressDocument(hosts=(host,), ports=(int(port) if colon else 443,))
    except ValueError:
        host = ""
    if not host or host.startswith("*") or not text.isascii():
        raise ValueError("a host name in lower case without wildcards, or HOST:PORT")
    return text


class EgressSettings(Frozen):
    """The egress proxy."""

    presets: Mapping[Preset, tuple[Annotated[str, AfterValidator(_target)], ...]] = {}
    """``HOST`` or ``HOST:PORT`` of package ecosystems, instead of what is known about them."""


_NAMES = re.compile(r"(?P<prefix>[^*]+?)(?P<star>/\*{1,2})?")


def _rewriting(rules: Mapping[str, str]) -> Mapping[str, str]:
    for pair in rules.items():
        found = [match for text in pair if (match := _NAMES.fullmatch(text)) is not None]
        if len(found) != len(pair) or found[0]["star"] != found[1]["star"]:
            raise ValueError("a star stands at the end, after a slash, and in both or in neither")
        for match in found:
            name = match["prefix"] + ("/a/b" if match["star"] else "")
            try:
                whole = ImageReference.parse(name).name == name
            except InvalidReference:
                whole = False
            if not whole:
                raise ValueError(f"not HOST/REPOSITORY: {match[0][:100]!a}")
    return rules


class BaseImageSettings(Frozen):
    """Where base images come from, besides each registry's mirrors."""

    rewrite: Annotated[Mapping[str, str], AfterValidator(_rewriting)] = {}
    """``HOST/REPOSITORY``, ``HOST/PATH/*`` or ``HOST/PATH/**`` to what is asked in its place, and
    alone. The first one that matches in full counts."""
    offline: bool = False
    """Ask no registry for base images."""
    local: tuple[str, ...] = ()
    """Patterns over ``HOST/REPOSITORY``: what builds may start from offline, by digest or by a tag
    as it was resolved last, where the cache has it. Nobody can ask offline whether they still may,
    so these should be public."""

    def asked_for(self, image: ImageReference) -> ImageReference:
        """What is asked in the place of ``image``."""
        for pattern, target in self.rewrite.items():
            if matches(pattern, image.name):
                star = pattern.find("*")
                rest = "" if star < 0 else image.name[star:]
                host, _, repository = (target.rstrip("*") + rest).partition("/")
                return replace(image, host=host, repository=repository)
        return image


class Settings(Frozen):
    registries: Mapping[str, RegistrySettings] = {}
    local: LocalSettings = LocalSettings()
    docker: DockerSettings = DockerSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    http: HttpLimits = HttpLimits()
    egress: EgressSettings = EgressSettings()
    base_images: BaseImageSettings = BaseImageSettings()
    cache_bytes: Annotated[int, Field(ge=0)] = 20 << 30
    """Of base-image blobs kept between builds."""
    unpacked_bytes: Annotated[int, Field(ge=0)] = 20 << 30
    """Of base images kept unpacked between builds, besides."""

    def registry(self, host: str) -> RegistrySettings:
        return self.registries.get(host, RegistrySettings())


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this host and user.

    Raises:
        ConfigInvalid: A file is unreadable, no TOML, or has an unknown key.
    """
    home = Path(environ.get("HOME") or "/nonexistent")
    own = environ.get("RUNNER_CONFIG")
    user_config = (
        Path(own)
        if own
        else Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "runner" / "config.toml"
    )
    merged: dict[str, Any] = {}
    for path in (SYSTEM_CONFIG, user_config):
        document = _read(path, must_exist=bool(own) and path == user_config)
        registries = {**merged.get("registries", {}), **document.get("registries", {})}
        merged = {**merged, **document, "registries": registries}
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigInvalid(f"{SYSTEM_CONFIG} or {user_config}: {where}: {first['msg']}") from None


def _read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise ConfigInvalid(f"{path} does not exist") from None
        return {}
    except (OSError, ValueError) as error:  # no UTF-8, no TOML, a number of 5000 digits
        raise ConfigInvalid(f"{path}: {error}") from None
    if not isinstance(document.get("registries", {}), dict):
        raise ConfigInvalid(f"{path}: registries must be tables")
    return document
