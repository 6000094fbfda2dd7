"""``runner base`` as people run it: real sandboxes, and for the most part no registry anywhere."""

import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.reference import Digest
from runner.registry.image import OCI_INDEX, OCI_MANIFEST
from runner.settings import LocalSettings, Settings
from runner.stores.blobs import BlobStore
from runner.stores.unpacked import UnpackedStore
from tests.integration.conftest import needed
from tests.support.hosts import STRANGER, Person, Ran, read_until, write_context
from tests.support.images import HELLO_TAR, MemoryBlobs, make_image, make_index
from tests.support.toolbox import toolbox_tar

if TYPE_CHECKING:
    from runner.verify import StagedImage

pytestmark = pytest.mark.sandbox

IMAGE = "tools.example/library/toolbox:1"
OFFLINE = '[base_images]\noffline = true\nlocal = ["tools.example/library/*"]\n'
DOCKERFILE = f"FROM {IMAGE}\nRUN echo made > /made\n"


@pytest.fixture
def alone(place: Path, builders: Path) -> Person:
    """Somebody without a way out, and with an empty store."""
    return _without_a_way_out(place / "alone", builders, None)


@pytest.fixture(params=["as the tests' user", "as an ordinary user"])
def anyone(request: pytest.FixtureRequest, place: Path, builders: Path) -> Person:
    ordinary = request.param == "as an ordinary user"
    if ordinary and os.geteuid() != 0:
        pytest.skip("only root can become another user: run as root too")
    return _without_a_way_out(place / "anyone", builders, STRANGER if ordinary else None)


def _without_a_way_out(directory: Path, builders: Path, uid: int | None) -> Person:
    first = 2_000_000_000 + os.getpid() % 100_000 * 100 + 50
    settings = Settings(local=LocalSettings(first_uid=first, uids=8))
    person = Person.move_in(directory, settings, builders, uid)
    person.config.write_text(person.config.read_text() + OFFLINE)
    person.config.chmod(0o644)
    return person


@pytest.fixture(scope="module")
def layout(playground: Path) -> Path:
    """A small image with a shell, as ``skopeo copy ... oci:DIR:1`` makes it."""
    needed("skopeo")
    tar, made = playground / "toolbox-for-layout.tar", playground / "toolbox-layout"
    tar.write_bytes(toolbox_tar())
    skopeo("copy", "--quiet", f"tarball:{tar}", f"oci:{made}:1")
    subprocess.run(["chmod", "-R", "a+rX", made], check=True)
    return made


def skopeo(*arguments: str) -> None:
    subprocess.run(["skopeo", "--insecure-policy", *arguments], check=True, timeout=60)


def digest_of(layout: Path) -> Digest:
    index = json.loads((layout / "index.json").read_bytes())
    return Digest(index["manifests"][0]["digest"])


def written(directory: Path, image: "StagedImage") -> Path:
    """The image as a layout."""
    assert isinstance(image.blobs, MemoryBlobs)
    store = BlobStore(directory)
    for digest, data in image.blobs.blobs.items():
        store.path(digest).write_bytes(data)
    root = image.root
    entry = {"mediaType": root.media_type, "digest": root.digest, "size": root.size}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return directory


def policy(directory: Path, **default: Any) -> Path:
    """A policy that only states these fields; JSON is YAML."""
    document = {"apiVersion": "runner/v1alpha1", "name": "test", "default": default}
    path = directory / "policy.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def failed(person: Person, *arguments: str | Path, status: int, code: str) -> Ran:
    """``runner base pull`` that ends as told, with nothing in the store and nothing running."""
    ran = person.run("base", "pull", *arguments)
    assert (ran.status, ran.code, ran.stdout) == (status, code, ""), ran.stderr
    assert UnpackedStore(person.home.unpacked).all() == []
    assert list((person.home.unpacked / "blobs/sha256").iterdir()) == []
    person.assert_nothing_left()
    return ran


# -- without a way out ---------------------------------------------------------------------------


