"""A builder that was carried over in a file: the same tree, and it builds."""

import json
import os
from pathlib import Path

import pytest

from policies.reference import Digest
from runner.stores.rootfs import RootfsStore
from tests.integration.conftest import RealRegistry
from tests.support.hosts import Person, write_context

pytestmark = pytest.mark.sandbox


def without_a_builder(directory: Path, person: Person) -> Person:
    """Somebody with the user id and the settings of ``person``, and a store of builders."""
    moved = Person.move_in(directory, person.settings, directory / "none", person.uid)
    moved.home.builders.unlink()
    moved.home.builders.mkdir()
    if person.uid is not None:
        os.chown(moved.home.builders, person.uid, person.uid)
    return moved


@pytest.fixture
def elsewhere(place: Path, person: Person) -> Person:
    """Somebody on a host without any builder."""
    return without_a_builder(place / "elsewhere", person)


def test_a_builder_is_carried_over_and_builds(
    person: Person, elsewhere: Person, place: Path, registry: RealRegistry, tools_base: str
) -> None:
    file = place / "buildah.tar"
    exported = person.run("builder", "export", file)
    assert exported.status == 0, exported.stderr
    before = RootfsStore(person.home.builders).verified("buildah")

    imported = elsewhere.run("builder", "import", file, "--digest", exported.stdout.strip())
    assert (imported.status, imported.stdout.strip()) == (0, before.digest), imported.stderr
    after = RootfsStore(elsewhere.home.builders).verified("buildah")
    assert (after.digest, after.version) == (before.digest, before.version)
    assert elsewhere.run("builder", "verify").stdout.strip() == before.digest

    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo hello >/greeting\n")
    built = elsewhere.run(
        "submit", "--untrusted", "--destination", f"{registry.host}/carried/over:1", context
    )
    assert built.status == 0, built.stderr
    elsewhere.assert_nothing_left()

    again = place / "again.tar"
    assert elsewhere.run("builder", "export", again).stdout == exported.stdout
    assert again.read_bytes() == file.read_bytes()


def test_whoever_exports_it_the_bytes_are_the_same(
    person: Person, stranger: Person, place: Path
) -> None:
    mine = place / "mine.tar"
    exported = person.run("builder", "export", mine)
    other = without_a_builder(place / "other", stranger).having(LC_ALL="C", TZ="Asia/Tokyo")
    theirs = other.directory / "theirs.tar"
    assert other.run("builder", "import", "--trust-file", mine).status == 0
    assert other.run("builder", "export", theirs).stdout == exported.stdout
    assert mine.read_bytes() == theirs.read_bytes()
    assert theirs.stat().st_uid == stranger.uid


def test_an_export_replaces_a_file_only_when_told_to(person: Person, place: Path) -> None:
    file = place / "kept.tar"
    file.write_text("kept")
    refused = person.run("builder", "export", "buildah", file)
    assert (refused.status, refused.code) == (2, "output-invalid")
    assert file.read_text() == "kept"
    digest = Digest(person.run("builder", "export", "--force", "buildah", file).stdout.strip())
    assert f"blobs/sha256/{digest.hex}".encode() in file.read_bytes()
    assert [path.name for path in place.iterdir()] == ["kept.tar"]


def test_an_import_replaces_a_builder_only_when_told_to(
    person: Person, elsewhere: Person, place: Path
) -> None:
    file = place / "buildah.tar"
    digest = person.run("builder", "export", file).stdout.strip()
    assert elsewhere.run("builder", "import", file).status == 2
    assert elsewhere.run("builder", "import", file, "--trust-file").status == 0
    refused = elsewhere.run("builder", "import", file, "--digest", digest)
    assert (refused.status, refused.code) == (2, "builder-install-failed")
    assert elsewhere.run("builder", "import", file, "--digest", digest, "--force").status == 0
    listed = json.loads(elsewhere.run("builder", "list", "--json").stdout)
    assert listed[0]["source"] == f"oci-archive:{file}@{digest}"
