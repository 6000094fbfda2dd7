"""A cluster's API that was recorded once, and is played again over HTTP on loopback.

A recording is what passed between the backend and a real API, in order. When it is played, what
the cluster did follows by itself; what the backend or the sandbox did is waited for, and has to
happen again before what came after it. So a test may be slower or quicker than the recording, ask
more often than was asked then, or put faults in between.
"""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

RECORDINGS = Path(__file__).parent.parent / "recordings" / "kubernetes"
REGISTRY = "registry.example.com"
NAMESPACE = "runner-builds"
NODE = "node-1"
STATE = "5" * 32
"""What stands in recordings for a state directory."""
RELEASED, SAID = "released", "said"
"""Marks: the sandbox was released; it has said its last word."""
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_JOBS = f"POST /apis/batch/v1/namespaces/{NAMESPACE}/jobs"
_GAP_SECONDS = 0.003
"""Between two things that a cluster does, however long it took."""


# -- recordings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """Something of a recording.

    Attributes:
        cause: What has to happen again before: a mark, or ``METHOD /path``; empty where the
            cluster does it by itself.
        event: Type and pod, of a watch.
        answer: Path, status and body, of what may be asked from now on.
    """

    cause: str = ""
    event: tuple[str, dict[str, Any]] | None = None
    answer: tuple[str, int, Any] | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """Attributes:
    said: What the backend made of it when it was recorded, for people.
    steps: In order.
    """

    said: str
    steps: tuple[Step, ...]

    @classmethod
    def read(cls, name: str) -> "Recording":
        document = json.loads((RECORDINGS / f"{name}.json").read_bytes())
        steps: list[tuple[float, Step]] = []
        for exchange in document["exchanges"]:
            steps += ((at, step) for at, step in _steps(exchange))
        steps.sort(key=lambda each: each[0])
        return cls(document["said"], tuple(_once(step for _, step in steps)))

    @property
    def pod_spec(self) -> dict[str, Any]:
        """Of the pod that was asked for."""
        jobs = (step.answer[2] for step in self.steps if step.answer and step.cause == _JOBS)
        found: dict[str, Any] = next(jobs)["spec"]["template"]["spec"]
        return found

    @property
    def pods(self) -> list[dict[str, Any]]:
        """As they were seen, one after the other."""
        return [step.event[1] for step in self.steps if step.event is not None]

    @property
    def ended(self) -> dict[str, Any] | None:
        """How the container ended, where it did."""
        return next(filter(None, map(_terminated, self.pods)), None)

    @property
    def is_orderly(self) -> bool:
        """Whether the sandbox said its last word before its container ended."""
        for step in self.steps:
            if step.cause == SAID:
                return True
            if step.event is not None and _terminated(step.event[1]):
                return False
        return False


def _steps(exchange: dict[str, Any]) -> Iterator[tuple[float, Step]]:
    at = exchange["at"]
    if "mark" in exchange:
        yield at, Step(cause=exchange["mark"])
    elif "lines" in exchange:
        for each in restored(exchange["lines"]):
            yield each["at"], Step(event=(each["line"]["type"], each["line"]["object"]))
    elif exchange["path"] == _PODS:
        for pod in exchange["body"]["items"]:
            yield at, Step(event=("ADDED", pod))
    else:
        asked = f"{exchange['method']} {exchange['path']}"
        cause = "" if exchange["method"] == "GET" else asked
        yield at, Step(cause=cause, answer=(asked, exchange["status"], exchange["body"]))


def _once(steps: Iterable[Step]) -> Iterator[Step]:
    """Without events that are told again to whoever watches again."""
    told = 0
    for step in steps:
        if step.event is not None:
            if _version(step.event[1]) <= told:
                continue
            told = _version(step.event[1])
        yield step


def shortened(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without the spec of a pod that stayed as it was: it is most of them."""
    short, last = [], None
    for each in lines:
        pod = dict(each["line"]["object"])
        if pod.get("spec") == last:
            pod.pop("spec", None)
        last = pod.get("spec", last)
        short.append({**each, "line": {**each["line"], "object": pod}})
    return short


