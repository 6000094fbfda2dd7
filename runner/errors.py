"""Every error that a user can meet, one code and one exit status each.

::

    RunnerError
    ├── UsageError                      2  usage
    │   ├── InvalidReference            2  invalid-reference
    │   ├── PolicyInvalid               2  policy-invalid
    │   ├── ConfigInvalid               2  config-invalid
    │   ├── DockerfileInvalid           2  dockerfile-invalid
    │   ├── StageUnknown                2  stage-unknown
    │   ├── BaseImageUnknown            2  base-image-unknown
    │   ├── BuilderUnknown              2  builder-unknown
    │   ├── BuilderNotInstalled         2  builder-not-installed
    │   ├── BuilderInstallFailed        2  builder-install-failed
    │   ├── ContextInvalid              2  context-invalid
    │   ├── DockerfileMissing           2  dockerfile-missing
    │   ├── OutputInvalid               2  output-invalid
    │   └── StateUnusable               2  state-unusable
    ├── PolicyDenied                    3  policy-denied
    │   ├── BaseImageDenied             3  base-image-denied
    │   └── AddressDenied               3  address-denied
    ├── IsolationError                  4  isolation
    │   ├── IsolationUnavailable        4  isolation-unavailable
    │   │   ├── EngineUnavailable       4  engine-unavailable
    │   │   ├── RuntimeUnknown          4  runtime-unknown
    │   │   ├── RuntimeTooOld           4  runtime-too-old
    │   │   ├── ClusterUnreachable      4  cluster-unreachable
    │   │   ├── ClusterForbidden        4  cluster-forbidden
    │   │   ├── ClusterQuotaExceeded    4  cluster-quota-exceeded
    │   │   ├── AdmissionRefused        4  admission-refused
    │   │   ├── Unschedulable           4  unschedulable
    │   │   └── TimeInQueue             4  time-in-queue
    │   ├── IsolationMismatch           4  isolation-mismatch
    │   │   └── NetworkOpen             4  network-open
    │   └── SandboxFailed               4  sandbox-failed
    │       ├── EngineLost              4  engine-lost
    │       ├── ImagePullFailed         4  image-pull-failed
    │       └── SandboxLost             4  sandbox-lost
    │           ├── NodeLost            4  node-lost
    │           ├── Preempted           4  preempted
    │           ├── Evicted             4  evicted
    │           └── PodDeleted          4  pod-deleted
    ├── BuildFailed                     1  build-failed
    ├── CheckFailed                     1  check-failed
    ├── VerificationFailed              5  verification-failed
    │   ├── NothingStaged               5  nothing-staged
    │   ├── LayoutInvalid               5  layout-invalid
    │   ├── BaseImageInvalid            5  base-image-invalid
    │   ├── BaseImageCorrupt            5  base-image-corrupt
    │   └── BuilderCorrupt              5  builder-corrupt
    ├── RegistryError                   6  registry
    │   ├── RegistryUnreachable         6  registry-unreachable
    │   ├── RegistryRefused             6  registry-refused
    │   ├── RegistryProtocol            6  registry-protocol
    │   ├── ImageNotFound               6  image-not-found
    │   └── ReadBackDiffers             6  read-back-differs
    ├── LimitExceeded                   7  limit-exceeded
    │   ├── ContextTooLarge             7  context-too-large
    │   ├── TimeExceeded                7  time-exceeded
    │   ├── MemoryExceeded              7  memory-exceeded
    │   ├── PidsExceeded                7  pids-exceeded
    │   ├── LogExceeded                 7  log-exceeded
    │   ├── DiskExceeded                7  disk-exceeded
    │   └── QuotaExceeded               7  quota-exceeded
    ├── Cancelled                       8  cancelled
    └── InternalError                  70  internal
"""

from builder.errors import BuilderUnknown, DockerfileInvalid, StageUnknown
from policies.errors import (
    ExitStatus,
    InvalidReference,
    PolicyDenied,
    PolicyInvalid,
    RunnerError,
    UsageError,
)
from sandbox.errors import (
    AdmissionRefused,
    ClusterForbidden,
    ClusterQuotaExceeded,
    ClusterUnreachable,
    EngineLost,
    EngineUnavailable,
    Evicted,
    ImagePullFailed,
    IsolationError,
    IsolationMismatch,
    IsolationUnavailable,
    NetworkOpen,
    NodeLost,
    PodDeleted,
    Preempted,
    RuntimeTooOld,
    RuntimeUnknown,
    SandboxFailed,
    SandboxLost,
    TimeInQueue,
    Unschedulable,
)

