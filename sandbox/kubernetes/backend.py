"""The Kubernetes backend: each sandbox is the only container of a Job's pod, under a RuntimeClass.

What the cluster is asked for stands in ``manifests``, what became of it in ``fate``. The pod has
one door, the gateway's port, which it knows by its address, certificate and a key of its own. All
that is said with it, its files and its output included, goes through that door.
"""

import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from policies.model import Isolation
from sandbox import doors, plan
from sandbox.canary import Expected, HostKernel, Observation, judge
from sandbox.errors import (
    ClusterUnreachable,
    IsolationMismatch,
    IsolationUnavailable,
    RuntimeTooOld,
    RuntimeUnknown,
    SandboxFailed,
)
from sandbox.kubernetes import manifests
from sandbox.kubernetes import place as kubernetesplace
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.machine import KubernetesMachine
from sandbox.kubernetes.objects import Container, Named, Node, PodSpec, RuntimeClass, Service
from sandbox.kubernetes.place import KubernetesPlace
from sandbox.model import (
    ClusterView,
    Evidence,
    Offer,
    Place,
    Provided,
    Sandbox,
    SandboxSpec,
    unheard,
)
from sandbox.plan import Ways
from sandbox.rows import Row
from sandbox.supervise import SupervisedSandbox

_OLD_GVISOR = "4.4.0"
"""Kernel release up to some time in 2025. Its overlays know no userxattr, which user namespaces
need; those after it say ``4.19.0-gvisor``."""
METADATA = "169.254.169.254:80"
"""Where clouds tell pods about their node, and lend them its identity."""
_TUNNELS = {
    "tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6tnl0", "ip6gre0",
}  # fmt: skip
"""What the host's kernel puts, down and without an address, into each new network namespace."""
_ADVICE = "docs/kubernetes.md; runner doctor --backend kubernetes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How a cluster is reached, and how it reaches us.

    Attributes:
        kubeconfig: None for the pod's own identity or the user's usual file.
        context: Of that file; None for its current one.
        gateway: ``A.B.C.D:PORT``, where pods find the gateway's port.
        state: Directory of that port's state: its certificate, and the doors that it leads to.
        forbidden: ``A.B.C.D:PORT`` of what pods must not reach, besides what is tried anyway.
    """

    kubeconfig: Path | None
    context: str | None
    gateway: str | None
    state: Path
    forbidden: tuple[str, ...] = ()

    @property
    def doors(self) -> Path:
        return self.state / "doors"

    @property
    def certificate(self) -> Path:
        return self.state / "certificate.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """What the cluster calls the RuntimeClass of each isolation; empty for no class at all."""

    container: str = ""
    gvisor: str = "gvisor"
    kata: str = "kata"

    def of(self, isolation: Isolation) -> str:
        """The name for ``isolation``, whether the cluster has it or not."""
        names = {
            Isolation.CONTAINER: self.container,
            Isolation.GVISOR: self.gvisor,
            Isolation.KATA: self.kata,
        }
        return names[isolation]


class KubernetesBackend:
    """See ``sandbox.model.Backend``."""

    name = "kubernetes"
    confined = True

    def __init__(
        self,
        sandboxes: Path,
        *,
        reach: Reach,
        classes: Classes,
        pool: manifests.Pool,
        probe_image: Callable[[], str],
    ) -> None:
        """``probe_image`` gives any image that ``runner builder push`` made, for ``probe``."""
        self._sandboxes = sandboxes
        self._reach = reach
        self._classes = classes
        self._pool = pool
        self.probe_image = probe_image

    @property
    def namespace(self) -> str:
        """Of builds."""
        return self._pool.namespace

    def class_of(self, isolation: Isolation) -> str:
        """Name of the RuntimeClass; empty for the nodes' default runtime."""
        return self._classes.of(isolation)

    def connect(self) -> Cluster:
        """Raises ClusterUnreachable where none is configured."""
        return Cluster.connect(self._reach.kubeconfig, self._reach.context)

    def offer(self) -> Offer:
        try:
            self.require_port()
            with self.connect() as cluster:
                refused = dict(self._refused(cluster))
        except IsolationUnavailable as error:
            refused = dict.fromkeys(Isolation, error)
        return Offer(refused=refused, rootless=False)

    def _refused(self, cluster: Cluster) -> Iterator[tuple[Isolation, IsolationUnavailable]]:
        for isolation in set(Isolation) - {Isolation.GVISOR}:
            yield (
                isolation,
                IsolationUnavailable(
                    f"no builder lives in a pod under {isolation} at Pod Security level baseline",
                    advice="They do under gvisor; the docker backend offers the others.",
                ),
            )
        try:
            self.handler(cluster, Isolation.GVISOR)
        except IsolationUnavailable as error:
            yield Isolation.GVISOR, error

    def handler(self, cluster: Cluster, isolation: Isolation) -> str:
        """What nodes call the runtime of ``isolation``; empty for their default one.

        Raises:
            RuntimeUnknown: There is no such class.
        """
        name = self._classes.of(isolation)
        if not name and isolation is Isolation.CONTAINER:
            return ""
        if not name:
            raise RuntimeUnknown(
                f"no RuntimeClass is configured for {isolation}",
                advice=f"{isolation} under [kubernetes] in config.toml.",
            )
        found = cluster.get(RuntimeClass, f"/apis/node.k8s.io/v1/runtimeclasses/{name}")
        if found is None:
            raise RuntimeUnknown(
                f"the cluster has no RuntimeClass {name!r}, which {isolation} is configured to use",
                advice="deploy/kubernetes has some; runner doctor --backend kubernetes",
            )
        return found.handler

    def require_port(self) -> str:
        """The gateway's address. Raises IsolationUnavailable where pods could not come to us."""
        if self._reach.gateway is None:
            raise IsolationUnavailable(
                "config.toml does not say where pods find the gateway", advice=_ADVICE
            )
        if not self._reach.certificate.exists():
            raise IsolationUnavailable(
                "the gateway's port was never started with this state directory",
                advice="runner gateway serve --listen 0.0.0.0:8443; docs/kubernetes.md",
            )
        return self._reach.gateway

    def reserve(self, build_id: str) -> KubernetesPlace:
        cluster = self.connect()
        try:
            return kubernetesplace.reserve(
                self._sandboxes,
                build_id,
                cluster=cluster,
                namespace=self._pool.namespace,
                doors_at=self._reach.doors,
            )
        except BaseException:
            cluster.close()
            raise

    def provides(self, isolation: Isolation) -> Provided:
        del isolation  # a pod mounts no file of another host, and what it pulls comes from us
        return Provided.PULLED

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        from sandbox.kubernetes import probe as kubernetesprobe  # noqa: PLC0415 - for doctor alone

        return kubernetesprobe.probe(self, isolation)

    def clean(self, directory: Path) -> None:
        kubernetesplace.clean(directory, self.connect)

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        doors.sweep(self._reach.doors)
        if self._reach.gateway is None:
            return  # nobody builds in a cluster
        with suppress(ClusterUnreachable), self.connect() as cluster:
            yield from kubernetesplace.sweep(cluster, self._pool.namespace, self._sandboxes, roots)

    def sweep_older(self, seconds: float) -> Iterator[str]:
        """Removes what is older in the builds' namespace, whoever's it is, and says what.

        For state directories that are lost, such as a volume's. Raises ClusterUnreachable.
        """
        with self.connect() as cluster:
            yield from kubernetesplace.sweep_older(cluster, self._pool.namespace, seconds)

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        assert isinstance(place, KubernetesPlace), "from this backend's reserve"
        if spec.rootless:
            raise IsolationUnavailable(
                "policy asks for rootless, and a cluster does not show what its nodes run as root"
            )
        address, cluster = self.require_port(), place.cluster
        handler = self.handler(cluster, spec.isolation)
        if not spec.image:
            raise SandboxFailed(
                "the builder's image is in no registry that the cluster knows",
                advice="runner builder push; docs/kubernetes.md",
            )
        pod = manifests.Pod(
            name=place.title,
            image=spec.image,
            runtime_class=self._classes.of(spec.isolation),
            labels=place.labels,
            pool=self._pool,
        )
        nonce = secrets.token_hex(16)
        ways = _ways(address)
        files = {
            manifests.PLAN: plan.render(spec, nonce, ways, probes=self._probes(cluster)),
            manifests.KEY: place.key.secret.encode(),
            manifests.CERTIFICATE: self._reach.certificate.read_bytes(),
        }
        outlet = place.outlet(collect, spec.limits) if collect is not None else None
        try:
            machine = KubernetesMachine(place, spec, pod, files, nonce=nonce, waiting=waiting)
        except BaseException:
            if outlet is not None:
                outlet.close()
            raise
        asked = PodSpec.model_validate(manifests.job(spec, pod)["spec"]["template"]["spec"])
        launched = _Launched(machine, cluster, asked, pod.image, handler)
        return SupervisedSandbox(
            machine,
            spec.limits,
            nonce=nonce,
            accept=partial(_accept, launched, spec),
            hand_in=partial(machine.hand_in, spec),
            log=log,
            outlet=outlet,
        )

    def _probes(self, cluster: Cluster) -> tuple[str, ...]:
        """What the sandbox tries to reach before anything untrusted is in it, and must not."""
        return (METADATA, *_api_addresses(cluster), *self._reach.forbidden)


