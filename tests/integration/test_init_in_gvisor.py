"""The first process inside the kernel that it is made for: the same claims, all of it in there.

gVisor's sockets, polls and paths are not Linux's: it was here that O_NOFOLLOW did not hold.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.front import AS_ROOT
from tests.support.hosts import REPOSITORY

pytestmark = [pytest.mark.sandbox, *AS_ROOT]

CLAIMS = REPOSITORY / "tests/unit/sandbox"
FEW = (
    "nothing_is_lost or end_in_one_direction or no_link or half_handed_out or both_have_ended "
    "or before_anything"
)


def hold(state: Path, *arguments: str | Path) -> None:
    """Runs the tests in a sandbox with nothing but loopback, on a copy of what is here."""
    runsc = shutil.which("runsc")
    if runsc is None:
        pytest.skip("runsc is not installed: deploy/debian/install-host-tools.sh")
    ran = subprocess.run(
        [runsc, "--network=none", f"--root={state}", "do", "sh", "-c", 'cd "$0" && exec "$@"',
         REPOSITORY, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert " skipped" not in ran.stdout


def test_what_differs_most_holds_there(tmp_path: Path) -> None:
    hold(tmp_path, "-k", FEW, *sorted(CLAIMS.glob("test_*.py")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conversation", "files_over_way", "init", "ways"])
def test_all_of_it_holds_there(tmp_path: Path, name: str) -> None:
    hold(tmp_path, CLAIMS / f"test_{name}.py")
