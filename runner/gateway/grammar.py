"""The grammar of the distribution specification's requests, and its refusals.

Pure: text from a hostile peer in, plain values or a ``Refusal`` out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import parse_qsl

from policies.errors import InvalidReference
from policies.reference import Digest
from runner.errors import (
    ImageNotFound,
    LimitExceeded,
    PolicyDenied,
    QuotaExceeded,
    RegistryError,
    RegistryRefused,
    RunnerError,
)
from runner.gateway.http import Request, Response
from runner.registry.image import INDEX_TYPES, MANIFEST_TYPES
from runner.stores.blobs import ALGORITHMS

TARGET_BYTES = 2048
_NAME = (
    r"(?P<name>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
)
MANIFEST = re.compile(rf"/v2/{_NAME}/manifests/(?P<reference>[A-Za-z0-9_.:-]{{1,200}})")
BLOB = re.compile(rf"/v2/{_NAME}/blobs/(?P<digest>[a-z0-9]+:[0-9a-f]{{1,128}})")
UPLOADS = re.compile(rf"/v2/{_NAME}/blobs/uploads/")
UPLOAD = re.compile(rf"/v2/{_NAME}/blobs/uploads/(?P<id>[0-9a-f]{{32}})")
TAGS = re.compile(rf"/v2/{_NAME}/tags/list")
REFERRERS = re.compile(rf"/v2/{_NAME}/referrers/(?P<digest>[A-Za-z0-9:+._-]{{1,200}})")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_CHUNK = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_PART = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})")
_NUMBER = re.compile(r"[0-9]{1,9}")
_QUERY_FIELDS = 32


class Refusal(Exception):
    """An error of the specification, with its code."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def response(self) -> Response:
        error = {"code": self.code, "message": str(self)[:1000]}
        body = json.dumps({"errors": [error]}).encode()
        return Response(self.status, {"Content-Type": "application/json", **self.headers}, body)


def not_found(what: str) -> Refusal:
    return Refusal(404, f"{what}_UNKNOWN", f"{what.lower()} unknown")


def refusal(error: RunnerError) -> Refusal:
    """What the sandbox is told; whoever asked for the build is told everything elsewhere.

    Messages that may name paths or addresses of this host stay outside.
    """
    if isinstance(error, PolicyDenied):
        return not_found("NAME")
    if isinstance(error, (ImageNotFound, RegistryRefused)):
        return not_found("MANIFEST")
    if isinstance(error, LimitExceeded):
        # Builders try again after statuses from 500 on.
        message = error.message if isinstance(error, QuotaExceeded) else error.code
        return Refusal(413, "DENIED", message)
    return Refusal(
        502, "UNKNOWN", error.message if isinstance(error, RegistryError) else error.code
    )


def check_head(request: Request) -> None:
    """Refuses what another reader of the same head might take for another body."""
    if len(request.target) > TARGET_BYTES:
        raise Refusal(414, "UNSUPPORTED", "target too long")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "UNSUPPORTED", "bodies are taken as they are, not compressed")
    if request.headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refusal(417, "UNSUPPORTED", "no such expectation can be met")


def read_query(text: str) -> dict[str, str]:
    """Every parameter once; ``tag`` alone may be repeated, its values joined by spaces."""
    try:
        pairs = parse_qsl(text, max_num_fields=_QUERY_FIELDS, keep_blank_values=True)
    except ValueError:
        raise Refusal(400, "UNSUPPORTED", "malformed query") from None
    query: dict[str, str] = {}
    for name, value in pairs:
        if name in query and name != "tag":
            raise Refusal(400, "UNSUPPORTED", f"two values for {name[:50]!a}")
        query[name] = f"{query.get(name, '')} {value}" if name == "tag" else value
    return query


def read_digest(text: str) -> Digest:
    try:
        return Digest(text)
    except InvalidReference as error:
        raise Refusal(400, "DIGEST_INVALID", error.message) from None


def read_algorithm(query: Mapping[str, str]) -> str:
    algorithm = query.get("digest-algorithm", "sha256")
    if algorithm not in ALGORITHMS:
        raise Refusal(400, "DIGEST_INVALID", f"one of {', '.join(ALGORITHMS)} is computed")
    return algorithm


def read_reference(text: str) -> str | Digest:
    """A tag or a digest."""
    if ":" in text:
        return read_digest(text)
    if not _TAG.fullmatch(text):
        raise Refusal(404, "MANIFEST_UNKNOWN", "no such tag")
    return text


def read_tags(query: Mapping[str, str]) -> list[str]:
    """Those that a manifest pushed by digest shall have."""
    tags = query.get("tag", "").split()
    if not all(map(_TAG.fullmatch, tags)):
        raise Refusal(400, "TAG_INVALID", "no such tag can be")
    return tags


def read_page(tags: Sequence[str], query: Mapping[str, str]) -> tuple[list[str], bool]:
    """The tags that a listing asks for, and whether more would follow."""
    after = [tag for tag in tags if tag > query.get("last", "")]
    if "n" not in query:
        return after, False
    if not _NUMBER.fullmatch(query["n"]):
        raise Refusal(400, "PAGINATION_NUMBER_INVALID", "n is no number")
    count = int(query["n"])
    return after[:count], 0 < count < len(after)


def read_chunk(headers: Mapping[str, str], size: int) -> int | None:
    """Bytes of a chunk that says which part of the upload it is, behind ``size`` bytes.

    Raises:
        Refusal: It belongs elsewhere, or is not as long as it says.
    """
    header = headers.get("content-range")
    if header is None:
        return None
    match = _CHUNK.fullmatch(header)
    if match is None or int(match[1]) != size or int(match[2]) < int(match[1]):
        raise Refusal(416, "BLOB_UPLOAD_INVALID", "chunks must come in order")
    length = int(match[2]) - int(match[1]) + 1
    if headers.get("content-length", str(length)) != str(length):
        raise Refusal(400, "SIZE_INVALID", "Content-Range and Content-Length disagree")
    return length


def read_part(header: str | None, size: int) -> range | None:
    """The bytes of a blob that ``Range`` asks for; None for all of them.

    Raises:
        Refusal: It asks for none, or for several parts at once.
    """
    if header is None or not header.startswith("bytes="):
        return None  # another unit is to be ignored
    match = _PART.fullmatch(header)
    if match is not None and (match["first"] or match["last"]):
        if match["first"]:
            first, last = int(match["first"]), int(match["last"] or size)
        else:
            first, last = max(size - int(match["last"]), 0), size
        part = range(first, min(last + 1, size))
        if first <= last and part:
            return part
    headers = {"Content-Range": f"bytes */{size}"}
    raise Refusal(416, "SIZE_INVALID", "one part of the blob can be had at a time", headers)


def accepts(header: str | None, media_type: str) -> bool:
    """Whether a client that names some kinds of manifests takes this one."""
    asked = {item.partition(";")[0].strip() for item in (header or "").split(",")}
    known = asked.intersection(MANIFEST_TYPES + INDEX_TYPES)
    return not known or media_type in known or not asked.isdisjoint({"*/*", "application/*"})
