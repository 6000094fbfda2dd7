import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from policies.reference import Digest, ImageReference
from runner import verify
from runner.errors import RegistryRefused, RunnerError, VerificationFailed
from runner.layers import Special
from runner.publish import BlobProgress, PublishEvent, publish
from runner.registry.auth import Anonymous, DockerConfig
from runner.registry.client import RegistryClient
from runner.registry.image import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.verify import VerifiedImage

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = pytest.mark.registry

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


class Memory:
    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {Digest.of(blob): blob for blob in blobs}

    def size(self, digest: Digest) -> int | None:
        found = self.blobs.get(digest)
        return None if found is None else len(found)

    def open(self, digest: Digest) -> BinaryIO:
        return io.BytesIO(self.blobs[digest])


def described(media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(data), "size": len(data), **more}


def image_of(layers: int = 6) -> VerifiedImage:
    """An index over one manifest with random layers, as verify would give it."""
    blobs = [os.urandom(300_000) for _ in range(layers)]
    platform = {"architecture": "amd64", "os": "linux"}
    diff_ids = [Digest.of(blob) for blob in blobs]
    config = json.dumps({**platform, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    head = {"schemaVersion": 2, "mediaType": OCI_MANIFEST}
    manifest = json.dumps(
        {
            **head,
            "config": described(OCI_CONFIG, config),
            "layers": [described(LAYER_TYPE, blob) for blob in blobs],
        }
    ).encode()
    index = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [described(OCI_MANIFEST, manifest, platform=platform)],
        }
    ).encode()
    return VerifiedImage(
        root=Descriptor(OCI_INDEX, Digest.of(index), len(index)),
        documents={Digest.of(index): index, Digest.of(manifest): manifest},
        media_types={Digest.of(index): OCI_INDEX, Digest.of(manifest): OCI_MANIFEST},
        blobs_needed=(
            Descriptor(OCI_CONFIG, Digest.of(config), len(config)),
            *(Descriptor(LAYER_TYPE, Digest.of(blob), len(blob)) for blob in blobs),
        ),
        source=Memory(config, *blobs),
        platforms=("linux/amd64",),
        special=Special.NOTHING,
        key=verify._KEY,
    )


def test_an_image_is_published_and_another_client_agrees(
    registry: "RealRegistry", tmp_path: Path
) -> None:
    image = image_of()
    destination = ImageReference(registry.host, "publish/app", "1.2")
    with RegistryClient(registry.settings, Anonymous()) as client:
        published = publish(image, destination, client)
        assert client.manifest(destination)[0].digest == published.digest == image.root.digest
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed: apt-get install skopeo")
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}', encoding="ascii")
    subprocess.run(
        [skopeo, "--policy", policy, "copy", "--all", "--preserve-digests",
         "--src-tls-verify=false", f"docker://{destination}", f"oci:{tmp_path / 'image'}:x"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    index = json.loads((tmp_path / "image" / "index.json").read_bytes())
    assert index["manifests"][0]["digest"] == image.root.digest


def test_a_second_publish_sends_nothing(registry: "RealRegistry") -> None:
    image = image_of(2)
    events: list[PublishEvent] = []
    with RegistryClient(registry.settings, Anonymous()) as client:
        publish(image, ImageReference(registry.host, "publish/twice", "1"), client)
        destination = ImageReference(registry.host, "publish/twice", "2")
        publish(image, destination, client, report=events.append)
        assert client.manifest(destination)[0].digest == image.root.digest
    assert all(event.present for event in events if isinstance(event, BlobProgress))


def test_a_broken_publish_leaves_the_old_tag_and_can_be_taken_up(
    registry: "RealRegistry",
) -> None:
    old, new = image_of(1), image_of(3)
    destination = ImageReference(registry.host, "publish/broken", "1")
    assert isinstance(new.source, Memory)
    lost = new.blobs_needed[-1].digest
    whole = new.source.blobs[lost]
    with RegistryClient(registry.settings, Anonymous()) as client:
        publish(old, destination, client)
        new.source.blobs[lost] = whole[:-1]
        with pytest.raises(VerificationFailed):
            publish(new, destination, client)
        assert client.manifest(destination)[0].digest == old.root.digest
        new.source.blobs[lost] = whole[:-1] + bytes([whole[-1] ^ 1])
        with pytest.raises(RunnerError, match="DIGEST_INVALID"):
            publish(new, destination, client)
        assert client.manifest(destination)[0].digest == old.root.digest
        new.source.blobs[lost] = whole
        publish(new, destination, client)
        assert client.manifest(destination)[0].digest == new.root.digest


def test_publishing_needs_the_login(
    locked_registry: "RealRegistry", docker_login: dict[str, str]
) -> None:
    image = image_of(1)
    destination = ImageReference(locked_registry.host, "publish/locked", "1")
    with (
        RegistryClient(locked_registry.settings, Anonymous()) as client,
        pytest.raises(RegistryRefused),
    ):
        publish(image, destination, client)
    with RegistryClient(locked_registry.settings, DockerConfig(docker_login)) as client:
        assert publish(image, destination, client).digest == image.root.digest
