"""The API of a cluster: the only place that knows the official client.

Requests are ours, and so is the reading of answers: each is bounded, and parsed to what
``sandbox.kubernetes.objects`` has of it. The client brings what is hard to do right: kubeconfig
files and their ways to log in, tokens that are renewed, TLS.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import urllib3
import yaml
from kubernetes import client, config
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from sandbox import diagnostics
from sandbox.errors import (
    ClusterForbidden,
    ClusterUnreachable,
    IsolationError,
    SandboxFailed,
)
from sandbox.kubernetes import fate
from sandbox.kubernetes.objects import Part, Pod, Status

_P = TypeVar("_P", bound=Part)

ANSWER_BYTES = 32 << 20
"""Of one answer; a list of pods with long messages may have some."""
LINE_BYTES = 4 << 20
"""Of one event of a watch: etcd takes objects up to 1.5 MiB."""
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
HEADS_SECONDS = ANSWER_SECONDS = 60.0
"""For all of an answer's head, and for all of its body: each read alone may take READ_SECONDS, and
who sends a byte at a time, or ``100 Continue`` for ever, would be read for ever."""
PATIENCE_SECONDS = 60.0
"""For a request that may be repeated, while the API does not answer or has too much to do."""
_OK, _UNAUTHORIZED, _NOT_FOUND, _CONFLICT, _GONE, _TOO_MANY, _SERVER = (
    200, 401, 404, 409, 410, 429, 500,
)  # fmt: skip
_REFUSALS = {400, 403, 422}


@dataclass(eq=False)  # not frozen: its traceback is noted in it
class Refused(Exception):
    """The API answered, and not as hoped."""

    code: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} {self.reason}: {self.message}"


class Expired(Exception):
    """A watch can go on from that version no more; one has to look again."""


class Cluster:
    """One cluster, as one identity. May be used from any thread."""

    def __init__(self, api: client.ApiClient, name: str) -> None:
        self._api = api
        self.name = name
        self.requests = 0

    @classmethod
    def connect(cls, kubeconfig: Path | None, context: str | None) -> Self:
        """Reads how the cluster is reached; asks it nothing yet.

        Args:
            kubeconfig: None for the pod's own identity where there is one, else ``KUBECONFIG``
                and ``~/.kube/config``.
            context: Of the file; None for its current one.

        Raises:
            ClusterUnreachable: There is no such configuration.
        """
        settings = client.Configuration()
        try:
            if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(settings)  # type: ignore[no-untyped-call] # the SDK's
            else:
                file = str(kubeconfig) if kubeconfig else None
                config.load_kube_config(file, context, settings)  # type: ignore[no-untyped-call]
        except (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError) as error:
            raise ClusterUnreachable(
                f"no cluster is configured: {error}",
                advice="KUBECONFIG, or kubeconfig and context under [kubernetes] in config.toml.",
            ) from None
        settings.retries = False
        api = client.ApiClient(settings)
        api.rest_client.pool_manager.pool_classes_by_scheme = _POOLS
        return cls(api, settings.host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection."""
        self._api.rest_client.pool_manager.clear()

    # -- one request -------------------------------------------------------------------------

    def get(self, kind: type[_P], path: str, **query: str) -> _P | None:
        """What is there now; None where nothing is.

        Raises:
            ClusterUnreachable: The API does not answer.
            ClusterForbidden: This identity may not know.
        """
        try:
            return _parsed(kind, self._patiently("GET", path, query, None))
        except Refused as error:
            if error.code == _NOT_FOUND:
                return None
            raise _told(error) from None

    def create(self, path: str, body: Mapping[str, Any]) -> None:
        """Makes an object, which is then there once, however often the request was sent.

        Raises:
            AdmissionRefused: The cluster's rules do not allow it.
            ClusterUnreachable: The API does not answer.
        """
        try:
            self._patiently("POST", path, {}, body)
        except Refused as error:
            # The names are ours, and new: it is the one that the first try made.
            if error.code != _CONFLICT or error.reason != "AlreadyExists":
                raise _told(error) from None

    def ask(self, kind: type[_P], path: str, question: Mapping[str, Any]) -> _P:
        """The answer to what is posted as a question, and not kept. Raises as ``get``."""
        try:
            return _parsed(kind, self._patiently("POST", path, {}, question))
        except Refused as error:
            raise _told(error) from None

    def delete(self, path: str, **options: object) -> None:
        """Asks for the end of an object, which may be gone already. Raises as ``get``."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        try:
            self._patiently("DELETE", path, {}, body)
        except Refused as error:
            if error.code not in {_NOT_FOUND, _CONFLICT}:
                raise _told(error) from None

    def _patiently(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> bytes:
        """Tries again what may pass: creating is safe to repeat, since names are ours."""
        attempts = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            stop=stop_after_delay(PATIENCE_SECONDS),
            reraise=True,
        )
        try:
            answer: bytes = attempts(self._once, method, path, query, body)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterUnreachable(
                f"the cluster's API at {self.name} does not answer: {_short(error)}"
            ) from None
        return answer

    def _once(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> bytes:
        response = self._open(method, path, query, body, READ_SECONDS)
        with closing(response), _ended_after(ANSWER_SECONDS, response.shutdown):
            data: bytes = response.read(ANSWER_BYTES + 1, decode_content=True)
            if len(data) > ANSWER_BYTES:
                raise SandboxFailed(f"the cluster's API answered more than {ANSWER_BYTES} bytes")
            _require_success(response.status, data)
            return data

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        read_seconds: float,
    ) -> urllib3.HTTPResponse:
        self.requests += 1
        diagnostics.debug("cluster", method=method, path=path, query=dict(query))
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = self._api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = (CONNECT_SECONDS, read_seconds)
        try:
            answer = self._api.call_api(*request, _request_timeout=timeout)
        except client.ApiException as error:  # its name for TLS that did not come about
            reason = " ".join(str(error.reason).split())[:300]
            raise ClusterUnreachable(
                f"the cluster's API at {self.name} is not whom kubeconfig names: {reason}"
            ) from None
        response: urllib3.HTTPResponse = answer.response
        return response

    def watch(self, path: str, version: str, seconds: int, **query: str) -> "Watch":
        """What happens to pods after ``version``, for so long at most.

        Raises:
            Expired: The API does not remember that far back.
            Refused: It answered something else.
            OSError: It does not answer; as urllib3's errors do, that may pass.
        """
        asked = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
            **query,
        }
        # The API writes nothing for as long as nothing happens, but it ends in time.
        response = self._open("GET", path, asked, None, seconds + READ_SECONDS)
        try:
            if response.status != _OK:
                _require_success(response.status, response.read(ANSWER_BYTES, decode_content=True))
        except BaseException:
            response.close()
            raise
        return Watch(response)


class Watch:
    """A watch of pods: gives ADDED, MODIFIED, DELETED or BOOKMARK, and the pod, one by one.

    It may raise what ``Cluster.watch`` raises, at any time.
    """

    def __init__(self, response: urllib3.HTTPResponse) -> None:
        self.response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()

    def __iter__(self) -> Iterator[tuple[str, Pod]]:
        return map(_event, _lines(self.response))


@contextmanager
def _ended_after(seconds: float, end: Callable[[], object]) -> Iterator[None]:
    """Calls ``end`` from another thread where what is done takes longer."""

    def late() -> None:
        with suppress(OSError, ValueError, RuntimeError):  # it has ended by itself
            end()

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(one: socket.socket | None) -> None:
    if one is not None:
        one.shutdown(socket.SHUT_RDWR)


class _Connection(urllib3.connection.HTTPConnection):
    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override] # as urllib3's own
        with _ended_after(HEADS_SECONDS, partial(_shut, self.sock)):
            return super().getresponse()


class _TlsConnection(urllib3.connection.HTTPSConnection):
    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override] # as urllib3's own
        with _ended_after(HEADS_SECONDS, partial(_shut, self.sock)):
            return super().getresponse()


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}


def _lines(response: urllib3.HTTPResponse) -> Iterator[bytes]:
    held: list[bytes] = []  # joined once: a line may come byte by byte
    size = 0
    for data in response.stream(64 << 10, decode_content=True):
        first, *lines = data.split(b"\n")
        held.append(first)
        size += len(first)
        if lines:
            *whole, rest = b"".join(held), *lines
            held, size = [rest], len(rest)
            yield from filter(None, whole)
        if size > LINE_BYTES:
            raise OSError("an event without end")


def _event(line: bytes) -> tuple[str, Pod]:
    try:
        document = json.loads(line)
        kind, found = str(document["type"]), document["object"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise OSError("an event that is none") from None
    if kind == "ERROR":
        status = _parsed(Status, json.dumps(found).encode())
        if status.code == _GONE:
            raise Expired
        raise Refused(status.code, status.reason, status.message)
    return kind, _parsed(Pod, json.dumps(found).encode())


def _parsed(kind: type[_P], data: bytes) -> _P:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SandboxFailed(
            f"the cluster's API answered no {kind.__name__}: {first['msg'][:200]}"
        ) from None


def _require_success(code: int, data: bytes) -> None:
    if code < 300:  # noqa: PLR2004 - HTTP's classes
        return
    try:
        status = Status.model_validate_json(data)
    except ValidationError:
        status = Status(message=data[:200].decode(errors="replace"))
    if code == _GONE:
        raise Expired
    raise Refused(code, status.reason, status.message)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered better a little later."""
    if isinstance(error, Refused):
        return error.code == _TOO_MANY or error.code >= _SERVER
    return isinstance(error, (urllib3.exceptions.HTTPError, OSError))


def _told(error: Refused) -> IsolationError:
    """What a user is told of an answer."""
    if error.code == _UNAUTHORIZED:
        return ClusterForbidden(f"the cluster does not know this identity: {error}")
    if error.code in _REFUSALS:
        return fate.refusal(error.message)
    return ClusterUnreachable(f"the cluster's API answered {error}")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
