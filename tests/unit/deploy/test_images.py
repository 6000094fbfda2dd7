"""The image in ``deploy/images`` is made as ``runner builder install`` makes a builder."""

import re

import pytest

from builder.buildah import RECIPE
from runner.stores.debian import OF_NO_USE
from tests.support.hosts import REPOSITORY

IMAGES = REPOSITORY / "deploy/images"
LOCK = (IMAGES / "packages.lock").read_text(encoding="ascii").splitlines()
NAMES = [line.split("  ")[1] for line in LOCK]


@pytest.mark.parametrize("pattern", [*RECIPE.leave_out, *OF_NO_USE])
def test_the_same_is_left_out(pattern: str) -> None:
    assert pattern in (IMAGES / "Containerfile").read_text(encoding="utf-8").split()


def test_every_package_is_pinned_by_version_and_digest() -> None:
    for line in LOCK:
        assert re.fullmatch(r"[0-9a-f]{64}  [a-z0-9.+-]+_[A-Za-z0-9.+~%-]+_(amd64|all)\.deb", line)
    assert sorted(NAMES) == NAMES
    assert {name.partition("_")[0] for name in NAMES} >= {*RECIPE.packages, RECIPE.version_package}
