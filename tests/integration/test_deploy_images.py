"""``deploy/images/build``: the image of pinned packages, made in a sandbox."""

import subprocess
import sys
from pathlib import Path

import pytest

from builder.buildah import Buildah
from policies.reference import Digest
from runner.stores import debian, installs
from runner.stores.builderimage import opened
from runner.stores.rootfs import RootfsStore
from tests.integration.conftest import needed
from tests.support.hosts import REPOSITORY, Person

pytestmark = [pytest.mark.sandbox, pytest.mark.slow]


def test_pinned_packages_give_the_tree_that_installing_them_gives(
    person: Person, place: Path
) -> None:
    needed("mmdebstrap", "skopeo")
    installed = installs.from_packages(
        RootfsStore(place / "builders"), Buildah(), mirror=None, report=lambda _: None
    )
    names = (REPOSITORY / "deploy/images/packages.lock").read_text(encoding="ascii").split()[1::2]
    if (installed.root / debian.PACKAGES).read_text(encoding="ascii").split() != names:
        pytest.skip("the mirror has other versions: renew deploy/images/packages.lock")

    made = place / "buildah.tar"
    ran = subprocess.run(
        [REPOSITORY / "deploy/images/build", made],
        env={
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(person.directory),
            "XDG_DATA_HOME": str(person.directory / "data"),
            "XDG_STATE_HOME": str(person.directory / "state"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    with opened(made, Digest(ran.stdout.strip())) as found:
        assert found.tree == installed.digest
