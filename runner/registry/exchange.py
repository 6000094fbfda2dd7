"""One request to a registry: logged in, retried where that is harmless, its failures named."""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, TypeVar

import requests
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

from runner.errors import (
    ImageNotFound,
    RegistryError,
    RegistryProtocol,
    RegistryRefused,
    RegistryUnreachable,
    VerificationFailed,
)
from runner.registry import dial
from runner.registry.auth import Credentials
from runner.registry.tokens import Site, Tokens
from runner.settings import Settings
from sandbox import diagnostics

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_MOST_WAIT_SECONDS = 30.0
"""However long a registry's Retry-After is."""
_FIRST_WAIT_SECONDS = 0.5

_T = TypeVar("_T")


class Transient(Exception):
    """An attempt failed in a way that another may not.

    Attributes:
        error: What the caller gets when there is no other attempt.
        wait_seconds: What the registry asked for, or None.
    """

    def __init__(self, error: RegistryError, wait_seconds: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_seconds = wait_seconds


class Upload:
    """A body of known length on its way out, read once.

    Raises VerificationFailed while it is read when the bytes end before ``size``.
    """

    def __init__(self, stream: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
        self._stream = stream
        self._size = size
        self._sent = 0
        self._progress = progress

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        """There for requests, which takes only what can be iterated for a stream."""
        return iter(partial(self.read, dial.BLOCK_BYTES), b"")

    def read(self, amount: int) -> bytes:
        wanted = min(amount, self._size - self._sent)
        data = self._stream.read(wanted)
        if wanted and not data:
            raise VerificationFailed(
                f"a blob of {self._size} bytes ends after {self._sent}", rule="blob-size"
            )
        self._sent += len(data)
        self._progress(self._sent)
        return data


class Exchange:
    """Speaks HTTP with registries for one identity. Usable by several threads."""

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limits = settings.http
        self._session = dial.session(settings)
        self._tokens = Tokens(settings, self._session, credentials)
        self._sleep = sleep

    def close(self) -> None:
        self._session.close()

    def retried(self, attempt: Callable[[], _T], attempts: int | None = None) -> _T:
        """What ``attempt`` returns, tried again while it raises Transient.

        Raises:
            RegistryError: The last attempt failed as well.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            stop=stop_after_attempt(attempts or self.limits.attempts),
            wait=_wait_seconds,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Transient as failure:
            raise failure.error from failure

    def ask(
        self,
        site: Site,
        actions: str,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Upload] | None = None,
    ) -> requests.Response:
        """One attempt, twice only where the registry wants a login first. Closed by the caller.

        GET and HEAD follow redirects. ``url`` may be at another origin than ``site`` (a registry
        sends uploads there): such a request carries no login.

        Raises:
            Transient: No answer, or one that says "later".
            RegistryRefused: No login would do.
            RegistryProtocol: The challenge or a redirect makes no sense.
            AddressDenied: The host, or one that it redirects to, is out of reach by rule.
        """
        ours = dial.origin(url) == dial.origin(site.base)
        known = self._tokens.known(site, actions) if ours else None
        authorization = known.reveal() if known else None
        response = self._send(site, method, url, headers, authorization, body)
        asked = response.status_code == requests.codes.unauthorized
        if asked and ours and dial.origin(response.url) == dial.origin(url):
            challenge = response.headers.get("WWW-Authenticate", "")
            with failures(site.host):
                dial.release(response)
                fresh = self._tokens.answer(site, actions, challenge)
            response = self._send(site, method, url, headers, fresh.reveal(), body)
        if response.status_code in _AGAIN:
            raise Transient(RegistryUnreachable(self.words(response, site)), _retry_after(response))
        return response

    def _send(  # noqa: PLR0917 - one call, spelled out
        self,
        site: Site,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        authorization: str | None,
        body: Callable[[], Upload] | None,
    ) -> requests.Response:
        sent = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
        with failures(dial.origin(url)[1]):
            if method in {"GET", "HEAD"}:
                response = self._session.follow(method, url, sent)
            else:
                upload = body() if body else b""
                # requests sends an empty stream in chunks, which registries dislike.
                data = upload if len(upload) else b""
                session = self._session.towards(url, site.base)
                response = session.request(method, url, headers=sent, data=data)
        # Without the query: upload locations carry their state, some their secrets, in it.
        place = url.partition("?")[0]
        diagnostics.debug("registry", method=method, url=place, status=response.status_code)
        return response

    def expect(self, response: requests.Response, site: Site, *statuses: int) -> None:
        """Raises the RegistryError that an answer of any other status stands for; closes it."""
        if response.status_code in statuses:
            return
        words = self.words(response, site)
        if response.status_code in {401, 403}:
            raise RegistryRefused(words)
        if response.status_code == requests.codes.not_found:
            raise ImageNotFound(words)
        raise RegistryProtocol(words)

    def words(self, response: requests.Response, site: Site) -> str:
        """What a failed answer says, fit for a message. Closes it."""
        status = f"{site.host}/{site.repository}: HTTP status {response.status_code}"
        try:
            data = dial.read_small(response, self.limits.error_bytes, self.limits.read_seconds)
            first = _Refusal.model_validate_json(data).errors[0]
        except (HTTPError, RegistryProtocol, ValidationError, IndexError):
            return status
        return f"{status}, {dial.shown(first.code, 60)}: {dial.shown(first.message)}"


class _RefusalEntry(BaseModel):
    code: str = ""
    message: str = ""


class _Refusal(BaseModel):
    """An error of the distribution specification."""

    errors: list[_RefusalEntry]


@contextmanager
def failures(host: str) -> Iterator[None]:
    """Turns what requests and urllib3 raise into Transient, or into a final error.

    Messages never hold a URL: those of redirects carry signatures.
    """
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise RegistryUnreachable(
            f"{host}: {_reason(error)}",
            advice="If its certificate is signed by your own CA, install that in the system's "
            "store; plain HTTP must be configured.",
        ) from error
    except (requests.exceptions.InvalidURL, LocationValueError, UnicodeError) as error:
        raise RegistryProtocol(f"{host} leads to a URL that cannot be used") from error
    except (requests.RequestException, HTTPError) as error:
        raise Transient(RegistryUnreachable(f"{host}: {_reason(error)}")) from error


def _reason(error: BaseException) -> str:
    while isinstance(error, (requests.RequestException, MaxRetryError)):
        inner = error.reason if isinstance(error, MaxRetryError) else next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            return type(error).__name__
        error = inner
    # urllib3 puts the object's repr before a colon: class, host and port that nobody asked for.
    return dial.shown(re.sub(r"^\w*Connection\([^)]*\): ", "", str(error)))


def _retry_after(response: requests.Response) -> float | None:
    """Seconds only; the date form is rare and needs a trusted clock."""
    text = response.headers.get("Retry-After", "")
    few = text.isascii() and text.isdigit() and len(text) < 8  # noqa: PLR2004 - digits, so that int stays cheap
    return min(float(text), _MOST_WAIT_SECONDS) if few else None


def _wait_seconds(state: RetryCallState) -> float:
    """As asked, else exponential with full jitter: many clients must not come back together."""
    failure = state.outcome.exception() if state.outcome else None
    if isinstance(failure, Transient) and failure.wait_seconds is not None:
        return failure.wait_seconds
    longest = min(_FIRST_WAIT_SECONDS * 2**state.attempt_number, _MOST_WAIT_SECONDS)
    return random.uniform(0, longest)  # noqa: S311 - nothing secret about it
