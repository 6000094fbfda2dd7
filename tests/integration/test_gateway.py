"""The gateway between a builder and a real registry."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import RegistryRefused, RegistryUnreachable
from runner.registry.auth import Anonymous, DockerConfig
from runner.registry.client import RegistryClient
from runner.settings import RegistrySettings, Settings
from runner.verify import verify
from tests.support.gateway import PUSH, Gate, Gates, decision
from tests.support.images import MemoryBlobs, make_image

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = pytest.mark.registry


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    with Gates(tmp_path) as made:
        yield made


def push(client: RegistryClient, reference: ImageReference, compression: str = "gzip") -> Digest:
    """A small sound image, straight to the registry."""
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs, compression=compression).root
    for digest, data in blobs.blobs.items():
        if digest != root.digest:
            client.push_blob(reference, digest, len(data), lambda digest=digest: blobs.open(digest))  # type: ignore[misc] # the default binds it
    client.put_manifest(reference, root.media_type, blobs.blobs[root.digest])
    return root.digest


def open_gate(gates: Gates, registry: "RealRegistry", **fields: object) -> tuple[Gate, str]:
    """A session that may start from all of ``registry``, and its name there."""
    base = ((f"{registry.host}/**",),)
    hosts = (registry.host,)
    named = {"settings": registry.settings, "base_images": base, **fields}
    gate = gates.open(fake=False, hosts=hosts, **named)  # type: ignore[arg-type] # named parts of Gates.open
    return gate, gate.session.aliases[registry.host]


def test_an_image_goes_through_and_comes_back_verified(
    registry: "RealRegistry", gates: Gates
) -> None:
    reference = ImageReference(registry.host, "gateway/base", "1")
    with RegistryClient(registry.settings, Anonymous()) as client:
        digest = push(client, reference)
    gate, alias = open_gate(gates, registry)
    answer = gate.ask("GET", f"/v2/{alias}/gateway/base/manifests/1")
    assert Digest.of(answer.body) == digest == answer.headers["Docker-Content-Digest"]
    manifest = json.loads(answer.body)
    for blob in (manifest["config"], *manifest["layers"]):
        got = gate.ask("GET", f"/v2/{alias}/gateway/base/blobs/{blob['digest']}")
        assert Digest.of(got.body) == blob["digest"]
        mounted = gate.ask("POST", f"{PUSH}/blobs/uploads/?mount={blob['digest']}")
        assert mounted.status == 201
    assert gate.put_manifest("latest", answer.body).status == 201
    verified = verify(
        gate.session.seal(), limits=decision().limits, platform="linux/amd64", claimed=digest
    )
    assert verified.root.digest == digest


def test_a_tag_that_moves_meanwhile_stays_what_it_was(
    registry: "RealRegistry", gates: Gates
) -> None:
    reference = ImageReference(registry.host, "gateway/moving", "1")
    gate, alias = open_gate(gates, registry)
    with RegistryClient(registry.settings, Anonymous()) as client:
        digest = push(client, reference)
        target = f"/v2/{alias}/gateway/moving/manifests/1"
        assert Digest.of(gate.ask("GET", target).body) == digest
        moved = push(client, reference, "zstd")
    assert moved != digest
    assert Digest.of(gate.ask("GET", target).body) == digest
    assert gate.ask("HEAD", target).headers["Docker-Content-Digest"] == digest
    by_digest = gate.ask("GET", target.removesuffix("1") + moved)
    assert Digest.of(by_digest.body) == moved


@pytest.mark.parametrize("named", [True, False])
def test_a_private_image_needs_the_decision_to_name_it(
    named: bool, locked_registry: "RealRegistry", docker_login: dict[str, str], gates: Gates
) -> None:
    credentials = DockerConfig(docker_login)
    reference = ImageReference(locked_registry.host, "team/private", "1")
    with RegistryClient(locked_registry.settings, credentials) as client:
        push(client, reference)
    patterns = ((reference.name if named else f"{locked_registry.host}/team/other",),)
    gate, alias = open_gate(
        gates, locked_registry, credentials=credentials, pull_credentials=patterns
    )
    answer = gate.ask("GET", f"/v2/{alias}/team/private/manifests/1")
    assert answer.status == (200 if named else 404)
    assert named or isinstance(gate.session.failure, RegistryRefused)


def test_a_registry_that_is_not_there_is_told_to_the_user(gates: Gates) -> None:
    here = RegistrySettings(plain_http=True, private_address=True)
    host = "127.0.0.1:1"
    limits = Settings().http.model_copy(update={"attempts": 1})
    gate = gates.open(
        fake=False,
        hosts=(host,),
        settings=Settings(registries={host: here}, http=limits),
        base_images=(("**",),),
    )
    assert gate.ask("GET", "/v2/127.0.0.1_1/base/manifests/1").status == 502
    assert isinstance(gate.session.failure, RegistryUnreachable)