def test_a_host_without_a_registry_builds_from_a_tag_that_it_was_given(
    anyone: Person, layout: Path, place: Path
) -> None:
    context = write_context(place / "context", DOCKERFILE)
    before = anyone.run("submit", "--untrusted", context)
    assert (before.status, before.code) == (6, "image-not-found")
    assert "runner base pull IMAGE --from oci:DIR" in before.stderr
    pulled = anyone.run("base", "pull", IMAGE, "--from", f"oci:{layout}")
    assert (pulled.status, pulled.stdout) == (0, f"{digest_of(layout)}\n"), pulled.stderr
    anyone.assert_nothing_left()
    built = anyone.run("submit", "--untrusted", "--json", context)
    assert built.status == 0, built.stderr
    (resolved,) = built.events("resolved")
    assert resolved["digest"] == digest_of(layout)
    (result,) = [json.loads(path.read_bytes()) for path in anyone.home.builds.glob("*/result.json")
                 if json.loads(path.read_bytes())["status"] == 0]  # fmt: skip
    assert list(result["provided"].values()) in (["copied"], ["mounted"])
    assert result["starts_from"]["digest"] == digest_of(layout)
    anyone.assert_nothing_left()


def test_a_tar_of_the_layout_is_the_same_image_and_is_not_unpacked_again(
    alone: Person, layout: Path, place: Path
) -> None:
    tar = place / "image.tar"
    skopeo("copy", "--quiet", f"oci:{layout}:1", f"oci-archive:{tar}:1")
    first = alone.run("base", "pull", IMAGE, "--from", f"oci-archive:{tar}")
    (unpacked,) = UnpackedStore(alone.home.unpacked).all()
    again = alone.run("base", "pull", IMAGE, "--from", f"oci:{layout}:1")
    assert (first.status, again.status) == (0, 0), first.stderr + again.stderr
    assert first.stdout == again.stdout == f"{digest_of(layout)}\n"
    assert UnpackedStore(alone.home.unpacked).all() == [unpacked]


def test_what_was_removed_is_no_base_of_builds_any_more(
    alone: Person, layout: Path, place: Path
) -> None:
    assert alone.run("base", "pull", IMAGE, "--from", f"oci:{layout}").status == 0
    assert IMAGE in alone.run("base", "list").stdout
    assert alone.run("base", "verify").status == 0
    assert alone.run("base", "remove", IMAGE).status == 0
    assert alone.run("base", "list").stdout == ""
    context = write_context(place / "context", DOCKERFILE)
    assert alone.run("submit", "--untrusted", context).code == "image-not-found"


def test_an_image_that_no_offline_build_may_use_is_pulled_with_a_warning(
    alone: Person, layout: Path
) -> None:
    ran = alone.run("base", "pull", "other.example/toolbox:1", "--from", f"oci:{layout}")
    assert ran.status == 0
    assert "local of [base_images] in config.toml does not name it" in ran.stderr


