"""The one checked way to open outbound HTTP connections.

The host is resolved here, every address is judged, and the connection goes to a judged address:
a name that resolves differently a moment later (DNS rebinding) gains nothing. Redirects are
followed by ``Session.follow`` alone, each hop under the same rules. Nothing ambient is used:
no proxies, no ``.netrc``, no cookies.

Certificates are checked against the system's store (``SSL_CERT_FILE`` and ``SSL_CERT_DIR``
included), not against the list that requests brings: a company's own CA is installed there,
and the distribution keeps it up to date.
"""

import contextlib
import functools
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from http.cookiejar import DefaultCookiePolicy
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
)

from runner.errors import AddressDenied, RegistryProtocol
from runner.settings import RegistrySettings, Settings

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
BLOCK_BYTES = 1 << 18
"""Written to a socket at once: system calls are dear, 256 KiB is past the knee of the curve."""
_DRAIN_BYTES = 64 << 10
"""Read of an answer nobody wants, so that its connection can be used again."""

_URL = re.compile(
    r"(?i:https?)://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"(?:[/?#][\x21-\x5b\x5d-\x7e]*)?"
)
"""Narrower than RFC 3986, so that urllib and urllib3 cannot read two different hosts from it."""

_CLOSED_V4 = tuple(
    IPv4Network(text)
    for text in (
        # IANA IPv4 Special-Purpose Address Registry (RFC 6890 and later)
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        # Azure's wire server: a public number that every virtual machine there finds on its host
        "168.63.129.16/32",
    )
)
_GLOBAL_V6 = IPv6Network("2000::/3")
"""All that is assigned for global unicast; loopback, ULA, link-local, multicast lie outside."""
_CLOSED_V6 = tuple(
    IPv6Network(text)
    for text in (
        # IANA IPv6 Special-Purpose Address Registry, inside 2000::/3 (Teredo is in the first)
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
    )
)
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR = IPv6Network("2002::/16")


Networks = Sequence[IPv4Network | IPv6Network]
EVERYWHERE: Networks = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


def is_public(address: str | IPv4Address | IPv6Address) -> bool:
    """Whether ``address`` is one that anybody on the Internet may be sent to.

    IPv6 forms that carry an IPv4 address (mapped, NAT64, 6to4) are as public as what they carry.
    Text that is no address, or names an interface, is not public.
    """
    try:
        parsed = ipaddress.ip_address(address) if isinstance(address, str) else address
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in _CLOSED_V4)
    if parsed.scope_id is not None:
        return False
    if parsed in _MAPPED or parsed in _NAT64:
        return is_public(IPv4Address(int(parsed) & 0xFFFF_FFFF))
    if parsed in _SIX_TO_FOUR:
        return is_public(IPv4Address(int(parsed) >> 80 & 0xFFFF_FFFF))
    return parsed in _GLOBAL_V6 and not any(parsed in network for network in _CLOSED_V6)


def settings_at(settings: Settings, scheme: str, host: str, port: int) -> RegistrySettings:
    """The settings of exactly this authority; the port may be left out where it is the usual."""
    name = f"[{host}]" if ":" in host else host.lower()
    full = f"{name}:{port}"
    if full not in settings.registries and port == _PORTS[scheme]:
        return settings.registry(name)
    return settings.registry(full)


def connect(
    host: str,
    port: int,
    *,
    private: Networks,
    connect_seconds: float,
    read_seconds: float,
    before_each: Callable[[], None] = lambda: None,
) -> socket.socket:
    """A TCP connection to an address of ``host`` that was judged first.

    One closed address among several is enough to refuse: which of them gets used must not
    depend on the order in which a hostile name server lists them.

    Args:
        host: A name or an address, without brackets.
        port: Of TCP.
        private: Networks whose addresses are as good as public ones, for this connection.
        connect_seconds: For each address that is tried.
        read_seconds: The socket's timeout afterwards.
        before_each: Called after the name is resolved, before an address is tried; it may raise.

    Raises:
        AddressDenied: An address of ``host`` is neither public nor in ``private``.
        OSError: The name does not resolve, or no address accepts the connection.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = {str(entry[4][0]) for entry in found}
    closed = sorted(address for address in addresses if not _is_open(address, private))
    if closed:
        raise AddressDenied(f"{host}:{port} has the address {closed[0]}, which is not public")
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        before_each()
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(connect_seconds)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            connection.close()
            failure = error
        else:
            connection.settimeout(read_seconds)
            return connection
    raise failure


def _is_open(address: str, private: Networks) -> bool:
    return is_public(address) or any(ipaddress.ip_address(address) in net for net in private)


def _dial(connection: HTTPConnection, settings: Settings, scheme: str) -> socket.socket:
    """What urllib3 calls for a new socket, with its own error types."""
    host, port = connection.host, connection.port
    at = settings_at(settings, scheme, host, port)
    if scheme == "http" and not at.plain_http:
        raise AddressDenied(
            f"{host}:{port} would be asked over plain HTTP",
            advice=f'If that is meant: [registries."{host}:{port}"] plain_http = true',
        )
    limits = settings.http
    try:
        return connect(
            host,
            port,
            private=EVERYWHERE if at.private_address else (),
            connect_seconds=limits.connect_seconds,
            read_seconds=limits.read_seconds,
        )
    except (socket.gaierror, UnicodeError) as error:
        unresolved = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
        raise NameResolutionError(host, connection, unresolved) from error
    except TimeoutError as error:
        raise ConnectTimeoutError(connection, f"no connection to {host}:{port} in time") from error
    except OSError as error:
        raise NewConnectionError(connection, f"no connection to {host}:{port}: {error}") from error


def _pool_classes(settings: Settings) -> dict[str, type[HTTPConnectionPool]]:
    class PlainConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _dial(self, settings, "http")

    class TlsConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _dial(self, settings, "https")

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    return {"http": PlainPool, "https": TlsPool}


@functools.lru_cache(maxsize=4)
def _trust(file: str | None, directory: str | None) -> ssl.SSLContext:
    """The store that these variables name. Reading it takes 28 ms, and a build asks thrice."""
    del file, directory
    return ssl.create_default_context()


class _Adapter(HTTPAdapter):
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__(pool_connections=16, pool_maxsize=16)

    def init_poolmanager(
        self,
        connections: int,
        maxsize: int,
        block: bool = False,
        **options: Any,  # noqa: ANN401 - requests' signature
    ) -> None:
        self.poolmanager = PoolManager(
            num_pools=connections,
            maxsize=maxsize,
            block=block,
            ssl_context=_trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
            blocksize=BLOCK_BYTES,
            **options,
        )
        self.poolmanager.pool_classes_by_scheme = _pool_classes(self._settings)

    def close(self) -> None:
        """Closes kept connections now; urllib3 itself leaves that to the garbage collector."""
        for key in self.poolmanager.pools.keys():  # noqa: SIM118 - a container, no mapping to iterate
            if pool := self.poolmanager.pools.get(key):
                pool.close()
        super().close()

    def cert_verify(self, conn: object, url: str, verify: object, cert: object) -> None:
        """Nothing more than what the pool does with our context: requests adds its own list."""


class Session(requests.Session):
    """Sends requests; may be used by several threads. Bodies of answers are left unread."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._limits = settings.http
        self._elsewhere: Session | None = None
        self.trust_env = False
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # Digests are of the bytes as stored; a coding would also allow decompression bombs.
        self.headers = requests.structures.CaseInsensitiveDict(
            {"User-Agent": "runner", "Accept-Encoding": "identity"}
        )
        adapter = _Adapter(settings)
        self.mount("https://", adapter)
        self.mount("http://", adapter)

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002 - as requests calls it
        """None: requests itself must not follow, nor read a redirect's body without bound."""
        return None

    def send(
        self,
        request: requests.PreparedRequest,
        **options: Any,  # noqa: ANN401 - requests' signature
    ) -> requests.Response:
        timeout = (self._limits.connect_seconds, self._limits.read_seconds)
        options.update(stream=True, verify=True, timeout=timeout)
        return super().send(request, **options)

    def follow(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """A GET or HEAD that follows redirects; ``Authorization`` stays with its origin.

        Raises:
            AddressDenied: A hop leads to an address or over plain HTTP that nobody allowed.
            RegistryProtocol: Too many redirects, or one that leads to no usable URL.
            requests.RequestException: No answer.
        """
        first = url
        for _ in range(self._limits.redirects + 1):
            response = self.towards(url, first).request(method, url, headers=headers)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return response
            release(response)
            target = resolve(url, location)
            if origin(target) != origin(url):
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            url = target
        shown_host = origin(first)[1]
        raise RegistryProtocol(f"{shown_host} redirects more than {self._limits.redirects} times")

    def towards(self, url: str, asked: str) -> "Session":
        """The session for ``url`` where the server at ``asked`` sent us there.

        What is configured for a registry counts when somebody asks for that registry. Otherwise
        any registry could send us to all that are private, past what policy allows.
        """
        if origin(url) == origin(asked):
            return self
        scheme, host, port = origin(url)
        at = settings_at(self._settings, *origin(asked))
        listed = {host, f"{host}:{port}"} if port == _PORTS[scheme] else {f"{host}:{port}"}
        if listed & set(at.redirect_hosts):
            return self
        if self._elsewhere is None:
            self._elsewhere = Session(self._settings.model_copy(update={"registries": {}}))
        return self._elsewhere

    def close(self) -> None:
        super().close()
        if self._elsewhere is not None:
            self._elsewhere.close()


def session(settings: Settings) -> Session:
    """A new session; the caller closes it."""
    return Session(settings)


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL that ``resolve`` or we made."""
    parts = _split(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme]


def resolve(base: str, location: str) -> str:
    """The absolute URL that a peer names with ``location``.

    Raises:
        RegistryProtocol: It is no plain HTTP or HTTPS URL without user information.
    """
    try:
        url = urljoin(base, location)
    except ValueError:
        url = ""
    _split(url)
    return url


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = _URL.fullmatch(url) is not None and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise RegistryProtocol(f"not a usable URL: {shown(url, 100)}")
    return parts


def read_small(response: requests.Response, most_bytes: int, seconds: float) -> bytes:
    """The whole body of a small answer; the connection is given back.

    Raises:
        RegistryProtocol: The body is longer than ``most_bytes``, encoded, or drips in for longer
            than ``seconds``.
        urllib3.exceptions.HTTPError: The connection broke.
    """
    host = origin(response.url)[1]
    end = time.monotonic() + seconds
    data = bytearray()
    with response:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RegistryProtocol(f"{host} encodes its answer although it was asked not to")
        while piece := response.raw.read1(BLOCK_BYTES):
            data += piece
            if len(data) > most_bytes:
                raise RegistryProtocol(f"{host} answers with more than {most_bytes} bytes")
            if time.monotonic() > end:
                raise RegistryProtocol(f"{host} takes more than {seconds:.0f} s for a small answer")
    return bytes(data)


def release(response: requests.Response) -> None:
    """Lets go of an answer whose body nobody wants; a short one leaves its connection usable."""
    with response:
        length = response.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and len(length) < 8 and int(length) < _DRAIN_BYTES:  # noqa: PLR2004 - digits, so that int stays cheap
            with contextlib.suppress(HTTPError):
                response.raw.read(_DRAIN_BYTES, decode_content=False)


def shown(text: str, most: int = 300) -> str:
    """A peer's words as they may stand in a message: bounded, without control characters."""
    return text[:most].encode("unicode_escape").decode("ascii")
