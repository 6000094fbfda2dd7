"""The endpoint of sessions as a registry of its own, for conformance suites and for trying out.

The same parsers and handlers. ``runner.gateway.registry.STANDALONE`` is all that differs.
"""

import base64
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from policies.model import Limits
from policies.reference import Digest, ImageReference
from runner.errors import BaseImageDenied
from runner.gateway.http import Handler, Request, Response, login_of
from runner.gateway.listen import refuse
from runner.gateway.reachable import Uploaded
from runner.gateway.registry import STANDALONE, RegistryEndpoint
from runner.gateway.staging import Staging
from runner.registry.image import Descriptor
from runner.settings import Settings
from runner.stores.blobs import BlobStore


class _Nothing:
    """No base images."""

    def resolve(self, image: ImageReference) -> tuple[Descriptor, bytes]:
        raise BaseImageDenied(f"nothing is pulled through here, not {image} either")

    def open_blob(self, digest: Digest, name: str) -> tuple[BinaryIO, int]:
        raise FileNotFoundError(f"{name}@{digest}")


class Registry:
    """A registry of some repositories, for everybody who can reach it."""

    def __init__(self, directory: Path, names: Iterable[str], settings: Settings) -> None:
        """Blobs are below ``directory``; what they are is known until the process ends."""
        limits = Limits(staged_bytes=settings.http.blob_bytes)
        self._repositories = {
            name: Staging(BlobStore(directory / str(number)), Uploaded(), limits, STANDALONE.room)
            for number, name in enumerate(names)
        }
        endpoint = RegistryEndpoint(
            self._repositories,
            {},
            _Nothing(),
            limits=settings.http,
            failed=lambda _: None,
            rules=STANDALONE,
        )
        self.answer: Handler = endpoint.answer

    def close(self) -> None:
        """Forgets what is on its way."""
        for repository in self._repositories.values():
            repository.seal()


def behind(login: str, handler: Handler) -> Handler:
    """The same for those who know ``login``, USER:PASSWORD."""
    expected = b"Basic " + base64.b64encode(login.encode())

    def answer(request: Request) -> Response:
        given = login_of(request.headers.get("authorization", ""))
        return handler(request) if hmac.compare_digest(given, expected) else refuse(request)

    return answer
