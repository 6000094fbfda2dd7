"""What can go wrong with containment. ``runner.errors`` draws the whole tree."""

from policies.errors import ExitStatus, RunnerError


class IsolationError(RunnerError):
    """The isolation that was decided is not the isolation that could be had."""

    code = "isolation"
    status = ExitStatus.ISOLATION
    default_advice = "runner doctor"


class IsolationUnavailable(IsolationError):
    """This host cannot contain a build as decided. Nothing untrusted was given to a sandbox."""

    code = "isolation-unavailable"


class IsolationMismatch(IsolationError):
    """The sandbox is not what it was asked to be. The context was not released to it."""

    code = "isolation-mismatch"
    default_advice = "Something on this host answers to the runtime's name, as the message tells."


class NetworkOpen(IsolationMismatch):
    """The sandbox reaches more than the gateway. The context was not released to it."""

    code = "network-open"
    default_advice = (
        "Is there a NetworkPolicy for the builds' namespace, and a CNI that enforces it? Many "
        "clusters take policies and enforce none: runner doctor --backend kubernetes"
    )


class SandboxFailed(IsolationError):
    """The runtime itself failed, before the build could."""

    code = "sandbox-failed"


class EngineUnavailable(IsolationUnavailable):
    """The container engine does not answer, or not to this user. Nothing was started."""

    code = "engine-unavailable"
    default_advice = (
        "Is it running, and may this user use its socket? That is for root and the socket's group, "
        "often docker, whose members are root on the host: runner doctor --backend docker"
    )


class RuntimeUnknown(IsolationUnavailable):
    """The container engine has no such runtime. Nothing was started."""

    code = "runtime-unknown"


class RuntimeTooOld(IsolationUnavailable):
    """A runtime of a release that was never measured, or that has known holes."""

    code = "runtime-too-old"


class EngineLost(SandboxFailed):
    """The container engine went away in the middle of a build, which ended by that."""

    code = "engine-lost"
    default_advice = (
        "Nothing was published. When the engine is back, runner gc removes what is left of the "
        "sandbox, and the build can be submitted again."
    )


class ClusterUnreachable(IsolationUnavailable):
    """The API of the cluster does not answer. Nothing was started."""

    code = "cluster-unreachable"
    default_advice = "kubectl cluster-info; runner doctor --backend kubernetes"


class ClusterForbidden(IsolationUnavailable):
    """The cluster does not let this identity do what a build needs."""

    code = "cluster-forbidden"
    default_advice = "runner doctor --backend kubernetes tells every verb; deploy/ has the role."


class ClusterQuotaExceeded(IsolationUnavailable):
    """The builds' namespace has no room for another sandbox."""

    code = "cluster-quota-exceeded"
    default_advice = "Wait for other builds, or raise the namespace's ResourceQuota."


class AdmissionRefused(IsolationUnavailable):
    """The cluster's own rules do not admit the sandbox."""

    code = "admission-refused"
    default_advice = "The message names the rule: Pod Security, a policy or a webhook."


class Unschedulable(IsolationUnavailable):
    """No node took the sandbox in time."""

    code = "unschedulable"
    default_advice = (
        "The scheduler's words say what nodes lack: room for the build's limits, the labels that "
        "the RuntimeClass asks for, or a toleration of theirs ([kubernetes] in config.toml)."
    )


class TimeInQueue(IsolationUnavailable):
    """The cluster made no pod of the Job in time: it waits in a queue, or nobody looks at it."""

    code = "time-in-queue"
    default_advice = "Is the queue full, or the cluster's controller manager down?"


class ImagePullFailed(SandboxFailed):
    """The node cannot pull the builder's image."""

    code = "image-pull-failed"
    default_advice = (
        "runner builder push puts it into the registry that [kubernetes] images names; nodes need "
        "a way to it, and its Secret (pull_secrets) where it is private."
    )


class SandboxLost(SandboxFailed):
    """Something took the sandbox away in the middle of the build. Nothing was published."""

    code = "sandbox-lost"
    default_advice = "Nothing was published. Submit the build again."


class NodeLost(SandboxLost):
    """The sandbox's node went away, or was shut down."""

    code = "node-lost"


class Preempted(SandboxLost):
    """Another pod with more priority took the sandbox's place."""

    code = "preempted"
    default_advice = "Nothing was published. Give builds a priority class of their own."


class Evicted(SandboxLost):
    """The node ran out of something, or was drained."""

    code = "evicted"


class PodDeleted(SandboxLost):
    """Somebody deleted the sandbox's pod."""

    code = "pod-deleted"
