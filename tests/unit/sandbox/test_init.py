"""The first process by itself, in a PID namespace of its own."""

import os
import subprocess
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import render


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root makes PID namespaces here: run as root too"
)
def test_it_ends_by_itself_where_nobody_is_left_to_end_it(
    tmp_path: Path, spec: SandboxSpec
) -> None:
    """As when an engine crashes that keeps the standard input of its containers open."""
    plan = replace(spec.plan, commands=(("sleep", "60"),))
    late = replace(spec, plan=plan, limits=Limits(wall_seconds=1), gateway=False)
    (tmp_path / "plan").write_bytes(render(late, "n"))
    init = resources.files("sandbox").joinpath("guest", "init")
    started = time.monotonic()
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", str(init), str(tmp_path / "plan")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"release n\n")
            process.stdin.flush()
            assert process.wait(20) == 125
        finally:
            process.kill()
        assert b"runner-exit" not in process.stdout.read()
    assert 1.5 < time.monotonic() - started < 15
