"""A builder image of one's own: unpacked in a sandbox, and the same tree afterwards."""

import subprocess
from pathlib import Path

import pytest

from runner.stores.rootfs import RootfsStore
from tests.support.hosts import Person

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]


@pytest.fixture
def owner(person: Person, place: Path, builders: Path) -> Person:
    """Somebody with a store of builders of their own, where buildah is installed."""
    moved = Person.move_in(place / "owner", person.settings, builders)
    moved.home.builders.unlink()
    subprocess.run(["cp", "-a", builders, moved.home.builders], check=True)
    return moved


@pytest.fixture
def layout(builders: Path, place: Path) -> Path:
    """The installed builder as an image in an OCI layout."""
    installed = RootfsStore(builders).verified("buildah")
    tar, made = place / "root.tar", place / "layout"
    subprocess.run(["tar", "-C", installed.root, "-cf", tar, "."], check=True)
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", f"tarball:{tar}", f"oci:{made}:own"],
        check=True,
    )
    return made


def test_an_image_becomes_the_very_tree_that_it_was_made_of(owner: Person, layout: Path) -> None:
    before = RootfsStore(owner.home.builders).verified("buildah")
    ran = owner.run("builder", "install", "--force", "--image", f"oci:{layout}", seconds=300)
    assert (ran.status, ran.stdout.strip()) == (0, before.digest)
    after = RootfsStore(owner.home.builders).verified("buildah", every_byte=True)
    assert after.source.startswith(f"oci:{layout}@sha256:")
    owner.assert_nothing_left()


def test_an_image_that_lacks_the_builder_changes_nothing(owner: Person, tools_base: str) -> None:
    before = RootfsStore(owner.home.builders).verified("buildah")
    ran = owner.run("builder", "install", "--force", "--image", tools_base, seconds=300)
    assert (ran.status, ran.code) == (2, "builder-install-failed")
    assert "has no buildah" in ran.stderr
    assert RootfsStore(owner.home.builders).verified("buildah", every_byte=True) == before
    owner.assert_nothing_left()