def _ways(address: str) -> Ways:
    names = {name: f"tls:{address}/{name}" for name in ("host", "files", "gateway", "outlet")}
    return Ways(**names, init=manifests.INIT)


def _api_addresses(cluster: Cluster) -> Iterator[str]:
    """Of the API server, as pods have it."""
    found = cluster.get(Service, "/api/v1/namespaces/default/services/kubernetes")
    if found is not None and "." in found.spec.cluster_ip:  # IPv4, as the first process has it
        for port in found.spec.ports:
            yield f"{found.spec.cluster_ip}:{port.port}"


@dataclass(frozen=True, slots=True)
class _Launched:
    machine: KubernetesMachine
    cluster: Cluster
    asked: PodSpec
    image: str
    handler: str


def _accept(launched: _Launched, spec: SandboxSpec, observation: Observation) -> Evidence:
    if spec.isolation is Isolation.GVISOR and observation.release == _OLD_GVISOR:
        raise RuntimeTooOld(
            "the nodes' gVisor is of before 2026, and builders cannot live in its pods",
            advice="A current release on the nodes: deploy/kubernetes; gvisor.dev",
        )
    pod, handler = launched.machine.running_pod(), launched.handler
    if faults := list(changed(pod.spec, launched.asked)):
        raise IsolationMismatch(f"the cluster made another pod: {faults[0]}")
    if not pod.builder.image_id.endswith(launched.image.rpartition("@")[2]):
        raise IsolationMismatch(f"the cluster made a pod of image {pod.builder.image_id!a}")
    launched.machine.watch_over(partial(changed, asked=launched.asked))
    node = launched.cluster.get(Node, f"/api/v1/nodes/{pod.spec.node_name}")
    if node is None:
        raise SandboxFailed(f"the sandbox's node is gone: {pod.spec.node_name}")
    info = node.status.node_info
    tunnels = _TUNNELS if spec.isolation is Isolation.CONTAINER else set()
    return judge(
        observation,
        ClusterView(
            node=pod.spec.node_name,
            node_kernel=info.kernel_version,
            pod=pod.metadata.uid,
            runtime_class=pod.spec.runtime_class_name,
            handler=handler,
            image=pod.builder.image_id,
        ),
        Expected(
            isolation=spec.isolation,
            uid=spec.plan.uid,
            # A node does not tell the version of its kernel's build; boot id and release do.
            host=HostKernel(release=info.kernel_version, version="", boot_id=info.boot_id),
            rootless=spec.rootless,
            interfaces=frozenset({"eth0"} | tunnels),
        ),
        runtime=f"Kubernetes, {handler or 'the default runtime'}",
        runtime_version=info.container_runtime_version,
    )


