"""What a request to a proxy asks for, read so that no two readers can read it differently.

A host is normalised once, here: what comes out is compared with the policy, resolved, dialled,
named upstream and held against TLS's server name. There is one spelling for each host. All others
are refused: addresses in decimal, octal, hexadecimal, short or IPv6 forms, percent-encoding, and
names that are not ASCII (clients send ``xn--`` labels).
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

_ABSOLUTE = re.compile(r"(?i:http)://([^/?#]*)([/?][^#]*)?")
_AUTHORITY = re.compile(r"([^:]*|\[[^]]*\])(?::([0-9]{1,5}))?")
_NAME = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label that makes resolvers take a name for an IPv4 address."""
_NAME_CHARACTERS = 253
_HTTP_PORT = 80


class TargetRefused(Exception):
    """The target of a request is none that we read; says why, in words of ours."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A host and a TCP port.

    Attributes:
        host: A name in lower case without a trailing dot, or an IPv4 address as usually spelled.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def header(self) -> str:
        """For ``Host``, which leaves out the usual port."""
        return self.host if self.port == _HTTP_PORT else str(self)


def of_tunnel(target: str) -> Authority:
    """What CONNECT asks for. Raises TargetRefused."""
    return _authority(target, None)


def of_absolute(target: str) -> tuple[Authority, str]:
    """Where a request in absolute form goes, and the target there. Raises TargetRefused."""
    parts = _ABSOLUTE.fullmatch(target)
    if parts is None:
        raise TargetRefused("it is no http:// URL; for https:// ask with CONNECT")
    path = parts[2] or "/"
    return _authority(parts[1], _HTTP_PORT), path if path.startswith("/") else f"/{path}"


def _authority(text: str, usual_port: int | None) -> Authority:
    if "@" in text:
        raise TargetRefused("it has user information")
    parts = _AUTHORITY.fullmatch(text)
    if parts is None:
        raise TargetRefused("it is no HOST:PORT")
    port = int(parts[2]) if parts[2] else usual_port
    if port is None or not 0 < port < 1 << 16:
        raise TargetRefused("it has no usable port")
    return Authority(_hostname(parts[1]), port)


def _hostname(text: str) -> str:
    name = text.lower().removesuffix(".") if text.isascii() else ""
    if not _NAME.fullmatch(name) or len(name) > _NAME_CHARACTERS:
        raise TargetRefused("it has no usable host name; IPv6 addresses cannot be allowed")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            IPv4Address(name)
        except AddressValueError:
            raise TargetRefused("its host is an IPv4 address in an unusual spelling") from None
    return name
