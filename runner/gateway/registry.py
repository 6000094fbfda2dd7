"""The registry that a sandbox sees: pull-through below host names, one repository to push to.

The pull and push workflows of the OCI distribution specification 1.1, as far as builders use
them. What is outside the session's reachable set answers 404, as if it did not exist.
"""

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

from policies.errors import InvalidReference
from policies.reference import Digest, ImageReference
from runner.errors import (
    ImageNotFound,
    LimitExceeded,
    PolicyDenied,
    QuotaExceeded,
    RegistryError,
    RegistryRefused,
    RunnerError,
    VerificationFailed,
)
from runner.files import disk_full_is_a_limit
from runner.gateway.http import Request, Response
from runner.gateway.staging import Sealed, Staging, Upload, UploadBusy, UploadUnknown
from runner.gateway.upstream import Upstream
from runner.publish import check_destination
from runner.registry.image import INDEX_TYPES, MANIFEST_TYPES, Index, parse_document
from runner.settings import HttpLimits

REPOSITORY = "staged/image"
"""Where builders push; nothing else can be pushed to."""

_NAME = (
    r"(?P<name>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
)
_MANIFEST = re.compile(rf"/v2/{_NAME}/manifests/(?P<reference>[A-Za-z0-9_.:-]{{1,200}})")
_BLOB = re.compile(rf"/v2/{_NAME}/blobs/(?P<digest>[a-z0-9]+:[0-9a-f]{{1,128}})")
_UPLOADS = re.compile(rf"/v2/{_NAME}/blobs/uploads/")
_UPLOAD = re.compile(rf"/v2/{_NAME}/blobs/uploads/(?P<id>[0-9a-f]{{32}})")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_TARGET_BYTES = 2048


