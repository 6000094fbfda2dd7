"""``python -m tests.support.golden`` writes tests/unit/sandbox/kubernetes/golden/*.json anew.

Look at what changed there: each line is what a cluster is asked for.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.model import BuildPlan
from policies.model import GIB, MIB, Isolation, Limits
from sandbox.kubernetes import manifests
from sandbox.kubernetes.manifests import Pod, Pool, Toleration
from sandbox.model import SandboxSpec

DIRECTORY = Path(__file__).parent.parent / "unit" / "sandbox" / "kubernetes" / "golden"
IMAGE = f"registry.example.com/runner/buildah@sha256:{'a' * 64}"
OWNER = "00000000-0000-4000-8000-000000000000"
NAME = "ur-20260102-030405-abcdef"

PLAN = BuildPlan(
    commands=(("buildah", "build"),),
    build_command=0,
    environment={"PATH": "/bin", "MONEY": "$(HOME) $$"},
    files={"policy.json": b"{}"},
    writable=("/tmp", "/run", "/var/lib/builder"),
    uid=0,
    capabilities=("SETUID", "CHOWN"),
    claim="/run/claim",
)
SPEC = SandboxSpec(
    isolation=Isolation.GVISOR,
    limits=Limits(
        memory_bytes=2 * GIB, cpu_millis=1500, disk_bytes=GIB, log_bytes=MIB, wall_seconds=600
    ),
    plan=PLAN,
    root=Path("/store/root"),
    root_digest=f"sha256:{'5' * 64}",
    image=IMAGE,
)
EVERY_OPTION = Pool(
    namespace="builds-of-ci",
    node_selector={"example.com/pool": "builds", "kubernetes.io/arch": "amd64"},
    tolerations=(
        Toleration(key="example.com/builds", value="only", effect="NoSchedule"),
        Toleration(key="example.com/kata", effect="NoExecute"),
        Toleration(key="example.com/any"),
    ),
    priority_class="builds",
    queue="ci",
    pull_secrets=("registry-login", "mirror-login"),
    pending_seconds=60,
)
APART = replace(PLAN, capabilities=("SETFCAP", "SETGID", "SETUID"), apart=True)
ORDINARY = replace(PLAN, uid=1000, capabilities=())


def pod(runtime_class: str, pool: Pool | None = None) -> Pod:
    labels = manifests.labels("5" * 32, NAME)
    return Pod(
        name=NAME, image=IMAGE, runtime_class=runtime_class, labels=labels, pool=pool or Pool()
    )


CASES: dict[str, tuple[SandboxSpec, Pod]] = {
    "gvisor": (SPEC, pod("gvisor")),
    "gvisor-apart": (replace(SPEC, plan=APART), pod("gvisor")),
    "gvisor-uid-1000": (replace(SPEC, plan=ORDINARY), pod("gvisor")),
    "kata-every-option": (replace(SPEC, isolation=Isolation.KATA), pod("kata", EVERY_OPTION)),
    "container": (replace(SPEC, isolation=Isolation.CONTAINER), pod("")),
}


def rendered(spec: SandboxSpec, asked: Pod) -> dict[str, Any]:
    """Both objects, by what they are."""
    files = {manifests.PLAN: b"2\0", manifests.KEY: b"key", manifests.CERTIFICATE: b"PEM\n"}
    secret = manifests.secret(spec, asked, files, OWNER)
    return {"job": manifests.job(spec, asked), "secret": secret}


def written() -> Iterator[tuple[Path, str]]:
    for name, case in CASES.items():
        yield DIRECTORY / f"{name}.json", json.dumps(rendered(*case), indent=1) + "\n"


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for path, text in written():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
