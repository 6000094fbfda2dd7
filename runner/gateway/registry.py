"""The registry that a sandbox sees: pull-through below host names, one repository to push to.

The OCI distribution specification 1.1. What is outside the session's reachable set answers 404,
as if it did not exist. Where the endpoint stands alone the code is the same: ``Rules`` differ.
"""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

from policies.reference import Digest, ImageReference
from runner.errors import PolicyDenied, RunnerError, VerificationFailed
from runner.files import disk_full_is_a_limit
from runner.gateway import grammar
from runner.gateway.documents import Document, Referrer, read_artifact, read_image
from runner.gateway.grammar import Refusal, not_found, read_digest, refusal
from runner.gateway.http import Request, Response
from runner.gateway.staging import (
    CHUNK_BYTES,
    Room,
    Sealed,
    Staged,
    Staging,
    Upload,
    UploadBusy,
    UploadUnknown,
)
from runner.publish import check_destination
from runner.registry.image import OCI_INDEX, Descriptor
from runner.settings import HttpLimits

REPOSITORY = "staged/image"
"""Where builders push; nothing else can be pushed to."""
_MANIFESTS_AT_A_TIME = 4
_PATIENCE_SECONDS = 10.0
"""Until a client is told to come again."""


class Pulls(Protocol):
    """Where base images come from."""

    def resolve(self, image: ImageReference) -> tuple[Descriptor, bytes]:
        """The manifest or index of ``image``. Raises BaseImageDenied, RegistryError."""

    def open_blob(self, digest: Digest, name: str) -> tuple[BinaryIO, int]:
        """A blob that some resolved manifest names. Raises FileNotFoundError for all others."""


def _no_signature(tag: str) -> None:
    check_destination(ImageReference("localhost", REPOSITORY, tag))


def _any_tag(tag: str) -> None:
    del tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All that tells a session's endpoint from one that stands alone; they run the same code."""

    read: Callable[[bytes, str], Document]
    """Raises VerificationFailed for a manifest that may not be pushed."""
    check_tag: Callable[[str], None]
    """Raises PolicyDenied for a tag that may not be pushed."""
    room: Room
    """In one repository."""
    is_managed: bool
    """Whether referrers are listed, and tags, manifests and blobs can be deleted."""


SESSION = Rules(read=read_image, check_tag=_no_signature, room=Room(), is_managed=False)
STANDALONE = Rules(
    read=read_artifact,
    check_tag=_any_tag,
    room=Room(uploads=1024, blobs=1_000_000, tags=100_000),
    is_managed=True,
)

_Query = Mapping[str, str]
_Method = Callable[[re.Match[str], _Query, Request], Response]
_Routes = list[tuple[re.Pattern[str], dict[str, _Method]]]


