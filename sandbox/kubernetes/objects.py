"""What is read of the Kubernetes API: the parts of its objects that a sandbox's life shows in.

Everything else is left out when it is parsed. Texts may be whatever a node, a webhook or an image
put there: they are cut to a bound here, and escaped where they are shown.
"""

from typing import Annotated

from pydantic import (
    AfterValidator,
    AliasGenerator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    model_validator,
)
from pydantic.alias_generators import to_camel

_TEXT = 1000
_CAPITALS = {"Id": "ID", "Ip": "IP", "Pid": "PID", "Ipc": "IPC"}
"""Abbreviations at the end of a member's name, which the API writes in capitals."""


def _member(name: str) -> str:
    camel = to_camel(name)
    end = next((each for each in _CAPITALS if camel.endswith(each)), "")
    return camel.removesuffix(end) + _CAPITALS.get(end, "")


def _cut(text: str) -> str:
    return " ".join(text.split())[:_TEXT]


Text = Annotated[str, AfterValidator(_cut)]


class Part(BaseModel):
    """Of an object, by the names that the API gives its members."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=AliasGenerator(_member), populate_by_name=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, document: object) -> object:
        """Go's null is what is not there. Each bookmark's spec has it for containers."""
        if not isinstance(document, dict):
            return document
        return {name: value for name, value in document.items() if value is not None}


class Owner(Part):
    """Of an object, as whoever made the object says."""

    kind: str = ""
    uid: str = ""
    controller: bool = False


class Metadata(Part):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    creation_timestamp: AwareDatetime | None = None
    owner_references: tuple[Owner, ...] = ()


class Reason(Part):
    """Why a container waits, or how it ended."""

    reason: Text = ""
    message: Text = ""
    exit_code: int | None = None


class Running(Part):
    """A container that was started, and has not ended."""


class ContainerState(Part):
    waiting: Reason | None = None
    running: Running | None = None
    terminated: Reason | None = None


class ContainerStatus(Part):
    name: str = ""
    image_id: Text = ""
    state: ContainerState = ContainerState()


class Condition(Part):
    type: str = ""
    status: str = ""
    reason: Text = ""
    message: Text = ""


class PodStatus(Part):
    phase: str = ""
    reason: Text = ""
    message: Text = ""
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class Named(Part):
    name: str = ""


class Capabilities(Part):
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


class SecurityContext(Part):
    privileged: bool = False
    allow_privilege_escalation: bool = True
    capabilities: Capabilities = Capabilities()
    read_only_root_filesystem: bool = False


class Mount(Part):
    name: str = ""
    mount_path: str = ""
    sub_path: str = ""
    sub_path_expr: str = ""


class Container(Named):
    """All that may change which program runs, and what it finds. Of variables, their names.

    Not the image, which a mirror may have under another name: its digest is compared.
    """

    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    env: tuple[Named, ...] = ()
    env_from: tuple[dict[str, object], ...] = ()
    volume_mounts: tuple[Mount, ...] = ()
    volume_devices: tuple[Named, ...] = ()
    security_context: SecurityContext = SecurityContext()
    lifecycle: dict[str, object] = {}
    liveness_probe: dict[str, object] = {}
    readiness_probe: dict[str, object] = {}
    startup_probe: dict[str, object] = {}


class SecretSource(Part):
    secret_name: str = ""


class Volume(Part):
    """Of any other kind than those that are asked for it is neither."""

    name: str = ""
    empty_dir: dict[str, object] | None = None
    secret: SecretSource | None = None


class PodSpec(Part):
    """As the pod was admitted, whatever was asked for."""

    node_name: str = ""
    runtime_class_name: str = ""
    host_network: bool = False
    host_pid: bool = False
    host_ipc: bool = False
    automount_service_account_token: bool = True
    containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    init_containers: tuple[Named, ...] = ()
    ephemeral_containers: tuple[Named, ...] = ()


class Pod(Part):
    metadata: Metadata = Metadata()
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    def condition(self, kind: str) -> Condition | None:
        """The condition of that type, if it is there."""
        return next((each for each in self.status.conditions if each.type == kind), None)

    @property
    def builder(self) -> ContainerStatus:
        """Status of the only container; an empty one before there is any."""
        return next(iter(self.status.container_statuses), ContainerStatus())


class Pods(Part):
    metadata: Metadata = Metadata()
    items: tuple[Pod, ...] = ()


class JobStatus(Part):
    conditions: tuple[Condition, ...] = ()


class Job(Part):
    metadata: Metadata = Metadata()
    status: JobStatus = JobStatus()


class Jobs(Part):
    items: tuple[Job, ...] = ()


class Event(Part):
    """What a component of the cluster says about an object."""

    type: str = ""
    reason: Text = ""
    message: Text = ""


class Events(Part):
    items: tuple[Event, ...] = ()


class NodeInfo(Part):
    kernel_version: Text = ""
    boot_id: Text = ""
    container_runtime_version: Text = ""


class NodeStatus(Part):
    node_info: NodeInfo = NodeInfo()


class Node(Part):
    status: NodeStatus = NodeStatus()


class RuntimeClass(Part):
    handler: Text = ""


class ServicePort(Part):
    port: int = 0
    protocol: str = "TCP"


class ServiceSpec(Part):
    cluster_ip: str = ""
    ports: tuple[ServicePort, ...] = ()


class Service(Part):
    spec: ServiceSpec = ServiceSpec()


class Version(Part):
    minor: Text = ""
    git_version: Text = ""


class ReviewStatus(Part):
    allowed: bool = False


class AccessReview(Part):
    status: ReviewStatus = ReviewStatus()


class Namespace(Part):
    metadata: Metadata = Metadata()


class AdmissionPolicy(Part):
    metadata: Metadata = Metadata()


class NetworkPolicy(Part):
    metadata: Metadata = Metadata()


class NetworkPolicies(Part):
    items: tuple[NetworkPolicy, ...] = ()


class QuotaStatus(Part):
    hard: dict[str, str] = {}
    used: dict[str, str] = {}


class ResourceQuota(Part):
    status: QuotaStatus = QuotaStatus()


class ResourceQuotas(Part):
    items: tuple[ResourceQuota, ...] = ()


class Status(Part):
    """What the API answers where it does not do what it was asked."""

    reason: Text = ""
    message: Text = ""
    code: int = 0
