from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.model import BuildPlan
from policies.model import Isolation, Limits
from sandbox.model import SandboxSpec
from tests.support.front import Front, Pod, make_certificate


@pytest.fixture(scope="session")
def spec() -> SandboxSpec:
    """Nobody can change it; so properties may use it too."""
    plan = BuildPlan(
        commands=(("tar", "-x"), ("buildah", "build", "--build-arg=A=\udcff")),
        build_command=1,
        environment={"PATH": "/bin", "A": "b=c"},
        files={},
        writable=("/run", "/tmp", "/var/tmp"),
        uid=0,
        capabilities=("CHOWN", "SYS_ADMIN"),
        claim="/run/claim",
    )
    return SandboxSpec(
        isolation=Isolation.GVISOR,
        limits=Limits(disk_bytes=4096),
        plan=plan,
        root=Path("/store/root"),
        root_digest=f"sha256:{'5' * 64}",
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("front"), "front")


@pytest.fixture
def front(certificate: Path) -> Iterator[Front]:
    with Front(certificate) as front:
        yield front


@pytest.fixture
def pod(tmp_path: Path, certificate: Path) -> Pod:
    return Pod.make(tmp_path / "runner", certificate)