class RegistryEndpoint:
    """Routes one session's requests. Usable by several threads."""

    def __init__(
        self,
        repositories: Mapping[str, Staging],
        upstreams: Mapping[str, str],
        pulls: Pulls,
        *,
        limits: HttpLimits,
        failed: Callable[[RunnerError], None],
        rules: Rules = SESSION,
    ) -> None:
        """Opens nothing.

        Args:
            repositories: That can be pushed to, by name.
            upstreams: First path component of the others to registry host.
            pulls: Where those come from.
            limits: On what is read.
            failed: Hears why we refused.
            rules: What can be pushed, and whether it can be removed again.
        """
        self._repositories = repositories
        self._own_blobs = next(iter(repositories.values()))
        self._upstreams = upstreams
        self._pulls = pulls
        self._limits = limits
        self._failed = failed
        self._rules = rules
        self._parsing = threading.Lock()
        self._reading = threading.BoundedSemaphore(_MANIFESTS_AT_A_TIME)
        self._routes = self._made_routes()

    def _made_routes(self) -> _Routes:
        manifests: dict[str, _Method] = {"GET": self._get_manifest, "PUT": self._put_manifest}
        blobs: dict[str, _Method] = {"GET": self._get_blob}
        uploads: dict[str, _Method] = {
            "GET": self._upload_status,
            "PATCH": self._patch_upload,
            "PUT": self._finish_upload,
            "DELETE": self._cancel_upload,
        }
        routes: _Routes = [
            (grammar.MANIFEST, manifests),
            (grammar.UPLOADS, {"POST": self._start_upload}),
            (grammar.UPLOAD, uploads),
            (grammar.BLOB, blobs),
            (grammar.TAGS, {"GET": self._list_tags}),
        ]
        if self._rules.is_managed:
            manifests["DELETE"] = self._delete_manifest
            blobs["DELETE"] = self._delete_blob
            routes.append((grammar.REFERRERS, {"GET": self._list_referrers}))
        return routes

    def answer(self, request: Request) -> Response:
        """Never raises for what a request asks."""
        try:
            with disk_full_is_a_limit(self._own_blobs.store.directory):
                return self._route(request)
        except Refusal as error:
            return error.response()
        except UploadUnknown:
            return not_found("BLOB_UPLOAD").response()
        except UploadBusy:
            busy = "another request writes this upload"
            return Refusal(409, "BLOB_UPLOAD_INVALID", busy).response()
        except Sealed:
            return Refusal(403, "DENIED", "the session is over").response()
        except RunnerError as error:
            self._failed(error)
            return refusal(error).response()

    def _route(self, request: Request) -> Response:
        grammar.check_head(request)
        path, _, query = request.target.partition("?")
        if path in {"/v2/", "/v2"} and request.method in {"GET", "HEAD"}:
            return _document({})
        method = "GET" if request.method == "HEAD" else request.method
        for pattern, methods in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                if method not in methods:
                    allowed = {"Allow": ", ".join(methods)}
                    raise Refusal(405, "UNSUPPORTED", "method not allowed", allowed)
                return methods[method](match, grammar.read_query(query), request)
        raise not_found("NAME")

    # -- pulling ---------------------------------------------------------------------------

    def _image(self, name: str) -> tuple[str, str] | None:
        """Registry host and repository that ``name`` stands for; None for one of our own."""
        if name in self._repositories:
            return None
        alias, _, repository = name.partition("/")
        host = self._upstreams.get(alias)
        if host is None or not repository:
            raise not_found("NAME")
        return host, repository

    def _get_manifest(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        place = self._image(match["name"])
        name = grammar.read_reference(match["reference"])
        found: tuple[Descriptor, bytes | BinaryIO] | None
        if place is not None:
            image = ImageReference(*place)
            named = image.at(name) if isinstance(name, Digest) else replace(image, tag=name)
            found = self._pulls.resolve(named)
        else:
            found = self._repositories[match["name"]].manifest(name)
        if found is None:
            raise not_found("MANIFEST")
        descriptor, content = found
        if not grammar.accepts(request.headers.get("accept"), descriptor.media_type):
            if not isinstance(content, bytes):
                content.close()
            kind = f"this is a {descriptor.media_type}, which the request does not accept"
            raise Refusal(404, "MANIFEST_UNKNOWN", kind)
        headers = {
            "Content-Type": descriptor.media_type,
            "Docker-Content-Digest": str(descriptor.digest),
        }
        return Response(200, headers, content, descriptor.size)

    def _get_blob(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        place = self._image(match["name"])
        # To a session its own blobs and those of its base images are one set.
        staging = self._repositories.get(match["name"], self._own_blobs)
        digest = read_digest(match["digest"])
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": str(digest),
            "Accept-Ranges": "bytes",
        }
        if request.method == "HEAD" and (size := staging.size(digest)) is not None:
            return Response(200, headers, length=size)
        try:
            name = "/".join(place) if place is not None else ""
            content, size = staging.open(digest) or self._pulls.open_blob(digest, name)
        except FileNotFoundError:
            raise not_found("BLOB") from None
        try:
            part = grammar.read_part(request.headers.get("range"), size)
        except Refusal:
            content.close()
            raise
        if part is None:
            return Response(200, headers, content, size)
        content.seek(part.start)
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        return Response(206, headers, content, len(part))

    # -- what there is ---------------------------------------------------------------------

    def _list_tags(self, match: re.Match[str], query: _Query, _: Request) -> Response:
        staging = self._repositories.get(match["name"])
        if staging is None:  # the tags of a base image are not a part of the reachable set
            raise not_found("NAME")
        tags, more = grammar.read_page(staging.tags(), query)
        response = _document({"name": match["name"], "tags": tags})
        if more:
            url = f"/v2/{match['name']}/tags/list?n={len(tags)}&last={tags[-1]}"
            response.headers["Link"] = f'<{url}>; rel="next"'
        return response

    def _list_referrers(self, match: re.Match[str], query: _Query, _: Request) -> Response:
        kind = query.get("artifactType")
        found = self._own(match).referrers(read_digest(match["digest"])).items()
        listed = [_described(*item) for item in found if kind in {None, item[1].artifact_type}]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
        response = _document(index)
        response.headers["Content-Type"] = OCI_INDEX
        if kind is not None:
            response.headers["OCI-Filters-Applied"] = "artifactType"
        return response

    # -- pushing ---------------------------------------------------------------------------

    def _own(self, match: re.Match[str]) -> Staging:
        staging = self._repositories.get(match["name"])
        if staging is None:
            names = " or ".join(self._repositories)
            raise Refusal(403, "DENIED", f"only {names} can be pushed to")
        return staging

    def _start_upload(self, match: re.Match[str], query: _Query, request: Request) -> Response:
        staging, name = self._own(match), match["name"]
        if "mount" in query:
            digest = read_digest(query["mount"])
            named = self._repositories.get(query.get("from", ""))
            sources = [named] if named is not None else self._repositories.values()
            if any(staging.mount(digest, source) for source in sources):
                return _created(f"/v2/{name}/blobs/{digest}", digest)
        algorithm = grammar.read_algorithm(query)
        if "digest" not in query:
            upload = staging.start(secrets.token_hex(16), algorithm)
            response = _accepted(name, upload)
            response.headers["OCI-Chunk-Min-Length"] = str(CHUNK_BYTES)
            return response
        digest = read_digest(query["digest"])
        with staging.start(secrets.token_hex(16), digest.algorithm) as upload:
            try:
                return self._finish(match, upload, digest, request)
            finally:
                staging.cancel(upload)  # the peer was never told its name

    def _upload(self, match: re.Match[str]) -> Upload:
        return self._own(match).upload(match["id"])

    def _upload_status(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        del request
        with self._upload(match) as upload:
            response = _accepted(match["name"], upload)
            response.status = 204
            return response

    def _patch_upload(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        with self._upload(match) as upload:
            upload.begin_chunk()
            self._receive(match, upload, request)
            return _accepted(match["name"], upload)

    def _finish_upload(self, match: re.Match[str], query: _Query, request: Request) -> Response:
        if "digest" not in query:
            raise Refusal(400, "DIGEST_INVALID", "no digest")
        digest = read_digest(query["digest"])
        with self._upload(match) as upload:
            return self._finish(match, upload, digest, request)

    def _finish(
        self, match: re.Match[str], upload: Upload, digest: Digest, request: Request
    ) -> Response:
        if upload.size == 0:
            upload.hash_with(digest.algorithm)
        self._receive(match, upload, request)
        if not self._own(match).finish(upload, digest):
            raise Refusal(400, "DIGEST_INVALID", "the bytes have another digest")
        return _created(f"/v2/{match['name']}/blobs/{digest}", digest)

    def _receive(self, match: re.Match[str], upload: Upload, request: Request) -> None:
        """Writes a body. A chunk not as long as it says ends the upload, which it spoilt."""
        try:
            length = grammar.read_chunk(request.headers, upload.size)
        except Refusal as error:
            where = _accepted(match["name"], upload).headers if error.status == _RANGE else {}
            raise Refusal(error.status, error.code, str(error), where) from None
        end = None if length is None else upload.size + length
        for piece in request.body:
            upload.write(piece)
        if end not in {None, upload.size}:
            self._own(match).cancel(upload)
            raise Refusal(400, "SIZE_INVALID", "the chunk is not as long as its Content-Range")

    def _cancel_upload(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        del request
        with self._upload(match) as upload:
            self._own(match).cancel(upload)
        return Response(204)

    def _put_manifest(self, match: re.Match[str], query: _Query, request: Request) -> Response:
        """A few at a time: each stays in memory while it comes, and that may take long."""
        if not self._reading.acquire(timeout=_PATIENCE_SECONDS):
            raise Refusal(429, "TOOMANYREQUESTS", "too many manifests at a time")
        try:
            return self._take_manifest(match, query, request)
        finally:
            self._reading.release()

    def _take_manifest(self, match: re.Match[str], query: _Query, request: Request) -> Response:
        staging = self._own(match)
        name = grammar.read_reference(match["reference"])
        tags = grammar.read_tags(query) if isinstance(name, Digest) else [name]
        for tag in tags:
            try:
                self._rules.check_tag(tag)
            except PolicyDenied as error:
                raise Refusal(403, "DENIED", error.message) from None
        data = self._small(request)
        algorithm = name.algorithm if isinstance(name, Digest) else "sha256"
        digest = Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")
        if isinstance(name, Digest) and digest != name:
            raise Refusal(400, "DIGEST_INVALID", "the manifest has another digest")
        media_type = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            with self._parsing:  # a document takes ten times its size while it is parsed
                document = self._rules.read(data, media_type)
        except VerificationFailed as error:
            raise Refusal(400, "MANIFEST_INVALID", error.message) from None
        for child in document.children:
            if not staging.sees(child):
                raise Refusal(404, "MANIFEST_BLOB_UNKNOWN", f"{child} is unknown")
        staged = Staged(Descriptor(media_type, digest, len(data)), document.referrer)
        staging.take_manifest(tags, staged, data)
        response = _created(f"/v2/{match['name']}/manifests/{digest}", digest)
        if document.referrer is not None:
            response.headers["OCI-Subject"] = str(document.referrer.subject)
        if "tag" in query and tags:
            response.headers["OCI-Tag"] = ", ".join(tags)
        return response

    def _small(self, request: Request) -> bytes:
        received = bytearray()  # grows in place, in however small pieces it comes
        for piece in request.body:
            received += piece
            if len(received) > self._limits.manifest_bytes:
                raise Refusal(413, "SIZE_INVALID", "manifest too long")
        return bytes(received)

    # -- removing --------------------------------------------------------------------------

    def _delete_manifest(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        del request
        if not self._own(match).remove_manifest(grammar.read_reference(match["reference"])):
            raise not_found("MANIFEST")
        return Response(202)

    def _delete_blob(self, match: re.Match[str], _: _Query, request: Request) -> Response:
        del request
        if not self._own(match).remove_blob(read_digest(match["digest"])):
            raise not_found("BLOB")
        return Response(202)


_RANGE = 416


def _document(value: object) -> Response:
    return Response(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _described(descriptor: Descriptor, referrer: Referrer) -> dict[str, object]:
    described: dict[str, object] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if referrer.artifact_type:
        described["artifactType"] = referrer.artifact_type
    if referrer.annotations:
        described["annotations"] = dict(referrer.annotations)
    return described


def _accepted(name: str, upload: Upload) -> Response:
    headers = {
        "Location": f"/v2/{name}/blobs/uploads/{upload.id}",
        "Range": f"0-{max(upload.size - 1, 0)}",
        "Docker-Upload-UUID": upload.id,
    }
    return Response(202, headers)


def _created(location: str, digest: Digest) -> Response:
    return Response(201, {"Location": location, "Docker-Content-Digest": str(digest)})
