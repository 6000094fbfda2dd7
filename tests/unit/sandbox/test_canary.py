"""One row for each refusal: a sound observation with one thing changed."""

from dataclasses import replace
from typing import Any

import pytest

from policies.model import Isolation
from sandbox.canary import Expected, HostKernel, Observation, judge
from sandbox.errors import IsolationMismatch
from sandbox.model import Evidence, HostProcess, HostView

SEEN = Observation(
    release="4.4.0",
    version="#1 SMP Sun Jan 10 15:06:54 PST 2016",
    boot_id="",
    log="<6>[    0.000000] Starting gVisor...\n<6>[    0.1] Committing treasure map...",
    is_gvisor_file="",
    interfaces=("lo",),
    images=frozenset(),
    uid=0,
)
SANDBOX = HostProcess(
    role="sandbox", uid=1000, capabilities=0, initial_user_namespace=False, seccomp=2,
    no_new_privileges=True,
)  # fmt: skip
GOFER = replace(SANDBOX, role="gofer")
LAUNCHER = replace(SANDBOX, role="launcher", initial_user_namespace=True, seccomp=0)
APPLICATION = replace(SANDBOX, role="application", seccomp=0)
PROCESSES = (APPLICATION, GOFER, LAUNCHER, SANDBOX)


HERE = HostKernel(release="6.18.0", version="#1 SMP Debian", boot_id="11-22")
STRICT = Expected(isolation=Isolation.GVISOR, uid=0, host=HERE, rootless=True)


def judged(
    seen: Observation = SEEN,
    processes: tuple[HostProcess, ...] = PROCESSES,
    expected: Expected = STRICT,
) -> Evidence:
    return judge(seen, HostView(processes), expected, runtime="/bin/runsc", runtime_version="2024")