def restored(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was shortened."""
    whole: list[dict[str, Any]] = []
    spec: dict[str, Any] = {}
    for each in lines:
        pod = each["line"]["object"]
        spec = pod.get("spec", spec)
        found = {**each["line"], "object": {**pod, "spec": spec}}
        whole.append({**each, "line": found})
    return whole


def _state(pod: dict[str, Any]) -> dict[str, Any]:
    statuses = pod.get("status", {}).get("containerStatuses") or [{}]
    state: dict[str, Any] = statuses[0].get("state", {})
    return state


def is_running(pod: dict[str, Any]) -> bool:
    return "running" in _state(pod)


def has_ended(pod: dict[str, Any]) -> bool:
    return "terminated" in _state(pod) or pod["status"].get("phase") == "Failed"


def _terminated(pod: dict[str, Any]) -> dict[str, Any] | None:
    return _state(pod).get("terminated")


def _version(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["resourceVersion"])


def kubeconfig(directory: Path, url: str) -> Path:
    """A file in ``directory`` that leads to ``url``, as nobody in particular."""
    path = directory / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "it",
                "clusters": [{"name": "it", "cluster": {"server": url}}],
                "users": [{"name": "me", "user": {}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "me"}}],
            }
        )
    )
    return path


# -- faults ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that arrived. ``what`` is its method and path."""

    what: str
    query: dict[str, str]
    body: Any

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") == "true"


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    body: Sent as JSON, where it is not bytes.
    length: Said to be of that many bytes, where it is not what it is.
    """

    status: int
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class HangUp(Exception):
    """Ends a connection in the middle of whatever is said, by a reset."""


Stream = Callable[[Iterator[bytes]], Iterator[bytes]]


@dataclass
class Fault:
    """Something that is not as it was recorded.

    Attributes:
        of: Whether it concerns a request.
        answer: Instead of the recorded one; None where it is a reset.
        stream: Instead of both: what becomes of a watch's lines.
        times: Requests that it still befalls.
    """

    of: Callable[[Asked], bool]
    answer: Answer | None = None
    stream: Stream | None = None
    times: int = 1


# -- the server ------------------------------------------------------------------------------------


class PlayedCluster:
    """Plays one recording, to whoever asks."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.url = ""
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._pods: dict[str, dict[str, Any]] = {}
        self._answers: dict[str, tuple[int, Any]] = {}
        self._happened: list[str] = []
        self._changed = threading.Condition()
        self._position = 0
        self._is_down = False
        self._is_over = False

    # -- what a test does, and sees ----------------------------------------------------------------

    def happens(self, what: str) -> None:
        """Something that the recording waits for."""
        with self._changed:
            self._happened.append(what)
            self._changed.notify_all()

    def goes_down(self) -> None:
        """From now on nobody is answered, and every watch is cut off. The pods go on."""
        with self._changed:
            self._is_down = True
            self._changed.notify_all()

    def comes_back(self) -> None:
        with self._changed:
            self._is_down = False

    def saw(self, what: str) -> list[Asked]:
        return [each for each in self.asked if each.what == what]

    def wait(self, until: Callable[[list[dict[str, Any]]], bool], seconds: float = 30) -> bool:
        """Whether ``until`` holds in time of the pods, as they were one after the other."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_over or until([pod for _, pod in self._events]), seconds
            )

    @contextmanager
    def playing(self) -> Iterator["PlayedCluster"]:
        """Listens until the end."""

        class Handler(_Handler):
            cluster = self

        with _Server(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            threads = [
                threading.Thread(target=server.serve_forever, args=(0.01,)),
                threading.Thread(target=self._play),
            ]
            for each in threads:
                each.start()
            try:
                yield self
            finally:
                with self._changed:
                    self._is_over = True
                    self._changed.notify_all()
                server.shutdown()
                for each in threads:
                    each.join()

    # -- the recording -----------------------------------------------------------------------------

    def _play(self) -> None:
        with self._changed:
            while not self._is_over and self._position < len(self.recording.steps):
                step = self.recording.steps[self._position]
                if step.cause and step.cause not in self._happened:
                    self._changed.wait()
                    continue
                if step.cause:
                    self._happened.remove(step.cause)
                self._position += 1
                self._take(step)
                self._changed.notify_all()
                self._changed.wait(_GAP_SECONDS)

    def _take(self, step: Step) -> None:
        if step.event is not None:
            kind, pod = step.event
            self._events.append(step.event)
            if kind in {"ADDED", "MODIFIED"}:
                self._pods[pod["metadata"]["uid"]] = pod
            elif kind == "DELETED":
                self._pods.pop(pod["metadata"]["uid"], None)
        if step.answer is not None:
            what, status, body = step.answer
            self._answers[what] = status, body

    def answer(self, asked: Asked) -> Answer:
        """To anything but a watch."""
        with self._changed:
            method, path = asked.what.split(" ", 1)
            if asked.what == f"GET {_PODS}":
                version = max((_version(pod) for _, pod in self._events), default=1)
                items = list(self._pods.values())
                return Answer(200, {"metadata": {"resourceVersion": str(version)}, "items": items})
            if method == "DELETE":
                self._skip_to(asked.what)
                self._answers[f"GET {path}"] = 404, status_of(404, "NotFound")
            found = self._answers.get(asked.what) or self._later(asked.what)
            if method != "GET":
                self.happens(asked.what)
            if found is None and path.endswith("/events"):
                return Answer(200, {"items": []})
            return Answer(*(found or (404, status_of(404, "NotFound"))))

    def _later(self, what: str) -> tuple[int, Any] | None:
        """The first answer there will be: a test may ask earlier than was asked then."""
        for step in self.recording.steps[self._position :]:
            if step.answer is not None and step.answer[0] == what:
                return step.answer[1], step.answer[2]
        return None

    def _skip_to(self, what: str) -> None:
        """Who deletes does not wait for what would have happened before."""
        for number, step in enumerate(self.recording.steps[self._position :], self._position):
            if step.cause == what:
                self._position = number
                return

    def lines(self, asked: Asked) -> Iterator[bytes]:
        """Of a watch, from the version that was asked for."""
        seen, given = int(asked.query["resourceVersion"]), 0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_over or self._is_down or len(self._events) > given  # noqa: B023 - now
                )
                if self._is_down:
                    raise HangUp
                if self._is_over:
                    return
                news, given = self._events[given:], len(self._events)
            for kind, pod in news:
                if _version(pod) > seen:
                    yield line(kind, pod)

    def fault(self, asked: Asked) -> Fault | None:
        """That befalls a request."""
        self.asked.append(asked)
        with self._changed:
            for each in self.faults:
                if each.times > 0 and each.of(asked):
                    each.times -= 1
                    return each
            if self._is_down:
                raise HangUp
        return None


def line(kind: str, document: dict[str, Any]) -> bytes:
    """Of a watch."""
    return json.dumps({"type": kind, "object": document}).encode() + b"\n"


def status_of(code: int, reason: str, message: str = "so it is") -> dict[str, Any]:
    """What the API answers where it does not do what it was asked."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "code": code, "reason": reason, "message": message}  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:  # a client that hung up
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    cluster: PlayedCluster

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def do_DELETE(self) -> None:
        self._reply()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
        pass

    def _reply(self) -> None:
        address = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(
            f"{self.command} {address.path}",
            dict(parse_qsl(address.query)),
            json.loads(data) if data else None,
        )
        try:
            self._answer(asked, self.cluster.fault(asked))
        except HangUp:
            self.close_connection = True
            with suppress(OSError):
                self.wfile.flush()
            # With it the socket's end is a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _answer(self, asked: Asked, fault: Fault | None) -> None:
        if fault is not None and fault.stream is not None:
            self._stream(fault.stream(self.cluster.lines(asked)))
        elif fault is not None and fault.answer is None:
            raise HangUp
        elif fault is not None and fault.answer is not None:
            self._send(fault.answer)
        elif asked.is_watch:
            self._stream(self.cluster.lines(asked))
        else:
            self._send(self.cluster.answer(asked))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        length = len(answer.data) if answer.length is None else answer.length
        headers = {"Content-Type": "application/json", "Content-Length": str(length)}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.data)
        self.wfile.flush()
        self.close_connection = answer.length is not None

    def _stream(self, lines: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for data in lines:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