class Refusal(Exception):
    """An error of the specification, with its code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def response(self) -> Response:
        error = {"code": self.code, "message": str(self)[:1000]}
        body = json.dumps({"errors": [error]}).encode()
        return Response(self.status, {"Content-Type": "application/json"}, body)


def _not_found(what: str) -> Refusal:
    return Refusal(404, f"{what}_UNKNOWN", f"{what.lower()} unknown")


def _refusal(error: RunnerError) -> Refusal:
    """What the sandbox is told; whoever asked for the build is told everything elsewhere.

    Messages that may name paths or addresses of this host stay outside.
    """
    if isinstance(error, PolicyDenied):
        return _not_found("NAME")
    if isinstance(error, (ImageNotFound, RegistryRefused)):
        return _not_found("MANIFEST")
    if isinstance(error, LimitExceeded):
        # Builders try again after statuses from 500 on.
        message = error.message if isinstance(error, QuotaExceeded) else error.code
        return Refusal(413, "DENIED", message)
    return Refusal(
        502, "UNKNOWN", error.message if isinstance(error, RegistryError) else error.code
    )


class RegistryEndpoint:
    """Routes one session's requests. Usable by several threads."""

    def __init__(
        self,
        upstreams: Mapping[str, str],
        upstream: Upstream,
        staging: Staging,
        limits: HttpLimits,
        failed: Callable[[RunnerError], None],
    ) -> None:
        """``upstreams``: first path component to registry host. ``failed`` hears why we refused."""
        self._upstreams = upstreams
        self._upstream = upstream
        self._staging = staging
        self._limits = limits
        self._failed = failed
        self._parsing = threading.Lock()
        self._routes = (
            (_MANIFEST, {"GET": self._get_manifest, "PUT": self._put_manifest}),
            (_UPLOADS, {"POST": self._start_upload}),
            (
                _UPLOAD,
                {
                    "GET": self._upload_status,
                    "PATCH": self._patch_upload,
                    "PUT": self._finish_upload,
                    "DELETE": self._cancel_upload,
                },
            ),
            (_BLOB, {"GET": self._get_blob}),
        )

    def answer(self, request: Request) -> Response:
        """Never raises for what a request asks."""
        try:
            with disk_full_is_a_limit(self._staging.store.directory):
                return self._route(request)
        except Refusal as refusal:
            return refusal.response()
        except UploadUnknown:
            return _not_found("BLOB_UPLOAD").response()
        except UploadBusy:
            busy = "another request writes this upload"
            return Refusal(409, "BLOB_UPLOAD_INVALID", busy).response()
        except Sealed:
            return Refusal(403, "DENIED", "the session is over").response()
        except RunnerError as error:
            self._failed(error)
            return _refusal(error).response()

    def _route(self, request: Request) -> Response:
        path, _, query = request.target.partition("?")
        if len(request.target) > _TARGET_BYTES:
            raise Refusal(414, "UNSUPPORTED", "target too long")
        if path in {"/v2/", "/v2"} and request.method in {"GET", "HEAD"}:
            return Response(200, {"Content-Type": "application/json"}, b"{}")
        method = "GET" if request.method == "HEAD" else request.method
        for pattern, methods in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                if method not in methods:
                    raise Refusal(405, "UNSUPPORTED", "method not allowed")
                return methods[method](match, _query(query), request)
        raise _not_found("NAME")

    # -- pulling ---------------------------------------------------------------------------

    def _image(self, name: str) -> tuple[str, str] | None:
        """Registry host and repository that ``name`` stands for; None for our own repository."""
        if name == REPOSITORY:
            return None
        alias, _, repository = name.partition("/")
        host = self._upstreams.get(alias)
        if host is None or not repository:
            raise _not_found("NAME")
        return host, repository

    def _get_manifest(
        self, match: re.Match[str], _: Mapping[str, str], request: Request
    ) -> Response:
        place = self._image(match["name"])
        if place is None:
            staged = self._staging.manifest(match["reference"])
            if staged is None:
                raise _not_found("MANIFEST")
            descriptor, data = staged
        else:
            tag, digest = _tag_or_digest(match["reference"])
            image = ImageReference(*place, tag, digest)
            descriptor, data = self._upstream.resolve(image)
        del request
        headers = {
            "Content-Type": descriptor.media_type,
            "Docker-Content-Digest": str(descriptor.digest),
        }
        return Response(200, headers, data, len(data))

    def _get_blob(self, match: re.Match[str], _: Mapping[str, str], request: Request) -> Response:
        self._image(match["name"])
        digest = _digest(match["digest"])
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": str(digest),
        }
        size = self._staging.size(digest)
        if request.method == "HEAD" and size is not None:
            return Response(200, headers, length=size)
        try:
            content, size = self._staging.open(digest) or self._upstream.open_blob(digest)
        except FileNotFoundError:
            raise _not_found("BLOB") from None
        return Response(200, headers, content, size)

    # -- pushing ---------------------------------------------------------------------------

    def _own(self, match: re.Match[str]) -> None:
        if match["name"] != REPOSITORY:
            raise Refusal(403, "DENIED", f"only {REPOSITORY} can be pushed to")

    def _start_upload(
        self, match: re.Match[str], query: Mapping[str, str], request: Request
    ) -> Response:
        self._own(match)
        if "mount" in query and self._staging.sees(digest := _digest(query["mount"])):
            return _created(f"/v2/{REPOSITORY}/blobs/{digest}", digest)
        if "digest" not in query:
            return _accepted(self._staging.start(secrets.token_hex(16)))
        digest = _digest(query["digest"])
        with self._staging.start(secrets.token_hex(16)) as upload:
            try:
                return self._finish(upload, digest, request)
            finally:
                self._staging.cancel(upload)  # the peer was never told its name

    def _upload(self, match: re.Match[str]) -> Upload:
        self._own(match)
        return self._staging.upload(match["id"])

    def _upload_status(
        self, match: re.Match[str], _: Mapping[str, str], request: Request
    ) -> Response:
        del request
        with self._upload(match) as upload:
            response = _accepted(upload)
            response.status = 204
            return response

    def _patch_upload(
        self, match: re.Match[str], _: Mapping[str, str], request: Request
    ) -> Response:
        with self._upload(match) as upload:
            _check_range(request.headers.get("content-range"), upload.size)
            for piece in request.body:
                upload.write(piece)
            return _accepted(upload)

    def _finish_upload(
        self, match: re.Match[str], query: Mapping[str, str], request: Request
    ) -> Response:
        if "digest" not in query:
            raise Refusal(400, "DIGEST_INVALID", "no digest")
        digest = _digest(query["digest"])
        with self._upload(match) as upload:
            _check_range(request.headers.get("content-range"), upload.size)
            return self._finish(upload, digest, request)

    def _finish(self, upload: Upload, digest: Digest, request: Request) -> Response:
        for piece in request.body:
            upload.write(piece)
        if not self._staging.finish(upload, digest):
            raise Refusal(400, "DIGEST_INVALID", "the bytes have another digest")
        return _created(f"/v2/{REPOSITORY}/blobs/{digest}", digest)

    def _cancel_upload(
        self, match: re.Match[str], _: Mapping[str, str], request: Request
    ) -> Response:
        del request
        with self._upload(match) as upload:
            self._staging.cancel(upload)
        return Response(204)

    def _put_manifest(
        self, match: re.Match[str], _: Mapping[str, str], request: Request
    ) -> Response:
        self._own(match)
        tag, digest = _tag_or_digest(match["reference"])
        if tag is not None:
            _check_tag(tag)
        media_type = request.headers.get("content-type", "")
        if media_type not in (*MANIFEST_TYPES, *INDEX_TYPES):
            raise Refusal(400, "MANIFEST_INVALID", "no media type of an image manifest")
        received = bytearray()  # grows in place, in however small pieces it comes
        for piece in request.body:
            received += piece
            if len(received) > self._limits.manifest_bytes:
                raise Refusal(413, "SIZE_INVALID", "manifest too long")
        data = bytes(received)
        found = Digest.of(data)
        if digest is not None and digest != found:
            raise Refusal(400, "DIGEST_INVALID", "the manifest has another digest")
        try:
            with self._parsing:  # a document takes ten times its size while it is parsed
                parsed = parse_document(data, media_type)
        except VerificationFailed as error:
            raise Refusal(400, "MANIFEST_INVALID", error.message) from None
        if parsed.subject is not None:
            raise Refusal(400, "MANIFEST_INVALID", "referrers are not taken from a sandbox")
        children = (
            [entry.descriptor for entry in parsed.manifests]
            if isinstance(parsed, Index)
            else [parsed.config, *parsed.layers]
        )
        for child in children:
            if not self._staging.sees(child.digest):
                raise Refusal(404, "MANIFEST_BLOB_UNKNOWN", f"{child.digest} is unknown")
        self._staging.take_manifest(tag, media_type, data)
        return _created(f"/v2/{REPOSITORY}/manifests/{found}", found)


