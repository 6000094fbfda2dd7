"""A Docker Engine behind the few calls that a sandbox needs: the one module that imports its SDK.

What the engine answers is parsed here, and its errors become ours.
"""

import json
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any, Self

import docker
import requests
from docker.errors import APIError, DockerException, NotFound
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sandbox.errors import EngineLost, EngineUnavailable, RuntimeUnknown, SandboxFailed

OLDEST_API = (1, 41)
"""Of Engine 20.10."""
CALL_SECONDS = 60
_SAID = 500
_HEADER = struct.Struct(">BxxxI")
"""Of a piece of output: which stream, and how many bytes follow."""
_READ_BYTES = 64 << 10
_NO_ANSWER = (DockerException, requests.RequestException, OSError)
_NO_ENGINES = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that is not an engine's, here and in the SDK."""


class _Parsed(BaseModel):
    model_config = ConfigDict(frozen=True)


_NULL_IS_NONE = BeforeValidator(lambda found: () if found is None else found)
_NULL_IS_NO_OPTION = BeforeValidator(lambda found: {} if found is None else found)
"""An engine writes an empty list or map as null."""


class Runtime(_Parsed):
    """An entry of ``runtimes`` in the engine's daemon.json."""

    path: str = ""
    arguments: Annotated[tuple[str, ...], _NULL_IS_NONE] = Field((), alias="runtimeArgs")
    options: Annotated[Mapping[str, Any], _NULL_IS_NO_OPTION] = Field({}, alias="options")

    @property
    def opens_host_sockets(self) -> bool:
        """Whether a Unix socket in a mount can be connected to from inside gVisor."""
        given = [word.lstrip("-").partition("=") for word in self.arguments]
        said = [value for name, _, value in given if name == "host-uds"]
        return bool(said) and said[-1] in {"open", "all"}  # the last one counts

    @property
    def configuration(self) -> Path | None:
        """Of a shim, where the entry names one."""
        path = self.options.get("ConfigPath")
        return Path(path) if isinstance(path, str) and path else None


class Info(_Parsed):
    """What the engine says of itself."""

    version: str = Field(alias="ServerVersion")
    runtimes: Annotated[Mapping[str, Runtime], _NULL_IS_NO_OPTION] = Field(alias="Runtimes")
    security: Annotated[tuple[str, ...], _NULL_IS_NONE] = Field((), alias="SecurityOptions")
    root: str = Field(alias="DockerRootDir")
    memory_limit: bool = Field(default=False, alias="MemoryLimit")
    cpu_quota: bool = Field(default=False, alias="CpuCfsQuota")
    pids_limit: bool = Field(default=False, alias="PidsLimit")
    swap_limit: bool = Field(default=False, alias="SwapLimit")

    def has(self, option: str) -> bool:
        """Whether ``option``, such as ``userns``, is among its security options."""
        return any(f"name={option}" in each.split(",") for each in self.security)

    @property
    def limits(self) -> Mapping[str, bool]:
        """Whether it can limit what a build may use."""
        return {"memory": self.memory_limit, "cpu": self.cpu_quota, "pids": self.pids_limit}

    @property
    def root_uid(self) -> int:
        """Host uid that a container's uid 0 is: with userns-remap the first of its range."""
        if not self.has("userns"):
            return 0
        # The engine keeps what it has of each range apart: /var/lib/docker/100000.100000
        found = re.fullmatch(r"(\d+)\.\d+", Path(self.root).name)
        if found is None:
            raise EngineUnavailable(f"the engine's userns-remap range is not in {self.root}")
        return int(found[1])

    @property
    def major(self) -> int:
        found = re.match(r"\d+", self.version)
        return int(found[0]) if found is not None else 0


class State(_Parsed):
    """How a container is."""

    pid: int = Field(alias="Pid")
    out_of_memory: bool = Field(alias="OOMKilled")


