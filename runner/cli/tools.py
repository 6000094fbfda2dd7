"""Puts the parts of this host together for the commands that need them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.buildah import Buildah
from builder.model import Builder
from policies import loader
from policies.errors import PolicyInvalid
from policies.loader import Policy
from runner import settings
from runner.files import Home
from runner.registry.auth import DockerConfig
from runner.stores.rootfs import RootfsStore
from runner.tools import OnDemand, Tools
from sandbox.local.backend import LocalBackend
from sandbox.model import Backend

if TYPE_CHECKING:
    from sandbox.docker.backend import DockerBackend
    from sandbox.kubernetes.backend import KubernetesBackend

OPERATOR_POLICY = Path("/etc/runner/policy.yaml")

BACKENDS = ("local", "docker", "kubernetes")
"""In the order in which they are tried where nobody names one."""
BUILDERS: dict[str, Builder] = {"buildah": Buildah()}


def local_backend(home: Home, loaded: settings.Settings) -> LocalBackend:
    """The local backend, as configured."""
    local = loaded.local
    uids = range(local.first_uid, local.first_uid + local.uids)
    return LocalBackend(home.sandboxes, runsc_name=local.runsc, uids=uids)


def docker_backend(home: Home, loaded: settings.Settings) -> "DockerBackend":
    """The docker backend, as configured."""
    from sandbox.docker.backend import DockerBackend, Runtimes  # noqa: PLC0415 - the SDK is dear

    docker = loaded.docker
    runtimes = Runtimes(
        container=docker.runc,
        gvisor=docker.runsc,
        kata=docker.kata,
        kata_older=docker.kata_older,
    )
    return DockerBackend(home.sandboxes, socket=Path(docker.socket), runtimes=runtimes)


def kubernetes_backend(home: Home, loaded: settings.Settings) -> "KubernetesBackend":
    """The kubernetes backend, as configured."""
    from sandbox.kubernetes.backend import (  # noqa: PLC0415 - the SDK is dear
        Classes,
        KubernetesBackend,
        Reach,
    )
    from sandbox.kubernetes.manifests import Pool, Toleration  # noqa: PLC0415 - likewise

    cluster = loaded.kubernetes
    return KubernetesBackend(
        home.sandboxes,
        reach=Reach(
            kubeconfig=Path(cluster.kubeconfig) if cluster.kubeconfig else None,
            context=cluster.context,
            gateway=cluster.gateway,
            state=home.gateway,
            forbidden=cluster.forbidden,
        ),
        classes=Classes(container=cluster.container, gvisor=cluster.gvisor, kata=cluster.kata),
        pool=Pool(
            namespace=cluster.namespace,
            node_selector=cluster.node_selector,
            tolerations=tuple(Toleration(**each.model_dump()) for each in cluster.tolerations),
            priority_class=cluster.priority_class,
            queue=cluster.queue,
            pull_secrets=cluster.pull_secrets,
            pending_seconds=cluster.pending_seconds,
        ),
        probe_image=partial(_pushed, home),
    )


def _pushed(home: Home) -> str:
    """Any builder's image in a registry; empty where none was pushed."""
    from runner.stores import podimage  # noqa: PLC0415 - for doctor alone

    store = RootfsStore(home.builders)
    found = (store.installed(name) for name in BUILDERS)
    return next((podimage.pushed(each) for each in found if each is not None), "")


def backends(home: Home, loaded: settings.Settings) -> Mapping[str, Backend]:
    """Those of this host, each made when it is needed."""
    makers: tuple[Callable[[Home, settings.Settings], Backend], ...] = (
        local_backend,
        docker_backend,
        kubernetes_backend,
    )
    return OnDemand(
        {name: partial(make, home, loaded) for name, make in zip(BACKENDS, makers, strict=True)}
    )


def operator_policy() -> bool:
    """Whether the operator wrote a policy; a link that leads nowhere is one that cannot be read.

    Raises:
        PolicyInvalid: Nobody can tell.
    """
    try:
        OPERATOR_POLICY.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PolicyInvalid(f"{OPERATOR_POLICY}: {error.strerror}") from None
    return True


def policies(given: list[Path]) -> list[Policy]:
    """The operator's policy, or the shipped default where there is none; then what was given.

    The decision is the stricter of all, so what was given can only tighten.
    """
    first = loader.read(OPERATOR_POLICY) if operator_policy() else loader.shipped("default")
    return [first, *map(loader.read, given)]


def assemble(given_policies: list[Path]) -> Tools:
    """Everything that a build is made with. Raises ConfigInvalid or PolicyInvalid."""
    loaded, home = settings.load(), Home.find()
    return Tools(
        settings=loaded,
        home=home,
        policies=policies(given_policies),
        backends=backends(home, loaded),
        builders=BUILDERS,
        credentials=DockerConfig(),
    )
