"""Attacks on the local backend, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import os
from pathlib import Path

import pytest

from runner.settings import Settings
from tests.support.hosts import STRANGER, Person, read_until, write_context
from tests.support.toolbox import install_as_buildah

pytestmark = [pytest.mark.sandbox]

SUPPORT = Path(__file__).parent.parent / "support"


def given(victim: Person) -> dict[str, int]:
    """Mode of everything that a sandbox of ``victim`` was given, by path."""
    found = {}
    for path in victim.home.sandboxes.rglob("guest/**/*"):
        found[path.as_posix().partition("/guest/")[2]] = path.lstat().st_mode
    return found


# Defence: ``--directfs=false`` in sandbox.runsc.
@pytest.mark.parametrize("uid", [None, STRANGER], ids=["whoever-tests", "ordinary-user"])
def test_row_25_root_of_the_sandbox_changes_nothing_that_the_host_gave_it(
    place: Path, settings: Settings, uid: int | None
) -> None:
    """It may remount what is read-only there; as an ordinary user it owns the files on the host."""
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user: run as root too")
    install_as_buildah(
        place / "hostile", "perl /s.pl; exit 3", **{"s.pl": (SUPPORT / "spoil.pl").read_text()}
    )
    victim = Person.move_in(place / "victim", settings, place / "hostile", uid)
    context = write_context(place / "context", "FROM scratch\n")
    with victim.start("submit", "--backend", "local", "--json", context) as process:
        read_until(process, process.stdout, "remount other")
        read_until(process, process.stdout, "ready")
        seen = given(victim)
        process.communicate(timeout=60)
    assert process.returncode == 1
    log = b"".join(path.read_bytes() for path in victim.home.builds.glob("*/build.log")).decode()
    did = {line for line in log.splitlines() if line.startswith("did: ")}
    assert did == {"did: remount", "did: bind", "did: remount other"}
    assert {name for name in seen if not name.startswith("config/")} == {
        "config", "door", "door/context.tar", "door/gateway.sock", "init", "plan",
    }  # fmt: skip
    assert all(mode & 0o7022 == 0 for mode in seen.values())
    victim.assert_nothing_left()
