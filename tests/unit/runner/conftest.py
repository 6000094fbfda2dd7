from dataclasses import replace
from typing import Any

import pytest

from builder.model import BuildPlan
from policies.grants import CLOSED, grant
from policies.model import Decision, Isolation, TraceStep, Trust
from policies.reference import Digest, ImageReference
from runner import events
from sandbox.model import Evidence, HostProcess, HostView

HOSTILE = "x\x1b]52;c;eA==\x07\n\u202ey\x9b31m"
DIGEST = Digest.of(b"x")
IMAGE = ImageReference.parse("a.b/c:1")


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def plan() -> BuildPlan:
    return BuildPlan(
        commands=(("tar",), ("buildah",), ("push",)), build_command=1, environment={}, files={},
        writable=(), uid=0, capabilities=(), claim="",
    )  # fmt: skip


@pytest.fixture
def decision() -> Decision:
    lists: dict[str, Any] = {"base_images": (("**",),), "destinations": ((HOSTILE,),)}
    return Decision(
        isolation=Isolation.GVISOR, wanted=Isolation.KATA, trust=Trust.UNTRUSTED, tenant=HOSTILE,
        backend=HOSTILE, builder=HOSTILE, builder_digest=DIGEST,
        grant=replace(grant(CLOSED, None), **lists), policies=((HOSTILE, DIGEST),),
        trace=(TraceStep(policy="p", rule="r", found="matched", effect=HOSTILE),),
    )  # fmt: skip


@pytest.fixture
def evidence() -> Evidence:
    process = HostProcess(
        role="sandbox", uid=7, capabilities=0, initial_user_namespace=False, seccomp=2,
        no_new_privileges=True,
    )  # fmt: skip
    return Evidence(
        isolation=Isolation.GVISOR, kernel_release=HOSTILE, kernel_version=HOSTILE,
        runtime="/bin/runsc", runtime_version=HOSTILE, interfaces=("lo", HOSTILE), inside_uid=0,
        outside=HostView((process,)),
    )  # fmt: skip


@pytest.fixture
def every_event(decision: Decision, evidence: Evidence) -> list[events.Event]:
    """One of each kind, with hostile text wherever text from outside can stand."""
    made: list[Any] = [
        events.Started(HOSTILE, HOSTILE),
        events.StageStarted(events.Stage.BUILD),
        events.StageEnded(events.Stage.BUILD, 1.25),
        events.Snapshotted(DIGEST, 12_345_678, 3),
        events.Decided(decision),
        events.Resolved(IMAGE, DIGEST),
        events.Unpacking(IMAGE),
        events.Provided(IMAGE, HOSTILE),
        events.Waiting(HOSTILE),
        events.Observed(evidence),
        events.Output(HOSTILE.encode() + b"\xff"),
        events.Progress(HOSTILE, 1 << 21, 1 << 22),
        events.Progress(HOSTILE, 1 << 22, 1 << 22),
        events.Progress("small", 1, 2),
        events.Warned(HOSTILE),
        events.Verified(DIGEST, 999, 2),
        events.Published(IMAGE, DIGEST),
        events.Failed("code", HOSTILE, HOSTILE, HOSTILE),
        events.Failed("code", "m", "a", ""),
        events.Finished(DIGEST, 2.0),
    ]
    return made
