"""Starts a sandbox with nothing in it, on any backend, and tries its door."""

import secrets
import tempfile
from dataclasses import replace
from pathlib import Path

from builder.model import RUNNER, BuildPlan
from policies.errors import RunnerError
from policies.model import Isolation, Limits
from sandbox.model import Backend, Ending, SandboxSpec
from sandbox.rows import Row, Verdict, failed


def smoke(backend: Backend, isolation: Isolation, image: str = "") -> Row:
    """Starts a sandbox whose root has nothing but mount points; judges it, and tries its door.

    Args:
        backend: To try.
        isolation: To ask for.
        image: What a cluster starts instead of that root.
    """
    with tempfile.TemporaryDirectory(prefix="runner-probe-") as temporary:
        root = Path(temporary) / "root"
        (root / RUNNER.lstrip("/")).mkdir(parents=True)
        for directory in (Path(temporary), *root.rglob("*"), root):
            directory.chmod(0o755)
        handed_out = bytearray()
        try:
            place = backend.reserve(f"probe-{secrets.token_hex(4)}")
            try:
                spec = replace(_smoke_spec(root, isolation), image=image)
                sandbox = backend.launch(place, spec, lambda _: None, handed_out.extend)
                ended = sandbox.wait()
            finally:
                place.release()
        except RunnerError as error:
            return failed("sandbox", error)
    seen = sandbox.evidence
    if ended.ending is not Ending.EXITED or ended.status != 0 or not handed_out:
        return Row(
            name="sandbox",
            verdict=Verdict.FAIL,
            detail=f"started and accepted, but its door does not work ({ended.ending})",
            mend="The runtime lets no Unix socket of a mount through: it needs --host-uds=open.",
        )
    return Row(
        name="sandbox",
        verdict=Verdict.OK,
        detail=f"started and accepted: {seen.isolation}, kernel {seen.kernel_release}; "
        "its door works",
    )


def _smoke_spec(root: Path, isolation: Isolation) -> SandboxSpec:
    return SandboxSpec(
        isolation=isolation,
        limits=Limits(wall_seconds=60, cpu_millis=500, memory_bytes=512 << 20),
        plan=BuildPlan(
            commands=(),
            build_command=0,
            environment={},
            files={},
            writable=("/run",),
            uid=0,
            capabilities=(),
            claim="/run/claim",
            output="/proc/version",  # anything that is there
        ),
        root=root,
        root_digest=PROBE_DIGEST,
        gateway=False,
    )


PROBE_DIGEST = f"sha256:{'0' * 64}"
"""Of the root that a probe starts."""