def changed(pod: PodSpec, asked: PodSpec) -> Iterator[str]:
    """What somebody changed, on the way in or later: a webhook may do anything to a pod. Pure."""
    others: list[Named] = [*pod.init_containers, *pod.ephemeral_containers, *pod.containers]
    names = sorted(each.name for each in others)
    if names != [manifests.CONTAINER]:
        yield f"its containers are {', '.join(names)[:200]}"
    if pod.runtime_class_name != asked.runtime_class_name:
        yield f"its RuntimeClass is {pod.runtime_class_name!r}"
    if pod.host_network or pod.host_pid or pod.host_ipc:
        yield "it shares namespaces with its node"
    if pod.automount_service_account_token:
        yield "it has a service account's token"
    # Another program, or a volume over ours, would show any canary it likes.
    for ours, theirs in zip(asked.containers, pod.containers, strict=False):
        for name in Container.model_fields:
            if getattr(ours, name) != getattr(theirs, name):
                yield f"the {name.replace('_', ' ')} of its container is another"
    if _kinds(pod) != _kinds(asked):
        yield f"its volumes are {', '.join(sorted(_kinds(pod)))[:200]}"


def _kinds(pod: PodSpec) -> dict[str, tuple[bool, str]]:
    """Of each volume, whether it is empty, and which Secret is in it."""
    return {
        each.name: (each.empty_dir is not None, each.secret.secret_name if each.secret else "")
        for each in pod.volumes
    }
