"""Logins for registries, as ``docker login``, ``podman login`` and ``skopeo login`` keep them."""

import base64
import binascii
import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pydantic import BaseModel, Field, ValidationError

from policies.reference import DOCKER_HUB
from runner.errors import ConfigInvalid, RegistryRefused

_FILE_BYTES = 1 << 20
_HELPER_BYTES = 64 << 10
_HELPER_SECONDS = 10.0
_HELPER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_TOKEN_USER: Final = "<token>"  # noqa: S105 - what credential helpers say for an identity token
_MISSING = b"credentials not found in native keychain"
"""What docker-credential-helpers print for an unknown host, with exit status 1."""


class Secret:
    """Text that no repr, log or format string shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class Login:
    """A user at one registry."""

    user: str
    password: Secret

    def basic(self) -> Secret:
        """The value of an ``Authorization`` header (RFC 7617)."""
        pair = f"{self.user}:{self.password.reveal()}".encode()
        return Secret(f"Basic {base64.b64encode(pair).decode('ascii')}")


class Credentials(Protocol):
    """Who may log in where. Asked only when a registry wants a login."""

    def for_host(self, host: str, repository: str = "") -> Login | None:
        """The login for ``HOST[:PORT]`` and, where that matters, one repository there."""


class Anonymous:
    """No login anywhere."""

    def for_host(self, host: str, repository: str = "") -> Login | None:  # noqa: ARG002 - Credentials' signature
        return None


class _Auth(BaseModel):
    username: str = ""
    password: str = ""
    auth: str = ""
    identitytoken: str = ""


class _Config(BaseModel):
    auths: dict[str, _Auth] = {}
    helpers: dict[str, str] = Field(default={}, alias="credHelpers")
    store: str = Field(default="", alias="credsStore")


class _HelperAnswer(BaseModel):
    user: str = Field(alias="Username")
    secret: str = Field(alias="Secret")


class DockerConfig:
    """The user's own logins: Docker's file first, then those of podman and skopeo.

    Files are read anew for every question: a login made while a server runs counts.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    @property
    def files(self) -> tuple[Path, ...]:
        """Where logins are looked for, in order."""
        home = Path(self._environ.get("HOME") or "/nonexistent")
        docker = self._environ.get("DOCKER_CONFIG")
        run = self._environ.get("XDG_RUNTIME_DIR")
        return (
            (Path(docker) if docker else home / ".docker") / "config.json",
            *((Path(run) / "containers" / "auth.json",) if run else ()),
            Path(self._environ.get("XDG_CONFIG_HOME") or home / ".config")
            / "containers"
            / "auth.json",
        )

    def for_host(self, host: str, repository: str = "") -> Login | None:
        """The first login that a file has for the most specific name.

        Raises:
            ConfigInvalid: A file is unreadable or no Docker configuration.
            RegistryRefused: A credential helper fails, or has an identity token only.
        """
        for path in self.files:
            config = _read(path)
            login = self._from(config, path, host, repository) if config else None
            if login:
                return login
        return None

    def _from(self, config: _Config, path: Path, host: str, repository: str) -> Login | None:
        auths = {_plain_key(key): entry for key, entry in config.auths.items()}
        helpers = {_plain_key(key): name for key, name in config.helpers.items()}
        for key in _keys(host, repository):
            if key in helpers:
                return self._ask_helper(helpers[key], host, path)
            if key in auths and (login := _from_entry(auths[key], key, path)):
                return login
        return self._ask_helper(config.store, host, path) if config.store else None

    def _ask_helper(self, name: str, host: str, path: Path) -> Login | None:
        if not _HELPER_NAME.fullmatch(name):
            raise ConfigInvalid(f"{path}: {name[:80]!a} is no name of a credential helper")
        server = _HUB_KEYS[0] if host == DOCKER_HUB else host
        program = f"docker-credential-{name}"
        status, output = _run(program, server, self._environ)
        if status != 0:
            if _MISSING in output:
                return None
            raise RegistryRefused(
                f"{program} ended with status {status} for {host}: {ascii(output[:200])[2:-1]}"
            )
        try:
            answer = _HelperAnswer.model_validate_json(output)
        except ValidationError:
            raise RegistryRefused(f"{program} answered for {host} with no login") from None
        if answer.user == _TOKEN_USER:
            raise _identity_token(host)
        return Login(answer.user, Secret(answer.secret)) if answer.secret else None


def _identity_token(host: str) -> RegistryRefused:
    return RegistryRefused(
        f"the login for {host} is an identity token, which is not supported",
        advice="Log in with a user name and an access token or password.",
    )


def _read(path: Path) -> _Config | None:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigInvalid(f"{path}: {error.strerror}") from None
    if len(data) > _FILE_BYTES:
        raise ConfigInvalid(f"{path} has more than {_FILE_BYTES} bytes")
    try:
        return _Config.model_validate_json(data)
    except ValidationError as error:
        # Never the input itself: it holds passwords.
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the document"
        raise ConfigInvalid(
            f"{path}: {ascii(where[:100])[1:-1]} is not as Docker writes it"
        ) from None


def _keys(host: str, repository: str) -> Iterator[str]:
    """Names that a login for this repository may be kept under, most specific first."""
    hosts = _HUB_KEYS[1:] if host == DOCKER_HUB else (host,)
    parts = repository.split("/") if repository else []
    for length in range(len(parts), -1, -1):
        for name in hosts:
            yield "/".join((name, *parts[:length]))


def _plain_key(key: str) -> str:
    """Docker writes ``https://HOST/v1/`` for old logins."""
    name = re.sub(r"^https?://", "", key)
    return re.sub(r"/v[12]/?$", "", name).rstrip("/")


def _from_entry(entry: _Auth, key: str, path: Path) -> Login | None:
    if entry.identitytoken:
        raise _identity_token(key)
    if not entry.auth:
        return Login(entry.username, Secret(entry.password)) if entry.username else None
    try:
        user, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise ConfigInvalid(f"{path}: the auth of {key!a} is not base64 of USER:PASSWORD")
    return Login(user, Secret(password.rstrip("\0")))


def _run(program: str, server: str, environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Asks a credential helper. Its whole output, at most _HELPER_BYTES, and its status."""
    try:
        process = subprocess.Popen(
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
        )
    except OSError as error:
        raise RegistryRefused(
            f"the credential helper {program} cannot be started: {error.strerror}",
            advice="Install it, or take credHelpers and credsStore out of Docker's config.json.",
        ) from None
    timer = threading.Timer(_HELPER_SECONDS, process.kill)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(server.encode())
            output = process.stdout.read(_HELPER_BYTES + 1)
            if len(output) > _HELPER_BYTES:
                process.kill()
                raise RegistryRefused(f"{program} answers with more than {_HELPER_BYTES} bytes")
            return process.wait(), output
        finally:
            timer.cancel()