class Attached:
    """Both ways to the first process of a container."""

    def __init__(self, response: IO[bytes]) -> None:
        """``response`` is the SDK's: its connection is for raw bytes from now on."""
        self._response = response
        connection = getattr(response, "_sock", None)
        assert isinstance(connection, socket.socket), "the engine is on a Unix socket"
        connection.settimeout(None)
        self._connection = connection
        self._left = 0

    def read(self) -> bytes:
        """Of its output; empty at the end, however that came."""
        try:
            while self._left == 0:
                header = self._exactly(_HEADER.size)
                if header is None:
                    return b""
                self._left = _HEADER.unpack(header)[1]
            data = self._connection.recv(min(self._left, _READ_BYTES))
        except OSError:
            return b""
        self._left -= len(data)
        return data

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            more = self._connection.recv(count - len(data))
            if not more:
                return None
            data += more
        return data

    def write(self, data: bytes) -> None:
        self._connection.sendall(data)

    def close(self) -> None:
        """Its standard input ends with this, and so does our first process."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._response.close()


class Engine:
    """One engine on this host. May be used by several threads."""

    def __init__(self, client: Any) -> None:  # noqa: ANN401 - the SDK has no types
        self._client = client

    @classmethod
    def connect(cls, path: Path) -> Self:
        """The engine that listens on the Unix socket at ``path``.

        Raises:
            EngineUnavailable: Nobody does, or it does not answer, or is too old.
        """
        try:
            _require_listener(path)
            client = docker.APIClient(base_url=f"unix://{path}", timeout=CALL_SECONDS)
        except (*_NO_ANSWER, *_NO_ENGINES) as error:
            raise EngineUnavailable(f"no Docker Engine at {path}: {_reason(error)}") from None
        shown = _shown(str(client.api_version))
        version = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", shown)
        if version is None or (int(version[1]), int(version[2])) < OLDEST_API:
            client.close()
            raise EngineUnavailable(
                f"the engine at {path} is too old: its API is {shown}",
                advice="Docker Engine 20.10 or newer is needed.",
            )
        return cls(client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        self._client.close()

    def info(self) -> Info:
        """Raises EngineUnavailable."""
        try:
            return Info.model_validate(self._client.info())
        except (*_NO_ANSWER, *_NO_ENGINES) as error:
            raise EngineUnavailable(f"the engine does not answer: {_reason(error)}") from None

    # -- images --------------------------------------------------------------------------

    def image(self, reference: str) -> Mapping[str, str] | None:
        """The labels of an image, or None where there is none."""
        with _told():
            try:
                found = self._client.inspect_image(reference)
            except NotFound:
                return None
            return _labels(found.get("Config") or {})

    def import_image(self, tar: IO[bytes], reference: str, labels: Mapping[str, str]) -> None:
        """Makes an image of a root filesystem."""
        repository, _, tag = reference.partition(":")
        changes = [f"LABEL {name}={json.dumps(value)}" for name, value in labels.items()]
        with _told():
            # Not import_image_from_data: that one waits for ever.
            answer = self._client.import_image(tar, repository=repository, tag=tag, changes=changes)
        if '"error"' in str(answer):
            raise SandboxFailed(f"the engine took no image: {str(answer)[-_SAID:]}")

    def images(self, labels: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """Id and labels of every image that has ``labels``."""
        with _told():
            found = self._client.images(filters={"label": _filter(labels)})
            return [(str(each["Id"]), _labels(each)) for each in found]

    def remove_image(self, reference: str) -> None:
        with _told(), suppress(NotFound):
            self._client.remove_image(reference, force=True)

    # -- containers ----------------------------------------------------------------------

    def create(self, name: str, config: Mapping[str, object]) -> str:
        """The id of a new container."""
        with _told():
            made = self._client.create_container_from_config(dict(config), name)
            container, warnings = str(made["Id"]), made.get("Warnings") or ()
        for warning in map(str, warnings):
            if "discarded" in warning.lower():  # a limit, as engines word it
                raise SandboxFailed(f"the engine keeps no such limit: {_shown(warning)}")
        return container

    def attach(self, container: str) -> Attached:
        """Before it starts, so that nothing of its output is lost."""
        ways = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        with _told():
            return Attached(self._client.attach_socket(container, params=ways))

    def start(self, container: str) -> None:
        with _told():
            self._client.start(container)

    def wait(self, container: str) -> int:
        """Blocks until a container that was started has ended, and returns its exit status."""
        with _told():
            return int(self._client.wait(container, timeout=None)["StatusCode"])

    def state(self, container: str) -> State | None:
        """None where it is removed."""
        with _told():
            try:
                return State.model_validate(self._client.inspect_container(container)["State"])
            except NotFound:
                return None

    def address(self, container: str, network: str) -> str:
        """IPv4 address of a running container."""
        with _told():
            found = self._client.inspect_container(container)
            return str(found["NetworkSettings"]["Networks"][network]["IPAddress"])

    def kill(self, container: str) -> None:
        """May be gone already."""
        with _told():
            try:
                self._client.kill(container, signal="SIGKILL")
            except NotFound:
                pass
            except APIError as error:
                if error.status_code != _CONFLICT:  # it does not run
                    raise

    def remove(self, container: str) -> None:
        with _told():
            try:
                self._client.remove_container(container, force=True, v=True)
            except NotFound:
                pass
            except APIError as error:
                if error.status_code != _CONFLICT:  # it is being removed
                    raise

    def labelled(self, labels: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """Id and labels of every container that has ``labels``, whatever it does."""
        with _told():
            found = self._client.containers(all=True, filters={"label": _filter(labels)})
            return [(str(each["Id"]), _labels(each)) for each in found]

    # -- networks ------------------------------------------------------------------------

    def create_network(self, name: str, body: Mapping[str, Any]) -> str:
        """The id of a new network."""
        with _told():
            return str(self._client.create_network(name, **body)["Id"])

    def networks(self, labels: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """Id and labels of every network that has ``labels``."""
        with _told():
            found = self._client.networks(filters={"label": _filter(labels)})
            return [(str(each["Id"]), _labels(each)) for each in found]

    def remove_network(self, network: str) -> None:
        with _told(), suppress(NotFound):
            self._client.remove_network(network)

    # -- volumes -------------------------------------------------------------------------

    def create_volume(self, name: str, body: Mapping[str, Any]) -> None:
        with _told():
            self._client.create_volume(name, **body)

    def volumes(self, labels: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """Name and labels of every volume that has ``labels``."""
        with _told():
            found = self._client.volumes(filters={"label": _filter(labels)}).get("Volumes")
            return [(str(each["Name"]), _labels(each)) for each in found or ()]

    def remove_volume(self, volume: str) -> None:
        with _told(), suppress(NotFound):
            self._client.remove_volume(volume)


_DOCTOR = "runner doctor --backend docker"
_CONFLICT = 409
_UNKNOWN_RUNTIME = re.compile(r"unknown (or invalid )?runtime( name| specified)?", re.IGNORECASE)


@contextmanager
def _told() -> Iterator[None]:
    """Tells the engine's errors as ours."""
    try:
        yield
    except APIError as error:
        said = _shown(str(error.explanation or error))
        if _UNKNOWN_RUNTIME.search(said):
            raise RuntimeUnknown(f"the engine says: {said}") from None
        raise SandboxFailed(f"the engine says: {said}", advice=_DOCTOR) from None
    except requests.ReadTimeout:
        raise SandboxFailed(
            f"the engine did not answer within {CALL_SECONDS} s",
            advice=f"Its runtime may hang: the engine's log says more; {_DOCTOR}",
        ) from None
    except _NO_ANSWER as error:
        raise EngineLost(f"the engine does not answer any more: {_reason(error)}") from None
    except _NO_ENGINES as error:
        raise EngineLost(f"the engine answers what no engine does: {_reason(error)}") from None


def _require_listener(path: Path) -> None:
    """Raises OSError that says why nobody answers, which the SDK wraps up three times."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        tried.settimeout(CALL_SECONDS)
        tried.connect(str(path))


def _filter(labels: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in labels.items()]


def _labels(of: Mapping[str, Any]) -> Mapping[str, str]:
    return {str(name): str(value) for name, value in (of.get("Labels") or {}).items()}


def _reason(error: Exception) -> str:
    return _shown(str(error))


def _shown(text: str) -> str:
    """What the engine says may hold what a runtime wrote: bounded, and on one line."""
    clean = " ".join(text.split())
    return clean if len(clean) <= _SAID else f"{clean[:_SAID]} ..."
