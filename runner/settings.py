"""Every number and place that is not a policy's business, in one frozen object.

Read from ``/etc/runner/config.toml``, then ``$XDG_CONFIG_HOME/runner/config.toml`` (or the file
that ``RUNNER_CONFIG`` names instead of the latter); later files add registries and override keys.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class LocalSettings(Frozen):
    """The local backend."""

    runsc: str = "runsc"
    """Name on PATH, or a path."""
    first_uid: Annotated[int, Field(ge=65536, le=4_000_000_000)] = 1_900_000_000
    """Run as root, each running build gets a host uid of its own from here on."""
    uids: Annotated[int, Field(ge=1, le=65536)] = 1024


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


class Settings(Frozen):
    registries: Mapping[str, RegistrySettings] = {}
    local: LocalSettings = LocalSettings()
    http: HttpLimits = HttpLimits()
    cache_bytes: Annotated[int, Field(ge=0)] = 20 << 30
    """Of base-image blobs kept between builds."""

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
