"""A client of the OCI distribution specification 1.1: what the runner needs of it.

Answers are hostile bytes: bounded, and believed only as far as their digest goes.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, Self, TypeVar
from urllib.parse import urlsplit

import requests
from pydantic import BaseModel, Field, ValidationError

from policies.errors import InvalidReference
from policies.reference import DOCKER_HUB, Digest, ImageReference
from runner.errors import RegistryError, RegistryProtocol
from runner.registry import dial
from runner.registry.auth import Credentials
from runner.registry.exchange import Exchange, Transient, Upload, failures
from runner.registry.image import INDEX_TYPES, MANIFEST_TYPES, Descriptor
from runner.registry.tokens import Site
from runner.settings import Settings

_HUB_HOST = "registry-1.docker.io"
_PULL = "pull"
_PUSH = "pull,push"
_ACCEPTED = (*MANIFEST_TYPES, *INDEX_TYPES)
_LENGTH = re.compile(r"[0-9]{1,18}")

_T = TypeVar("_T")


class _Document(BaseModel):
    """The one field that a manifest may repeat of its Content-Type."""

    media_type: str | None = Field(default=None, alias="mediaType")


class RegistryClient:
    """Pulls and pushes with one identity. Usable by several threads; closed by its maker.

    Every method raises RegistryUnreachable, RegistryRefused, RegistryProtocol or ImageNotFound
    for what the registry does, and AddressDenied where it may not be asked at all.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._limits = settings.http
        self._exchange = Exchange(settings, credentials, sleep)

    def close(self) -> None:
        self._exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Pulling

    def manifest(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        """The manifest or index that ``reference`` names, from a mirror or its origin.

        The descriptor is of the bytes that arrived. A digest in ``reference`` is what they have.
        """
        return self._first(reference, lambda site: self._manifest(site, reference))

    def manifest_at_origin(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        """The same, from the registry itself whatever mirrors there are."""
        site = self._origin(reference)
        return self._exchange.retried(lambda: self._manifest(site, reference))

    @contextmanager
    def read_blob(
        self, reference: ImageReference, digest: Digest, size: int | None
    ) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob in pieces, from a mirror or the origin. The caller hashes them.

        Exactly ``size`` bytes come, or at most the settings' ``blob_bytes`` where that is None.
        A connection that breaks is taken up again where it broke.
        """

        def begin(site: Site) -> _Download:
            return _Download(self._exchange, site, digest, size, self._limits.blob_bytes)

        download = self._first(reference, begin)
        try:
            yield download.pieces()
        finally:
            download.close()

    def has_blob(self, reference: ImageReference, digest: Digest) -> int | None:
        """Bytes of the blob at the origin, or None where it does not exist."""
        site = self._origin(reference)

        def attempt() -> int | None:
            url = f"{site.base}/blobs/{digest}"
            with self._exchange.ask(site, _PULL, "HEAD", url) as response:
                if response.status_code == requests.codes.not_found:
                    return None
                self._exchange.expect(response, site, 200)
                size = _content_length(response)
            if size is None:
                raise RegistryProtocol(f"{site.host} does not tell the size of {digest}")
            return size

        return self._exchange.retried(attempt)

    # Pushing

    def may_push(self, reference: ImageReference) -> None:
        """Asks for what a push will need: an address, an answer, a login. Nothing is changed."""
        site = self._origin(reference)

        def attempt() -> None:
            url = f"{site.base}/blobs/{Digest.of(b'')}"
            with self._exchange.ask(site, _PUSH, "HEAD", url) as response:
                self._exchange.expect(response, site, 200, 404)

        self._exchange.retried(attempt)

    def push_blob(
        self,
        reference: ImageReference,
        digest: Digest,
        size: int,
        open_blob: Callable[[], BinaryIO],
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Uploads a blob in one piece, from its start again when that fails.

        Args:
            reference: Its repository.
            digest: What the registry will check.
            size: Bytes of the blob.
            open_blob: Opens it; called once per attempt.
            progress: Gets the bytes sent so far, from 0 again in another attempt. What it
                raises ends the upload.
        """
        site = self._origin(reference)
        self._exchange.retried(lambda: self._push_blob(site, digest, size, open_blob, progress))

    def put_manifest(self, reference: ImageReference, media_type: str, data: bytes) -> None:
        """Stores ``data`` under the digest of ``reference``, or under its tag."""
        site = self._origin(reference)
        name = _manifest_name(reference)

        def attempt() -> None:
            response = self._exchange.ask(
                site,
                _PUSH,
                "PUT",
                f"{site.base}/manifests/{name}",
                headers={"Content-Type": media_type},
                body=lambda: Upload(io.BytesIO(data), len(data), lambda _: None),
            )
            with response:
                self._exchange.expect(response, site, 201)
                _check_digest_header(response, site, data)
                dial.release(response)

        self._exchange.retried(attempt)

    def _push_blob(
        self,
        site: Site,
        digest: Digest,
        size: int,
        open_blob: Callable[[], BinaryIO],
        progress: Callable[[int], None],
    ) -> None:
        ask = self._exchange.ask
        with ask(site, _PUSH, "POST", f"{site.base}/blobs/uploads/") as response:
            self._exchange.expect(response, site, 202)
            place = dial.resolve(response.url, response.headers.get("Location", ""))
            dial.release(response)
        joint = "&" if urlsplit(place).query else "?"
        streams: list[BinaryIO] = []

        def body() -> Upload:
            streams.append(open_blob())
            return Upload(streams[-1], size, progress)

        try:
            response = ask(
                site,
                _PUSH,
                "PUT",
                f"{place.partition('#')[0]}{joint}digest={digest.replace(':', '%3A')}",
                headers={"Content-Type": "application/octet-stream"},
                body=body,
            )
        finally:
            for stream in streams:
                stream.close()
        with response:
            self._exchange.expect(response, site, 201)
            dial.release(response)

    # Where things are

    def _origin(self, reference: ImageReference) -> Site:
        host = _HUB_HOST if reference.host == DOCKER_HUB else reference.host
        return Site(self._scheme(host), host, reference.repository, reference.host)

    def _mirrors(self, reference: ImageReference) -> Iterator[Site]:
        for mirror in self._settings.registry(reference.host).mirrors:
            host, _, prefix = mirror.partition("/")
            name = "/".join(filter(None, (prefix.strip("/"), reference.repository)))
            yield Site(self._scheme(host), host, name, host)

    def _scheme(self, host: str) -> str:
        return "http" if self._settings.registry(host).plain_http else "https"

    def _first(self, reference: ImageReference, attempt: Callable[[Site], _T]) -> _T:
        """What the first mirror answers, tried once each, else what the origin does."""
        for site in self._mirrors(reference):
            try:
                return self._exchange.retried(partial(attempt, site), attempts=1)
            except RegistryError:
                continue
        site = self._origin(reference)
        return self._exchange.retried(partial(attempt, site))

    def _manifest(self, site: Site, reference: ImageReference) -> tuple[Descriptor, bytes]:
        url = f"{site.base}/manifests/{_manifest_name(reference)}"
        headers = {"Accept": ", ".join(_ACCEPTED)}
        with self._exchange.ask(site, _PULL, "GET", url, headers=headers) as response:
            self._exchange.expect(response, site, 200)
            with failures(site.host):
                data = dial.read_small(
                    response, self._limits.manifest_bytes, self._limits.read_seconds
                )
            _check_digest_header(response, site, data)
            media_type = _media_type(response, site, data)
        digest = _digest(data, reference.digest.algorithm if reference.digest else "sha256")
        if reference.digest and reference.digest != digest:
            raise RegistryProtocol(f"{site.host} answers for {reference.digest} with {digest}")
        return Descriptor(media_type, digest, len(data)), data


class _Download:
    """A blob on its way in."""

    def __init__(
        self, exchange: Exchange, site: Site, digest: Digest, size: int | None, most_bytes: int
    ) -> None:
        self._exchange = exchange
        self._site = site
        self._digest = digest
        self._received = 0
        self._response = self._open()
        announced = _content_length(self._response)
        self._size = announced if size is None else size
        self._most = most_bytes if self._size is None else self._size
        if announced not in {None, self._size} or self._most > most_bytes:
            self.close()
            raise RegistryProtocol(
                f"{site.host} has {announced} bytes for {digest}, where "
                f"{size if size is not None else f'at most {most_bytes}'} were expected"
            )

    def close(self) -> None:
        self._response.close()

    def pieces(self) -> Iterator[bytes]:
        """All bytes once. Raises RegistryUnreachable when the connection keeps breaking."""
        for again in range(self._exchange.limits.attempts, -1, -1):
            try:
                with failures(self._site.host):
                    yield from self._read()
            except Transient as failure:
                if again == 0:
                    raise failure.error from failure
                self.close()
                self._response = self._exchange.retried(self._open)
            else:
                break
        if self._size is not None and self._received < self._size:
            raise RegistryProtocol(
                f"{self._site.host} ends {self._digest} after {self._received} bytes"
            )

    def _read(self) -> Iterator[bytes]:
        while piece := self._response.raw.read(dial.BLOCK_BYTES, decode_content=False):
            self._received += len(piece)
            if self._received > self._most:
                raise RegistryProtocol(f"{self._digest} has more than {self._most} bytes")
            yield piece

    def _open(self) -> requests.Response:
        """The blob from where it is wanted on. Raises Transient like Exchange.ask."""
        start = self._received
        response = self._exchange.ask(
            self._site,
            _PULL,
            "GET",
            f"{self._site.base}/blobs/{self._digest}",
            headers={"Range": f"bytes={start}-"} if start else {},
        )
        self._exchange.expect(response, self._site, 206 if start else 200)
        found = response.headers.get("Content-Range", "")
        if start and not found.startswith(f"bytes {start}-"):
            response.close()
            raise RegistryProtocol(f"{self._site.host} resumes {self._digest} at another place")
        return response


def _manifest_name(reference: ImageReference) -> str:
    name = reference.digest or reference.tag
    if name is None:
        raise InvalidReference(f"{reference} names no tag and no digest")
    return name


def _digest(data: bytes, algorithm: str) -> Digest:
    return Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")


def _check_digest_header(response: requests.Response, site: Site, data: bytes) -> None:
    """The header is optional; one that is there must be right."""
    text = response.headers.get("Docker-Content-Digest")
    if text is None:
        return
    try:
        claimed = Digest(text)
    except InvalidReference:
        raise RegistryProtocol(f"{site.host} sends a malformed Docker-Content-Digest") from None
    if claimed != _digest(data, claimed.algorithm):
        raise RegistryProtocol(f"{site.host} claims {claimed} for other bytes")


def _media_type(response: requests.Response, site: Site, data: bytes) -> str:
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type not in _ACCEPTED:
        raise RegistryProtocol(
            f"{site.host}/{site.repository}: {dial.shown(media_type, 100) or 'nothing'} is no "
            "media type of an image"
        )
    try:
        own = _Document.model_validate_json(data).media_type
    except ValidationError:
        raise RegistryProtocol(f"{site.host}/{site.repository}: the manifest is no JSON") from None
    if own not in {None, media_type}:
        raise RegistryProtocol(f"{site.host}/{site.repository}: two media types for one manifest")
    return media_type


def _content_length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if _LENGTH.fullmatch(text) else None
