"""The kubernetes backend in front of a played cluster, with a first process that is played too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builder.model import BuildPlan
from policies.model import MIB, Isolation, Limits
from sandbox.kubernetes.backend import Classes, KubernetesBackend, Reach
from sandbox.kubernetes.manifests import Pool
from sandbox.model import Outcome, Sandbox, SandboxSpec, unheard
from tests.support.cluster import NAMESPACE, PlayedCluster, Recording, kubeconfig
from tests.support.firstprocess import FirstProcess

CERTIFICATE = b"-----BEGIN CERTIFICATE-----\n"
GATEWAY = "192.0.2.8:8443"


@dataclass
class Stand:
    """A backend and its cluster.

    Attributes:
        name: Of the recording, and of its sandbox.
        directory: Of everything.
        log: What the build wrote.
    """

    name: str
    directory: Path
    cluster: PlayedCluster
    first: FirstProcess
    log: bytearray = field(default_factory=bytearray)
    pending_seconds: int = 5
    inputs: dict[str, Path] = field(default_factory=dict)
    during: Callable[[Sandbox], object] = lambda _: None

    @property
    def sandboxes(self) -> Path:
        return self.directory / "sandboxes"

    @property
    def title(self) -> str:
        return f"ur-{self.name}"

    @property
    def jobs(self) -> str:
        return f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"

    @property
    def backend(self) -> KubernetesBackend:
        reach = Reach(
            kubeconfig=kubeconfig(self.directory, self.cluster.url),
            context=None,
            gateway=GATEWAY,
            state=self.directory / "gateway",
        )
        wanted = self.cluster.recording.pod_spec.get("runtimeClassName", "gvisor")
        pool = Pool(namespace=NAMESPACE, pending_seconds=self.pending_seconds)
        return KubernetesBackend(
            self.sandboxes,
            reach=reach,
            classes=Classes(gvisor=wanted),
            pool=pool,
            probe_image=str,
        )

    @property
    def spec(self) -> SandboxSpec:
        image: str = self.cluster.recording.pod_spec["containers"][0]["image"]
        return SandboxSpec(
            isolation=Isolation.GVISOR,
            limits=Limits(log_bytes=MIB, wall_seconds=60),
            plan=BuildPlan(
                commands=(("build",),),
                build_command=0,
                environment={"PATH": "/bin"},
                files={"greeting": b"hello\n"},
                writable=("/tmp",),
                uid=0,
                capabilities=("CHOWN",),
                claim="",
            ),
            root=Path("/nowhere"),
            root_digest=f"sha256:{'0' * 64}",
            image=image,
            inputs=self.inputs,
            gateway=False,
        )

    def build(self, waiting: Callable[[str], None] = unheard) -> Outcome:
        """From the place to its release, which has to leave nothing."""
        place = self.backend.reserve(self.name)
        try:
            with self.first.living():
                sandbox = self.backend.launch(place, self.spec, self.log.extend, waiting=waiting)
                self.during(sandbox)
                return sandbox.wait()
        finally:
            place.release()

    def left(self) -> list[str]:
        """What there still is of the sandbox, here and in the cluster."""
        jobs = self.cluster.saw(f"DELETE {self.jobs}/{self.title}")
        secrets = f"DELETE /api/v1/namespaces/{NAMESPACE}/secrets/{self.title}"
        links = self.directory / "gateway" / "doors"
        found = [] if jobs else ["job"]
        found += [] if self.cluster.saw(secrets) else ["secret"]
        found += [str(path) for path in self.sandboxes.iterdir()]
        found += [str(path) for path in links.iterdir()]
        return found


@contextmanager
def standing(name: str, directory: Path) -> Iterator[Stand]:
    """Plays the recording of that name."""
    doors = directory / "gateway" / "doors"
    doors.mkdir(parents=True)
    (directory / "gateway" / "certificate.pem").write_bytes(CERTIFICATE)
    with PlayedCluster(Recording.read(name)).playing() as cluster:
        yield Stand(name, directory, cluster, FirstProcess(cluster, doors))