__all__ = [
    "AddressDenied",
    "AdmissionRefused",
    "BaseImageCorrupt",
    "BaseImageDenied",
    "BaseImageInvalid",
    "BaseImageUnknown",
    "BuildFailed",
    "BuilderCorrupt",
    "BuilderInstallFailed",
    "BuilderNotInstalled",
    "BuilderUnknown",
    "Cancelled",
    "CheckFailed",
    "ClusterForbidden",
    "ClusterQuotaExceeded",
    "ClusterUnreachable",
    "ConfigInvalid",
    "ContextInvalid",
    "ContextTooLarge",
    "DiskExceeded",
    "DockerfileInvalid",
    "DockerfileMissing",
    "EngineLost",
    "EngineUnavailable",
    "Evicted",
    "ExitStatus",
    "ImageNotFound",
    "ImagePullFailed",
    "InternalError",
    "InvalidReference",
    "IsolationError",
    "IsolationMismatch",
    "IsolationUnavailable",
    "LayoutInvalid",
    "LimitExceeded",
    "LogExceeded",
    "MemoryExceeded",
    "NetworkOpen",
    "NodeLost",
    "NothingStaged",
    "OutputInvalid",
    "PidsExceeded",
    "PodDeleted",
    "PolicyDenied",
    "PolicyInvalid",
    "Preempted",
    "QuotaExceeded",
    "ReadBackDiffers",
    "RegistryError",
    "RegistryProtocol",
    "RegistryRefused",
    "RegistryUnreachable",
    "RunnerError",
    "RuntimeTooOld",
    "RuntimeUnknown",
    "SandboxFailed",
    "SandboxLost",
    "StageUnknown",
    "StateUnusable",
    "TimeExceeded",
    "TimeInQueue",
    "Unschedulable",
    "UsageError",
    "VerificationFailed",
]


class ConfigInvalid(UsageError):
    """A configuration file that cannot be read or says something unknown."""

    code = "config-invalid"
    default_advice = "docs/configuration.md describes each key."


class BaseImageUnknown(UsageError):
    """No base image of this name or digest is unpacked here."""

    code = "base-image-unknown"
    default_advice = "runner base list"


class BuilderNotInstalled(UsageError):
    """The builder's root filesystem is not in the local store."""

    code = "builder-not-installed"
    default_advice = "runner builder install"


class BuilderInstallFailed(UsageError):
    """The builder's root filesystem could not be made; the store is as it was."""

    code = "builder-install-failed"
    default_advice = "runner doctor"


class ContextInvalid(UsageError):
    """The context is missing, unreadable, or not a directory."""

    code = "context-invalid"
    default_advice = "CONTEXT is a directory with everything that the Dockerfile copies."


class DockerfileMissing(UsageError):
    """The context has no such Dockerfile."""

    code = "dockerfile-missing"
    default_advice = "Name it with --file, relative to CONTEXT."


class OutputInvalid(UsageError):
    """``--output`` or another file to write names something that cannot be written."""

    code = "output-invalid"
    default_advice = (
        "Write oci:DIR for a directory that does not exist yet, oci-archive:FILE or tar:FILE."
    )


class StateUnusable(UsageError):
    """The directories that runner keeps its state in cannot be used."""

    code = "state-unusable"
    default_advice = "Set XDG_STATE_HOME and XDG_DATA_HOME to directories that you may write."


class BaseImageDenied(PolicyDenied):
    """An image that the build wants to start from is outside its reachable set."""

    code = "base-image-denied"
    default_advice = "The policy's base_images names what builds may start from."


class AddressDenied(PolicyDenied):
    """A host whose address is private, loopback or link-local and that nobody named."""

    code = "address-denied"
    default_advice = (
        'If this registry is yours, name it in config.toml: [registries."HOST:PORT"] '
        "private_address = true"
    )


class BuildFailed(RunnerError):
    """The build ran, contained as decided, and failed by itself."""

    code = "build-failed"
    status = ExitStatus.BUILD_FAILED
    default_advice = "The last lines of build.log say why."


class CheckFailed(RunnerError):
    """A check that was asked for did not pass."""

    code = "check-failed"
    status = ExitStatus.BUILD_FAILED
    default_advice = "Each failed row names its mend."


