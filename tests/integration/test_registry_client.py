import io
import json
import os
from typing import TYPE_CHECKING

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import AddressDenied, ImageNotFound, RegistryProtocol, RegistryRefused
from runner.registry.auth import Anonymous, DockerConfig
from runner.registry.client import RegistryClient
from runner.registry.image import OCI_CONFIG, OCI_MANIFEST
from runner.settings import Settings

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = pytest.mark.registry

CONFIG = b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}'
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": Digest.of(CONFIG), "size": len(CONFIG)},
        "layers": [],
    }
).encode()


def push_image(client: RegistryClient, reference: ImageReference) -> None:
    digest = Digest.of(CONFIG)
    client.push_blob(reference, digest, len(CONFIG), lambda: io.BytesIO(CONFIG))
    client.put_manifest(reference, OCI_MANIFEST, MANIFEST)


def test_what_was_pushed_is_pulled(registry: "RealRegistry") -> None:
    reference = ImageReference(registry.host, "client/round-trip", "1")
    with RegistryClient(registry.settings, Anonymous()) as client:
        push_image(client, reference)
        descriptor, data = client.manifest(reference)
        assert data == MANIFEST
        assert descriptor.digest == Digest.of(MANIFEST)
        assert client.manifest(reference.at(descriptor.digest)) == (descriptor, data)
        assert client.has_blob(reference, Digest.of(CONFIG)) == len(CONFIG)
        with client.read_blob(reference, Digest.of(CONFIG), len(CONFIG)) as pieces:
            assert b"".join(pieces) == CONFIG


@pytest.mark.parametrize("size", [0, 1, 5_000_003])
def test_blobs_of_any_size_go_through(size: int, registry: "RealRegistry") -> None:
    reference = ImageReference(registry.host, "client/sizes", "1")
    data = os.urandom(size)
    sent: list[int] = []
    with RegistryClient(registry.settings, Anonymous()) as client:
        client.push_blob(reference, Digest.of(data), size, lambda: io.BytesIO(data), sent.append)
        with client.read_blob(reference, Digest.of(data), None) as pieces:
            assert b"".join(pieces) == data
    assert max(sent, default=0) == size


def test_a_blob_that_is_not_its_digest_is_not_taken(registry: "RealRegistry") -> None:
    reference = ImageReference(registry.host, "client/liar", "1")
    with RegistryClient(registry.settings, Anonymous()) as client:
        with pytest.raises(RegistryProtocol, match="DIGEST_INVALID"):
            client.push_blob(reference, Digest.of(b"a"), 1, lambda: io.BytesIO(b"b"))
        assert client.has_blob(reference, Digest.of(b"a")) is None


def test_a_missing_image_is_not_found(registry: "RealRegistry") -> None:
    missing = ImageReference(registry.host, "client/missing", "1")
    with RegistryClient(registry.settings, Anonymous()) as client:
        with pytest.raises(ImageNotFound, match=r"MANIFEST_UNKNOWN|NAME_UNKNOWN"):
            client.manifest(missing)
        assert client.has_blob(missing, Digest.of(b"x")) is None
        with pytest.raises(ImageNotFound), client.read_blob(missing, Digest.of(b"x"), 1):
            pass


def test_a_mirror_is_used_and_the_origin_asked_for_the_rest(
    registry: "RealRegistry",
) -> None:
    here = registry.settings.registry(registry.host)
    origin = "origin.example"
    settings = Settings(
        registries={
            origin: here.model_copy(update={"mirrors": (f"{registry.host}/mirrored",)}),
            registry.host: here,
        }
    )
    with RegistryClient(registry.settings, Anonymous()) as client:
        push_image(client, ImageReference(registry.host, "mirrored/app", "1"))
    with RegistryClient(settings, Anonymous()) as client:
        assert client.manifest(ImageReference(origin, "app", "1"))[1] == MANIFEST


def test_nothing_is_asked_where_loopback_is_not_allowed(registry: "RealRegistry") -> None:
    reference = ImageReference(registry.host, "client/denied", "1")
    with RegistryClient(Settings(), Anonymous()) as client, pytest.raises(AddressDenied):
        client.manifest(reference)


def test_a_login_opens_a_locked_registry(
    locked_registry: "RealRegistry", docker_login: dict[str, str]
) -> None:
    reference = ImageReference(locked_registry.host, "client/locked", "1")
    with RegistryClient(locked_registry.settings, Anonymous()) as client:
        with pytest.raises(RegistryRefused, match="wants a login"):
            client.manifest(reference)
        with pytest.raises(RegistryRefused):
            push_image(client, reference)
    with RegistryClient(locked_registry.settings, DockerConfig(docker_login)) as client:
        push_image(client, reference)
        assert client.manifest(reference)[1] == MANIFEST


def test_a_wrong_password_is_refused(locked_registry: "RealRegistry") -> None:
    from runner.registry.auth import Login, Secret

    class Wrong:
        def for_host(self, host: str, repository: str = "") -> Login | None:
            return Login("pusher", Secret("wrong"))

    reference = ImageReference(locked_registry.host, "client/locked", "1")
    with (
        RegistryClient(locked_registry.settings, Wrong()) as client,
        pytest.raises(RegistryRefused, match="UNAUTHORIZED") as caught,
    ):
        client.manifest(reference)
    assert "wrong" not in caught.value.message