def test_an_index_is_found_offline_by_its_tag_and_by_its_digest(
    alone: Person, layout: Path, place: Path
) -> None:
    indexed = place / "indexed"
    subprocess.run(["cp", "-r", layout, indexed], check=True)
    index = json.loads((indexed / "index.json").read_bytes())
    index["manifests"][0]["platform"] = {"os": "linux", "architecture": "amd64"}
    foreign = {"mediaType": OCI_MANIFEST, "digest": Digest.of(b"not copied"), "size": 10}
    foreign["platform"] = {"os": "linux", "architecture": "arm64"}
    index["manifests"].append(foreign)
    data = json.dumps({**index, "mediaType": OCI_INDEX}).encode()
    entry = {"mediaType": OCI_INDEX, "digest": BlobStore(indexed).add(data), "size": len(data)}
    (indexed / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    pulled = alone.run("base", "pull", IMAGE, "--from", f"oci:{indexed}")
    assert (pulled.status, pulled.stdout) == (0, f"{Digest.of(data)}\n"), pulled.stderr
    name = IMAGE.rpartition(":")[0]
    dockerfile = f"FROM {IMAGE}\nRUN true\nFROM {name}@{Digest.of(data)}\nRUN true\n"
    built = alone.run("submit", "--untrusted", write_context(place / "context", dockerfile))
    assert built.status == 0, built.stderr
    assert len(UnpackedStore(alone.home.unpacked).all()) == 1


# -- what ends a pull ----------------------------------------------------------------------------


def test_a_pull_that_policy_forbids_reads_nothing(alone: Person, place: Path) -> None:
    tight = policy(place, base_images=["docker.io/**"])
    source = f"oci:{place / 'nowhere'}"
    ran = failed(alone, IMAGE, "--from", source, "--policy", tight, status=3, code="policy-denied")
    assert "nowhere" not in ran.stderr


def test_without_a_layout_an_offline_host_has_nothing_to_pull(alone: Person) -> None:
    failed(alone, IMAGE, status=6, code="image-not-found")


def test_another_platform_is_refused(alone: Person, layout: Path, place: Path) -> None:
    source = f"--from=oci:{layout}"
    failed(alone, IMAGE, source, "--platform", "linux/arm64", status=2, code="usage")
    foreign = written(place / "foreign", make_index(("linux", "arm64", None)))
    ran = failed(alone, IMAGE, f"--from=oci:{foreign}", status=6, code="image-not-found")
    assert "no image for linux/amd64" in ran.stderr


def test_an_image_that_breaks_a_rule_is_never_given_to_a_sandbox(
    alone: Person, place: Path
) -> None:
    bad = make_image(spoil_layer=lambda data: data[:-5])
    ran = failed(
        alone, IMAGE, f"--from=oci:{written(place / 'bad', bad)}",
        status=5, code="base-image-invalid",
    )  # fmt: skip
    assert IMAGE in ran.stderr


def test_what_cannot_be_unpacked_is_an_error_here(alone: Person, layout: Path, place: Path) -> None:
    tight = policy(place, limits={"disk_bytes": 1 << 20})
    failed(alone, IMAGE, f"--from=oci:{layout}", "--policy", tight, status=7, code="disk-exceeded")


def test_a_tar_with_something_else_in_it_is_refused(
    alone: Person, layout: Path, place: Path
) -> None:
    tar = place / "image.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(layout, ".")
        link = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(link)
    ran = failed(alone, IMAGE, f"--from=oci-archive:{tar}", status=5, code="layout-invalid")
    assert "an entry b'blobs/sha256/000" in ran.stderr


def test_a_layer_that_the_layout_lacks_is_said(alone: Person, place: Path) -> None:
    image = make_image(tars=(HELLO_TAR,))
    directory = written(place / "lacking", image)
    manifest = json.loads((directory / "blobs/sha256" / image.root.digest.hex).read_bytes())
    layer = directory / "blobs/sha256" / Digest(manifest["layers"][0]["digest"]).hex
    layer.unlink()
    failed(alone, IMAGE, f"--from=oci:{directory}", status=6, code="image-not-found")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_cancelled_leaves_nothing(
    alone: Person, layout: Path, number: signal.Signals
) -> None:
    process = alone.start("base", "pull", IMAGE, "--from", f"oci:{layout}")
    read_until(process, process.stderr, "resolve took")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 8, stderr
    assert "cancelled" in stderr
    assert UnpackedStore(alone.home.unpacked).all() == []
    assert list((alone.home.unpacked / "arriving").iterdir()) == []
    alone.assert_nothing_left()


# -- with one ------------------------------------------------------------------------------------


@pytest.mark.registry
def test_a_build_finds_unpacked_what_was_pulled_from_a_registry(
    person: Person, tools_base: str, place: Path
) -> None:
    pulled = person.run("base", "pull", tools_base)
    assert pulled.status == 0, pulled.stderr
    store = UnpackedStore(person.home.unpacked)
    before = [image.modified_ns for image in store.all()]
    built = person.submit(write_context(place / "context", f"FROM {tools_base}\nRUN true\n"))
    assert built.result.base_images[tools_base] == pulled.stdout.strip()
    assert [image.modified_ns for image in store.all()] == before
    assert built.result.provided[tools_base] in {"copied", "mounted"}


def test_the_doctor_has_a_row_for_base_images(alone: Person) -> None:
    rows = json.loads(alone.run("doctor", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == "base images"]
    assert row["verdict"] in {"ok", "warn"}