class VerificationFailed(RunnerError):
    """What arrived is not a sound image. Nothing was published.

    Attributes:
        rule: The rule of ``runner.verify`` that was broken, stable and kebab-case.
    """

    code = "verification-failed"
    status = ExitStatus.VERIFICATION
    default_advice = (
        "Nothing was published. The builder or the build made an image that breaks the rule."
    )

    def __init__(self, message: str, *, rule: str = "", advice: str | None = None) -> None:
        super().__init__(f"{message} [{rule}]" if rule else message, advice=advice)
        self.rule = rule


class NothingStaged(VerificationFailed):
    """The builder ended well and pushed nothing."""

    code = "nothing-staged"


class LayoutInvalid(VerificationFailed):
    """A file or directory that is no sound OCI layout."""

    code = "layout-invalid"
    default_advice = "Make it anew: skopeo copy docker://IMAGE oci-archive:FILE"


class BaseImageInvalid(VerificationFailed):
    """A base image that no build should start from: it breaks a rule of ``runner.verify``."""

    code = "base-image-invalid"
    default_advice = "It is not this build's fault: take another tag or digest of the base image."


class BaseImageCorrupt(VerificationFailed):
    """An unpacked base image is not what was written."""

    code = "base-image-corrupt"
    default_advice = "runner base remove DIGEST, then runner base pull IMAGE"


class BuilderCorrupt(VerificationFailed):
    """The builder's root filesystem is not what was installed."""

    code = "builder-corrupt"
    default_advice = "runner builder install --force"


class RegistryError(RunnerError):
    """A registry did not do what was needed."""

    code = "registry"
    status = ExitStatus.REGISTRY
    default_advice = "Nothing moved at the destination. Try again, or look at the registry's log."


class RegistryUnreachable(RegistryError):
    """No usable answer came, after retries."""

    code = "registry-unreachable"
    default_advice = "Check the host's name, port and TLS; plain HTTP must be configured."


class RegistryRefused(RegistryError):
    """The registry wants other credentials, or none would do."""

    code = "registry-refused"
    default_advice = (
        "Log in with `docker login` or `skopeo login`. Untrusted builds pull anonymously unless "
        "the policy's pull_credentials names the repository."
    )


class RegistryProtocol(RegistryError):
    """The registry answered with something outside the distribution specification."""

    code = "registry-protocol"


class ImageNotFound(RegistryError):
    """The registry has no such image, or does not show it to this identity."""

    code = "image-not-found"
    default_advice = "Check the name and the tag; a private image looks the same as a missing one."


class ReadBackDiffers(RegistryError):
    """What the registry gives back is not what was pushed. The tag was not moved."""

    code = "read-back-differs"


class LimitExceeded(RunnerError):
    """The build wanted more than its decision allows."""

    code = "limit-exceeded"
    status = ExitStatus.LIMIT
    default_advice = "The policy's limits set it; a build that needs more needs another rule."


class ContextTooLarge(LimitExceeded):
    """More bytes, entries or longer paths than a context may have."""

    code = "context-too-large"
    default_advice = "Leave out what the build does not need with .dockerignore."


class TimeExceeded(LimitExceeded):
    """The build took longer than it may."""

    code = "time-exceeded"
    default_advice = "--timeout asks for more, up to the wall_seconds of every policy."


class MemoryExceeded(LimitExceeded):
    """The sandbox needed more memory than it may; files written in it count."""

    code = "memory-exceeded"


class PidsExceeded(LimitExceeded):
    """The sandbox started more tasks than it may."""

    code = "pids-exceeded"


class LogExceeded(LimitExceeded):
    """The build wrote more output than it may."""

    code = "log-exceeded"


class DiskExceeded(LimitExceeded):
    """A file system is full, in the sandbox or on the host."""

    code = "disk-exceeded"
    default_advice = "In the sandbox the policy's disk_bytes sets it; on the host, free some space."


class QuotaExceeded(LimitExceeded):
    """The build pushed more than it may."""

    code = "quota-exceeded"


class Cancelled(RunnerError):
    """Somebody asked for an end; everything was cleaned up."""

    code = "cancelled"
    status = ExitStatus.CANCELLED
    default_advice = "Nothing was published."


class InternalError(RunnerError):
    """A bug of ours."""

    code = "internal"
    status = ExitStatus.BUG
    default_advice = "Please report it with the diagnostics file named above."
