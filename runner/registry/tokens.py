"""What a registry wants to see before it answers: Basic logins and bearer tokens.

The token service is pinned: it is the registry's own host, one that the configuration names,
or the one pair that everybody needs. A registry that names another gets nothing: credentials sent
to a realm of the registry's choosing were CVE-2020-15157.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from pydantic import BaseModel, Field, ValidationError

from runner.errors import RegistryProtocol, RegistryRefused
from runner.registry import dial
from runner.registry.auth import Credentials, Secret
from runner.settings import Settings

_TOKEN_HOSTS = {"registry-1.docker.io": ("auth.docker.io",)}
_HEADER_CHARACTERS = 8192
_MOST_TOKENS = 256
_DEFAULT_SECONDS = 60
"""How long a token without ``expires_in`` lives (distribution's token specification)."""
_MOST_SECONDS = 3600
_MARGIN = 0.8
"""Of its life that a token is used for: clocks differ, and uploads take time."""

_SPACE = re.compile(r"[ \t]*(?:,[ \t]*)*")
_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
_PARAMETER = re.compile(
    rf'({_NAME})[ \t]*=[ \t]*(?:"((?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*)"|([^\s",=]+))'
    r"(?=[ \t]*(?:,|$))"
)
_SCHEME = re.compile(rf"({_NAME})(?=[ \t]+|,|$)")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a registry offers; scheme and parameter names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """Reads ``WWW-Authenticate`` (RFC 9110, 11.6.1), without the rare ``token68`` form.

    Raises:
        RegistryProtocol: The header is outside the grammar or names a parameter twice.
    """
    if len(header) > _HEADER_CHARACTERS:
        raise RegistryProtocol(f"WWW-Authenticate of {len(header)} characters")
    found: list[tuple[str, dict[str, str]]] = []
    at = _skip(header, 0)
    while at < len(header):
        if found and (match := _PARAMETER.match(header, at)):
            name, parameters = match[1].lower(), found[-1][1]
            if name in parameters:
                raise RegistryProtocol(f"WWW-Authenticate names {dial.shown(name, 50)} twice")
            quoted = match[2]
            parameters[name] = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        elif match := _SCHEME.match(header, at):
            found.append((match[1].lower(), {}))
        else:
            raise RegistryProtocol(f"WWW-Authenticate is malformed: {dial.shown(header, 200)}")
        at = _skip(header, match.end())
    return tuple(Challenge(scheme, parameters) for scheme, parameters in found)


def _skip(header: str, at: int) -> int:
    match = _SPACE.match(header, at)
    assert match is not None  # it matches nothing at all too
    return match.end()


@dataclass(frozen=True, slots=True)
class Site:
    """One repository where it is really asked for: at its origin or at a mirror.

    Attributes:
        scheme: ``https``, or ``http`` where configured.
        host: ``HOST[:PORT]`` that is dialled.
        repository: Its name there.
        account: The host under whose name logins are kept.
    """

    scheme: str
    host: str
    repository: str
    account: str

    @property
    def base(self) -> str:
        return f"{self.scheme}://{self.host}/v2/{self.repository}"


class _TokenAnswer(BaseModel):
    token: str = ""
    access_token: str = ""
    expires_in: int = Field(default=_DEFAULT_SECONDS)


@dataclass(frozen=True, slots=True)
class _Known:
    value: Secret
    until: float


class Tokens:
    """``Authorization`` values, remembered per repository and kind of access until they expire."""

    def __init__(
        self,
        settings: Settings,
        session: dial.Session,
        credentials: Credentials,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._session = session
        self._credentials = credentials
        self._clock = clock
        self._known: dict[tuple[Site, str], _Known] = {}
        self._lock = threading.Lock()

    def known(self, site: Site, actions: str) -> Secret | None:
        """What was accepted here before and should still be."""
        with self._lock:
            known = self._known.get((site, actions))
        return known.value if known and known.until > self._clock() else None

    def answer(self, site: Site, actions: str, header: str) -> Secret:
        """Does what ``WWW-Authenticate: header`` asks for.

        Raises:
            RegistryRefused: There is no login, or the token service does not accept it.
            RegistryProtocol: The challenge or the token is malformed, or the realm is foreign.
            requests.RequestException: The token service does not answer.
        """
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(header)}
        if bearer := challenges.get("bearer"):
            value, seconds = self._fetch(site, actions, bearer)
        elif "basic" in challenges:
            login = self._credentials.for_host(site.account, site.repository)
            if login is None:
                raise RegistryRefused(f"{site.account} wants a login for {site.repository}")
            value, seconds = login.basic(), _MOST_SECONDS
        else:
            raise RegistryProtocol(f"{site.host} offers no way to log in that is known here")
        with self._lock:
            if len(self._known) >= _MOST_TOKENS:
                self._known.clear()
            self._known[site, actions] = _Known(value, self._clock() + seconds * _MARGIN)
        return value

    def _fetch(self, site: Site, actions: str, bearer: Challenge) -> tuple[Secret, int]:
        realm = self._pinned(site, bearer.parameters.get("realm", ""))
        # Our own scope, whatever the challenge says: a token is never wider than its use.
        query = {"scope": f"repository:{site.repository}:{actions}"}
        if service := bearer.parameters.get("service"):
            query["service"] = service
        login = self._credentials.for_host(site.account, site.repository)
        headers = {"Authorization": login.basic().reveal()} if login else {}
        joint = "&" if urlsplit(realm).query else "?"
        response = self._session.follow("GET", f"{realm}{joint}{urlencode(query)}", headers)
        limits = self._settings.http
        data = dial.read_small(response, limits.token_bytes, limits.read_seconds)
        host = dial.origin(realm)[1]
        if response.status_code in {400, 401, 403, 404}:
            who = "this login" if login else "an anonymous user"
            raise RegistryRefused(f"{host} gives {who} no {actions} token for {site.repository}")
        response.raise_for_status()
        try:
            answer = _TokenAnswer.model_validate_json(data)
        except ValidationError:
            raise RegistryProtocol(f"{host} answered with no token") from None
        token = answer.token or answer.access_token
        if not _TOKEN.fullmatch(token):
            raise RegistryProtocol(f"{host} answered with no usable token")
        return Secret(f"Bearer {token}"), max(0, min(answer.expires_in, _MOST_SECONDS))

    def _pinned(self, site: Site, realm: str) -> str:
        """``realm``, where it may be sent a login of this registry.

        The port may differ: GitLab's registry sends clients from port 5050 to the usual one.
        """
        scheme, host, port = dial.origin(realm)
        registry = dial.origin(site.base)
        allowed = {
            registry[1],
            *_TOKEN_HOSTS.get(site.host, ()),
            *self._settings.registry(site.host).token_hosts,
            *self._settings.registry(site.account).token_hosts,
        }
        if host not in allowed:
            raise RegistryProtocol(
                f"{site.host} sends logins to {dial.shown(host, 100)}, a foreign host",
                advice=f'If it is trusted: [registries."{site.host}"] token_hosts = ["HOST"]',
            )
        plain = dial.settings_at(self._settings, scheme, host, port).plain_http
        if scheme != "https" and not plain:
            raise RegistryProtocol(f"{site.host} sends logins to {host}:{port} over plain HTTP")
        return realm.partition("#")[0]