@pytest.mark.parametrize(
    "changed", [{}, {"is_gvisor_file": "1\n"}, {"log": "Starting gVisor..."}, {"interfaces": ()}]
)
def test_gvisor_is_accepted_and_kept_as_evidence(changed: dict[str, Any]) -> None:
    evidence = judged(replace(SEEN, **changed))
    assert evidence.isolation is Isolation.GVISOR
    assert evidence.outside == HostView(PROCESSES)
    assert (evidence.kernel_release, evidence.inside_uid) == ("4.4.0", 0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"log": "<6>[    0.000000] Linux version 6.18"}, "log"),
        ({"log": ""}, "log"),
        ({"log": "\n" + SEEN.log}, "log"),
        ({"log": "x " + SEEN.log}, "log"),
        ({"log": "Starting gVisor... not"}, "log"),
        ({"release": "6.18.0"}, "the host's"),
        ({"is_gvisor_file": "0"}, "/proc/gvisor"),
        ({"interfaces": ("lo", "eth0")}, "interfaces"),
        ({"interfaces": ("eth0",)}, "interfaces"),
        ({"uid": 1000}, "as uid 1000 instead of 0"),
    ],
)
def test_one_wrong_thing_inside_is_enough(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(IsolationMismatch, match=says):
        judged(replace(SEEN, **changed))


@pytest.mark.parametrize(
    ("processes", "says"),
    [
        ((), "no sandbox process"),
        ((GOFER, LAUNCHER), "no sandbox process"),
        ((SANDBOX, LAUNCHER), "no gofer"),
        ((replace(SANDBOX, uid=0), GOFER), "sandbox is host uid 0"),
        ((SANDBOX, replace(GOFER, uid=0)), "gofer is host uid 0"),
        ((SANDBOX, GOFER, replace(LAUNCHER, uid=0)), "launcher is host uid 0"),
        ((replace(SANDBOX, initial_user_namespace=True), GOFER), "initial user namespace"),
        ((SANDBOX, replace(GOFER, initial_user_namespace=True)), "initial user namespace"),
        ((SANDBOX, GOFER, replace(LAUNCHER, capabilities=1)), "launcher has capabilities"),
        ((replace(SANDBOX, seccomp=0), GOFER), "sandbox runs without seccomp"),
        ((SANDBOX, replace(GOFER, seccomp=1)), "gofer runs without seccomp"),
        (
            (SANDBOX, GOFER, replace(APPLICATION, initial_user_namespace=True)),
            "application is in the initial",
        ),
    ],
)
def test_one_wrong_process_is_enough(processes: tuple[HostProcess, ...], says: str) -> None:
    with pytest.raises(IsolationMismatch, match=says):
        judged(processes=processes)


@pytest.mark.parametrize("good_last", [True, False])
def test_a_good_process_does_not_excuse_a_bad_one_of_its_role(good_last: bool) -> None:
    pair = [replace(APPLICATION, uid=0), APPLICATION]
    with pytest.raises(IsolationMismatch, match="application is host uid 0"):
        judged(processes=(SANDBOX, GOFER, *(pair if good_last else pair[::-1])))


PLAIN = replace(STRICT, rootless=False)
"""As an engine whose containers are not mapped has it."""


def test_a_plain_engine_runs_it_as_host_root_and_evidence_says_so() -> None:
    root = tuple(replace(each, uid=0) for each in (SANDBOX, GOFER))
    assert judged(processes=root, expected=PLAIN).outside == HostView(root)
    with pytest.raises(IsolationMismatch, match="sandbox is host uid 0"):
        judged(processes=root)


@pytest.mark.parametrize(
    ("processes", "says"),
    [
        ((GOFER,), "no sandbox process"),
        ((SANDBOX, replace(GOFER, seccomp=0)), "gofer runs without seccomp"),
        ((SANDBOX, GOFER, replace(SANDBOX, role="unreadable")), "cannot be looked at"),
    ],
)
def test_a_plain_engine_is_excused_from_nothing_else(
    processes: tuple[HostProcess, ...], says: str
) -> None:
    with pytest.raises(IsolationMismatch, match=says):
        judged(processes=processes, expected=PLAIN)


def test_its_own_network_is_no_other_one() -> None:
    on_network = replace(PLAIN, interfaces=frozenset({"eth0"}))
    seen = judged(replace(SEEN, interfaces=("lo", "eth0")), expected=on_network)
    assert seen.interfaces == ("lo", "eth0")
    with pytest.raises(IsolationMismatch, match="eth1"):
        judged(replace(SEEN, interfaces=("lo", "eth0", "eth1")), expected=on_network)


KATA = replace(PLAIN, isolation=Isolation.KATA)
GUEST = replace(
    SEEN, release="6.12.42", boot_id="33-44", log="<5>[    0.000000] Linux version 6.12.42"
)
VMM = replace(SANDBOX, role="launcher", uid=0, seccomp=0)


def test_a_guest_kernel_of_its_own_is_kata() -> None:
    assert judged(GUEST, (VMM,), KATA).isolation is Isolation.KATA


@pytest.mark.parametrize(
    ("seen", "processes", "says"),
    [
        (replace(GUEST, release="6.18.0"), (VMM,), "the host's"),
        # As by setarch --uname-2.6, which changes the release alone.
        (replace(GUEST, boot_id="11-22", version=HERE.version), (VMM,), "the host's"),
        (replace(GUEST, boot_id="11-22"), (VMM,), "the host's"),
        (replace(GUEST, version=HERE.version), (VMM,), "the host's"),
        (replace(GUEST, boot_id=""), (VMM,), "when it was booted"),
        (GUEST, (), "shows no process"),
        (SEEN, (VMM,), "gVisor's"),
        (replace(GUEST, is_gvisor_file="1"), (VMM,), "gVisor's"),
        (GUEST, (APPLICATION,), "shows its first process"),
    ],
)
def test_what_is_no_guest_is_no_kata(
    seen: Observation, processes: tuple[HostProcess, ...], says: str
) -> None:
    with pytest.raises(IsolationMismatch, match=says):
        judged(seen, processes, KATA)


CONTAINER = replace(PLAIN, isolation=Isolation.CONTAINER)
HOST = replace(GUEST, release="6.18.0", boot_id="11-22")


def test_nobody_is_trusted_to_be_rootless_unseen() -> None:
    with pytest.raises(IsolationMismatch, match="does not show its first process"):
        judged(HOST, (), replace(CONTAINER, rootless=True))


def test_a_container_has_the_hosts_kernel_and_is_never_taken_for_more() -> None:
    contained = replace(APPLICATION, seccomp=2)
    assert judged(HOST, (contained,), CONTAINER).isolation is Isolation.CONTAINER


@pytest.mark.parametrize(
    ("seen", "processes", "says"),
    [
        (GUEST, (replace(APPLICATION, seccomp=2),), "not the host's"),
        (HOST, (), "does not show"),
        (HOST, (APPLICATION,), "without seccomp"),
        (HOST, (replace(APPLICATION, seccomp=2, no_new_privileges=False),), "new privileges"),
    ],
)
def test_a_container_is_confined_or_refused(
    seen: Observation, processes: tuple[HostProcess, ...], says: str
) -> None:
    with pytest.raises(IsolationMismatch, match=says):
        judged(seen, processes, CONTAINER)


FIELDS = {
    "nonce": "n",
    "release": b"4.4.0".hex(),
    "version": b"#1".hex(),
    "boot_id": b"11-22\n".hex(),
    "log": b"Starting gVisor...\n".hex(),
    "gvisor": "",
    "ids": b"7:7:7".hex(),
    "mounts": b"none / 9p ro 0 0\nnone /base erofs ro 0 0\n".hex(),
    "net_dev": b"Inter-| Receive\n face |bytes\n    lo: 0 0\n  eth0: 1\n".hex(),
    "reached": b"10.96.0.1:443\n".hex(),
}


def line(**changed: str | None) -> bytes:
    fields = {name: value for name, value in {**FIELDS, **changed}.items() if value is not None}
    return b"runner-canary 1 " + " ".join(f"{n}={v}" for n, v in fields.items()).encode()


def test_a_sound_line_is_read() -> None:
    seen = Observation.parse(line(), "n")
    assert (seen.release, seen.version, seen.uid) == ("4.4.0", "#1", 7)
    assert seen.interfaces == ("lo", "eth0")
    assert seen.images == {"/base"}
    assert seen.reached == ("10.96.0.1:443",)


def test_what_is_read_is_bounded() -> None:
    many = "".join(f"e{'x' * 99}{i}: 0\n" for i in range(99)).encode().hex()
    seen = Observation.parse(line(release="61" * 999, version="61" * 999, net_dev=many), "n")
    assert (len(seen.release), len(seen.version), len(seen.interfaces)) == (256, 256, 64)
    assert {len(name) for name in seen.interfaces} == {64}


@pytest.mark.parametrize(
    "changed",
    [{name: None} for name in FIELDS]
    + [{"nonce": "m"}, {"ids": b"x".hex()}, {"ids": ""}, {"log": "0"}, {"log": "-"}],
)
def test_a_line_with_one_thing_changed_is_refused(changed: dict[str, str | None]) -> None:
    with pytest.raises(IsolationMismatch, match="not sound"):
        Observation.parse(line(**changed), "n")


def test_another_kind_of_line_is_refused() -> None:
    with pytest.raises(IsolationMismatch, match="not sound"):
        Observation.parse(b"runner-exit 1 nonce=n", "n")