def _query(query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, max_num_fields=8, keep_blank_values=True))
    except ValueError:
        raise Refusal(400, "UNSUPPORTED", "malformed query") from None


def _digest(text: str) -> Digest:
    try:
        return Digest(text)
    except InvalidReference as error:
        raise Refusal(400, "DIGEST_INVALID", error.message) from None


def _tag_or_digest(text: str) -> tuple[str | None, Digest | None]:
    if ":" in text:
        return None, _digest(text)
    if not _TAG.fullmatch(text):
        raise Refusal(404, "MANIFEST_UNKNOWN", "no such tag")
    return text, None


def _check_tag(tag: str) -> None:
    try:
        check_destination(ImageReference("localhost", REPOSITORY, tag))
    except PolicyDenied as error:
        raise Refusal(403, "DENIED", error.message) from None


def _check_range(header: str | None, size: int) -> None:
    if header is None:
        return
    match = _RANGE.fullmatch(header)
    if match is None or int(match[1]) != size or int(match[2]) < int(match[1]):
        raise Refusal(416, "BLOB_UPLOAD_INVALID", "chunks must come in order")


def _accepted(upload: Upload) -> Response:
    headers = {
        "Location": f"/v2/{REPOSITORY}/blobs/uploads/{upload.id}",
        "Range": f"0-{max(upload.size - 1, 0)}",
        "Docker-Upload-UUID": upload.id,
    }
    return Response(202, headers)


def _created(location: str, digest: Digest) -> Response:
    return Response(201, {"Location": location, "Docker-Content-Digest": str(digest)})
