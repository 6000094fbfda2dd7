"""The first process's plan, string by string."""

from dataclasses import replace

import pytest

from sandbox.model import SandboxSpec
from sandbox.plan import Ways, render


def test_the_plan_counts_what_follows(spec: SandboxSpec) -> None:
    strings = render(spec, "nonce").split(b"\0")
    assert strings == [
        b"1", b"nonce", b"5000", b"/run/runner/door/gateway.sock", b"/run/claim", b"2400", b"2",
        b"2", b"tar", b"-x", b"3", b"buildah", b"build", b"--build-arg=A=\xff", b"",
    ]  # fmt: skip


def test_a_nul_cannot_shift_the_plan(spec: SandboxSpec) -> None:
    plan = replace(spec.plan, commands=(("tar", "a\0b"),))
    with pytest.raises(ValueError, match="NUL"):
        render(replace(spec, plan=plan), "nonce")


def test_a_file_is_handed_out_by_the_last_command(spec: SandboxSpec) -> None:
    plan = replace(spec.plan, commands=(), output="/run/file")
    strings = render(replace(spec, plan=plan), "n", Ways("10.0.0.2:5000", "10.0.0.2:5001"))
    assert strings.split(b"\0")[3:] == [
        b"10.0.0.2:5000", b"/run/claim", b"2400", b"1",
        b"4", b"/run/runner/init", b"send", b"/run/file", b"10.0.0.2:5001", b"",
    ]  # fmt: skip


def test_without_a_gateway_there_is_no_port(spec: SandboxSpec) -> None:
    assert render(replace(spec, gateway=False), "n").split(b"\0")[2] == b"0"
