"""The egress proxy: where RUN steps may connect, and nothing else.

A request comes in absolute form (``GET http://HOST/``) or as CONNECT. Its host is held against the
decision before anything is resolved; the checked dialer resolves it and connects to an address that
it judged. Nothing is followed: a redirect is the client's next request. What goes through a tunnel
has to be TLS for the host that was asked for. Each request becomes one entry of the ledger.
"""

import hmac
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_network
from typing import Literal

from policies.grants import may_connect
from policies.model import EgressRule, Grant, Network
from runner.errors import AddressDenied, PolicyDenied, QuotaExceeded, RunnerError
from runner.gateway import authority
from runner.gateway.authority import Authority, TargetRefused
from runner.gateway.forward import EgressBounds, HttpExchange, Refused, TlsTunnel, Visit, Wire
from runner.gateway.http import Request, Response, login_of
from runner.gateway.ledger import Entry
from runner.registry import dial

SUGGEST = "`runner egress ID --suggest` shows the rule that would allow it."
LOOKUPS = 8
"""Of names, at a time: nothing ends one that hangs, and it holds a thread."""
_LOGIN_WANTED = 407


class Egress:
    """The proxy of one session. Usable by several threads."""

    def __init__(
        self,
        grant: Grant,
        *,
        login: bytes,
        reserve: Callable[[], None],
        record: Callable[[Entry], None],
        note: Callable[[RunnerError], None],
        bounds: EgressBounds,
    ) -> None:
        """Opens nothing yet.

        Args:
            grant: Of the decision, its presets expanded.
            login: What ``Proxy-Authorization`` has to say.
            reserve: Called before each request; one entry follows unless it raises QuotaExceeded.
            record: Gets one entry for each request when it is over.
            note: Gets what the build was refused.
            bounds: On every connection.
        """
        self.grant = grant
        self._login = login
        self._record = record
        self._note = note
        self._bounds = bounds
        self._reserve = reserve
        self._lock = threading.Lock()
        self._lookup_is_over = threading.Condition(self._lock)
        self._lookups = 0
        self._connections = 0
        self._wires: set[Wire] = set()
        self._bytes = 0
        self._closed = False

    def decide(self, grant: Grant) -> None:
        """From now on ``grant`` holds; what is under way goes on."""
        self.grant = grant

    def close(self) -> None:
        """Ends every connection at once. May be called twice."""
        with self._lock:
            self._closed = True
            wires = list(self._wires)
            self._lookup_is_over.notify_all()
        for wire in wires:
            wire.abort()

    def answer(self, request: Request) -> Response:
        """What the proxy says to ``request``; 503 where the ledger has no room for it.

        Raises BodyBroken, DiskExceeded.
        """
        kind: Literal["http", "connect"] = "connect" if request.method == "CONNECT" else "http"
        visit = Visit(kind=kind, method=request.method, host="")
        try:
            self._reserve()
        except QuotaExceeded as full:
            self._note(full)
            return _refusal(Refused(503, full.message))
        try:
            return self._through(request, visit)
        except Refused as refused:
            visit.status = refused.status
            self._over(visit, refused.error)
            return _refusal(refused)

    def _through(self, request: Request, visit: Visit) -> Response:
        """The way out. Raises Refused, BodyBroken."""
        target, path = _read(request)
        visit.host, visit.port, visit.path = target.host, target.port, path
        rule = self._rule(request, target)
        visit.rule, visit.is_allowed = rule.preset or ", ".join(rule.hosts), True
        try:
            wire = self._dial(target, rule)
        except Refused as refused:
            visit.is_allowed = refused.error is None  # policy had nothing against it
            raise
        visit.status = 200
        if visit.kind == "connect":
            return Response(200, content=TlsTunnel(wire, visit, self._over, self._bounds))
        exchange = HttpExchange(wire, visit, self._over, self._bounds)
        return exchange.begin(request, target, path)

    def _rule(self, request: Request, target: Authority) -> EgressRule:
        """The one that allows it. Nothing is resolved, nobody outside is asked. Raises Refused."""
        grant = self.grant
        if grant.network is not Network.EGRESS:
            why = f"egress to {target} is not allowed: this build has no egress"
            raise Refused(403, why, PolicyDenied(why, advice=SUGGEST))
        given = login_of(request.headers.get("proxy-authorization", ""))
        if not hmac.compare_digest(given, self._login):
            raise Refused(_LOGIN_WANTED, "the egress proxy wants the session's token")
        method = None if request.method == "CONNECT" else request.method
        rule = may_connect(grant, target.host, target.port, method)
        if rule is None:
            why = f"egress to {target} is not allowed by policy"
            raise Refused(403, why, PolicyDenied(why, advice=SUGGEST))
        return rule

    # -- connections to the outside ------------------------------------------------------------

    def _dial(self, target: Authority, rule: EgressRule) -> Wire:
        """Raises Refused."""
        most = self.grant.limits.egress_connections
        with self._lock:
            if self._connections >= most:
                why = f"more than {most} egress connections at a time"
                raise Refused(503, why, QuotaExceeded(why))
            self._connections += 1
        try:
            return self._connected(target, rule)
        except BaseException:
            with self._lock:
                self._connections -= 1
            raise

    def _connected(self, target: Authority, rule: EgressRule) -> Wire:
        try:
            with ExitStack() as lookup:
                lookup.enter_context(self._lookup())

                def resolved() -> None:
                    lookup.close()
                    self._require_open()

                connection = dial.connect(
                    target.host,
                    target.port,
                    private=[ip_network(text) for text in rule.private_ranges],
                    connect_seconds=self._bounds.connect_seconds,
                    read_seconds=self._bounds.idle_seconds,
                    before_each=resolved,
                )
        except AddressDenied as error:
            advice = "Where that is meant, the policy's egress rule needs private_ranges."
            denied = AddressDenied(error.message, advice=advice)
            raise Refused(403, error.message, denied) from None
        except TimeoutError:
            raise Refused(504, f"no connection to {target} in time") from None
        except (OSError, UnicodeError) as error:
            raise Refused(
                502, f"no connection to {target}: {dial.shown(str(error), 100)}"
            ) from None
        wire = Wire(connection, self._spend, self._forget)
        with self._lock:
            if not self._closed:
                self._wires.add(wire)
                return wire
        connection.close()
        raise _ended()

    @contextmanager
    def _lookup(self) -> Iterator[None]:
        """Waits for its turn, since honest builds ask in bursts. Raises Refused."""
        with self._lock:
            if not self._lookup_is_over.wait_for(
                lambda: self._closed or self._lookups < LOOKUPS, self._bounds.connect_seconds
            ):
                why = f"more than {LOOKUPS} look-ups of names at a time"
                raise Refused(503, why, QuotaExceeded(why))
            if self._closed:
                raise _ended()
            self._lookups += 1
        try:
            yield
        finally:
            with self._lock:
                self._lookups -= 1
                self._lookup_is_over.notify()

    def _require_open(self) -> None:
        """Raises Refused."""
        with self._lock:
            if self._closed:
                raise _ended()

    def _forget(self, wire: Wire) -> None:
        with self._lock:
            self._wires.discard(wire)
            self._connections -= 1

    def _spend(self, size: int) -> None:
        most = self.grant.limits.egress_bytes
        with self._lock:
            self._bytes += size
            spent = self._bytes
        if spent > most:
            raise QuotaExceeded(f"the build moved more than {most} bytes through the egress proxy")

    def _over(self, visit: Visit, error: RunnerError | None) -> None:
        """Notes how a visit ended. Raises DiskExceeded."""
        if error is not None:
            self._note(error)
        self._record(visit.entry)


def _read(request: Request) -> tuple[Authority, str]:
    try:
        if request.method == "CONNECT":
            return authority.of_tunnel(request.target), ""
        return authority.of_absolute(request.target)
    except TargetRefused as refused:
        why = f"a request to the egress proxy was refused: {refused}"
        raise Refused(400, why, PolicyDenied(why, advice=SUGGEST)) from None


def _ended() -> Refused:
    return Refused(503, "the session has ended")


def _refusal(refused: Refused) -> Response:
    headers = {"Content-Type": "text/plain"}
    if refused.status == _LOGIN_WANTED:
        headers["Proxy-Authenticate"] = 'Basic realm="runner"'
    why = str(refused)
    return Response(refused.status, headers, f"{why}\n".encode(), reason=why)
