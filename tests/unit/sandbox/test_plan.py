"""The first process's plan, string by string."""

from dataclasses import replace

import pytest

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import SOCKETS, Ways, render

ONE_COMMAND = [b"1", b"1", b"true", b""]


@pytest.fixture
def short(spec: SandboxSpec) -> SandboxSpec:
    limits = Limits(wall_seconds=60, log_bytes=4096)
    return replace(spec, plan=replace(spec.plan, commands=(("true",),)), limits=limits)


def test_the_plan_counts_what_follows(spec: SandboxSpec) -> None:
    strings = render(spec, "nonce").split(b"\0")
    assert strings == [
        b"2", b"nonce", b"", b"5000", b"/run/runner/door/gateway.sock", b"", b"/run/claim",
        b"2400", b"120", str(spec.limits.log_bytes).encode(), b"0", b"0", b"0", b"2",
        b"2", b"tar", b"-x", b"3", b"buildah", b"build", b"--build-arg=A=\xff", b"",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ways", "probes", "host", "files", "rest"),
    [
        (SOCKETS, (), b"", b"", [b"0"]),
        (replace(SOCKETS, host="tls:10.0.0.1:8443/host"), (), b"tls:10.0.0.1:8443/host", b"",
         [b"0"]),
        (replace(SOCKETS, files="tls:10.0.0.1:8443/files"), (), b"", b"tls:10.0.0.1:8443/files",
         [b"0"]),
        (SOCKETS, ("169.254.169.254:80", "10.96.0.1:443"), b"", b"",
         [b"2", b"169.254.169.254:80", b"10.96.0.1:443"]),
    ],
    ids=["nothing", "a host", "files", "probes"],
)  # fmt: skip
def test_what_only_a_pod_has_stands_in_its_place(
    short: SandboxSpec, ways: Ways, probes: tuple[str, ...], host: bytes, files: bytes,
    rest: list[bytes],
) -> None:  # fmt: skip
    assert render(short, "n", ways, probes).split(b"\0") == [
        b"2", b"n", host, b"5000", b"/run/runner/door/gateway.sock", files, b"/run/claim",
        b"120", b"120", b"4096", b"0", b"0", *rest, *ONE_COMMAND,
    ]  # fmt: skip


def test_commands_that_run_apart_have_file_systems_of_their_own(short: SandboxSpec) -> None:
    plan = replace(short.plan, apart=True, writable=("/var/tmp", "/run"))
    strings = render(replace(short, plan=plan), "n").split(b"\0")
    size = str(short.limits.disk_bytes).encode()
    assert strings[10:] == [size, b"2", b"/run", b"/var/tmp", b"0", *ONE_COMMAND]


@pytest.mark.parametrize("where", ["command", "probe", "host", "files"])
def test_a_nul_cannot_shift_the_plan(spec: SandboxSpec, where: str) -> None:
    bad = "a\0b"
    ways = replace(SOCKETS, **({where: bad} if where in {"host", "files"} else {}))
    commands = (("tar", bad),) if where == "command" else spec.plan.commands
    probes = (bad,) if where == "probe" else ()
    with pytest.raises(ValueError, match="NUL"):
        render(replace(spec, plan=replace(spec.plan, commands=commands)), "nonce", ways, probes)


def test_a_file_is_handed_out_by_the_last_command(spec: SandboxSpec) -> None:
    plan = replace(spec.plan, commands=(), output="/run/file")
    strings = render(replace(spec, plan=plan), "n", Ways("10.0.0.2:5000", "10.0.0.2:5001"))
    assert strings.split(b"\0")[4] == b"10.0.0.2:5000"
    assert strings.split(b"\0")[13:] == [
        b"1", b"4", b"/run/runner/init", b"send", b"/run/file", b"10.0.0.2:5001", b"",
    ]  # fmt: skip


def test_without_a_gateway_there_is_no_port(spec: SandboxSpec) -> None:
    assert render(replace(spec, gateway=False), "n").split(b"\0")[3] == b"0"


def test_no_limit_is_larger_than_a_number_of_the_plan(spec: SandboxSpec) -> None:
    limits = Limits(wall_seconds=1 << 40, log_bytes=1 << 60, disk_bytes=1 << 60)
    for_ever = replace(spec, limits=limits, plan=replace(spec.plan, apart=True))
    strings = render(for_ever, "n").split(b"\0")
    assert [int(strings[index]) for index in (7, 9, 10)] == [1 << 30, 1 << 50, 1 << 50]
