"""Names of images and of their bytes.

    >>> ImageReference.parse("debian:12")
    ImageReference(host='docker.io', repository='library/debian', tag='12', digest=None)
    >>> str(ImageReference.parse("localhost:5000/acme/app"))
    'localhost:5000/acme/app'

The grammar is that of the OCI distribution specification 1.1 ("Pulling manifests") and of
the ``distribution/reference`` package, whose normalisation (``docker.io/library``) every
builder follows.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from policies.errors import InvalidReference

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HOST = re.compile(
    r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
    r"(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*|\[[0-9a-fA-F:]+\])(?::[1-9][0-9]{0,4})?"
)
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_NAME_LENGTH = 255
"""Host and repository together, as most registries limit them."""
_TEXT_LENGTH = 1024

DOCKER_HUB = "docker.io"


class Digest(str):
    """``ALGORITHM:HEX`` of some bytes. An instance is always well formed."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Raises InvalidReference when ``text`` is no sha256 or sha512 digest."""
        if len(text) > _TEXT_LENGTH or not _DIGEST.fullmatch(text):
            raise InvalidReference(f"not a digest: {text[:100]!r}")
        return super().__new__(cls, text)

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The sha256 digest of ``data``."""
        return cls(f"sha256:{hashlib.sha256(data).hexdigest()}")

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        return self.partition(":")[2]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def parse(text: str) -> "Digest":
            try:
                return cls(text)
            except InvalidReference as error:
                raise ValueError(error.message) from None

        return core_schema.no_info_after_validator_function(parse, core_schema.str_schema())


def _is_told_from_a_path(host: str) -> bool:
    """A host such as ``FOO`` is one by its case alone, and ``foo/bar`` is another image."""
    return "." in host or ":" in host or host == "localhost"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image in a registry, with its host always written out."""

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what people write after FROM and on command lines.

        Raises:
            InvalidReference: ``text`` is outside the grammar.
        """
        if len(text) > _TEXT_LENGTH:
            raise InvalidReference(f"image reference of {len(text)} characters")
        name, at, digest_text = text.partition("@")
        digest = Digest(digest_text) if at else None
        head, slash, rest = name.partition("/")
        is_host = slash and (
            "." in head or ":" in head or head == "localhost" or head != head.lower()
        )
        host, path = (head, rest) if is_host else (DOCKER_HUB, name)
        path, colon, tag = path.partition(":")
        if host.lower() in {DOCKER_HUB, "index.docker.io"}:
            host = DOCKER_HUB
            path = path if "/" in path else f"library/{path}"
        if (
            not _HOST.fullmatch(host)
            or not _REPOSITORY.fullmatch(path)
            or (is_host and not _is_told_from_a_path(host))
            or len(host) + 1 + len(path) > _NAME_LENGTH
            or (colon and not _TAG.fullmatch(tag))
        ):
            raise InvalidReference(f"not an image reference: {text[:200]!r}")
        return cls(host.lower(), path, tag if colon else None, digest)

    @property
    def name(self) -> str:
        """``HOST/REPOSITORY``: what policies speak about."""
        return f"{self.host}/{self.repository}"

    def at(self, digest: Digest) -> "ImageReference":
        """The same repository, by digest alone."""
        return replace(self, tag=None, digest=digest)

    def explicit(self) -> "ImageReference":
        """The same with the tag ``latest``, where there is neither tag nor digest."""
        return replace(self, tag="latest") if self.tag is self.digest is None else self

    def pulled(self) -> "ImageReference":
        """What a registry is asked for: a digest alone, or a tag."""
        return self.at(self.digest) if self.digest is not None else self.explicit()

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")
