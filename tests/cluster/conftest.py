"""Somebody who builds in a real cluster: the one that KUBECONFIG names.

``make test-cluster`` runs these, on a machine that pods can reach and that reaches the API::

    KUBECONFIG               an identity that may do what docs/kubernetes.md lists, and label nodes
    RUNNER_CLUSTER_GATEWAY   A.B.C.D:PORT of this machine, which pods may reach and nothing else
    RUNNER_CLUSTER_REGISTRY  HOST:PORT of a registry, plain HTTP, that nodes pull from
    RUNNER_CLUSTER_NAMESPACE of builds, there already [runner-builds]
    RUNNER_CLUSTER_CLASS     a RuntimeClass of gVisor [gvisor]

docs/kubernetes.md tells how a cluster for them is made.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from builder.buildah import Buildah
from policies.reference import ImageReference
from runner.settings import KubernetesSettings, RegistrySettings, Settings
from runner.stores import podimage
from runner.stores.rootfs import RootfsStore
from sandbox.kubernetes import manifests
from sandbox.kubernetes.place import of_state
from tests.integration.conftest import (
    builders,
    cache,
    place,
    playground,
    registry,
    settings,
    tools_base,
)
from tests.support.hosts import Person, read_until

__all__ = ["builders", "cache", "place", "playground", "registry", "settings", "tools_base"]

_NEEDED = ("KUBECONFIG", "RUNNER_CLUSTER_GATEWAY", "RUNNER_CLUSTER_REGISTRY")


@dataclass(frozen=True, slots=True)
class RealCluster:
    """The cluster, as its administrator has it."""

    kubeconfig: str
    namespace: str

    def kubectl(self, *words: str, document: Any = None) -> str:
        """What ``kubectl WORDS`` says; ``document`` is its standard input."""
        done = subprocess.run(
            ["kubectl", f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *words],
            input=None if document is None else json.dumps(document),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def names(self, person: Person) -> list[str]:
        """What is left of any sandbox of theirs."""
        return self.kubectl("get", "jobs,pods,secrets", selector(person), "--output=name").split()


def selector(person: Person) -> str:
    """What all that is theirs has."""
    return f"--selector={manifests.STATE_LABEL}={of_state(person.home.sandboxes)}"


@pytest.fixture(scope="session")
def cluster() -> RealCluster:
    """Skips, loudly, where none is named."""
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not set: docs/kubernetes.md tells how to get a cluster")
    namespace = os.environ.get("RUNNER_CLUSTER_NAMESPACE", "runner-builds")
    return RealCluster(os.environ["KUBECONFIG"], namespace)


@pytest.fixture(scope="session")
def cluster_settings(cluster: RealCluster, settings: Settings) -> Settings:
    """Those of everybody's, and of the cluster."""
    host = os.environ["RUNNER_CLUSTER_REGISTRY"]
    plain = RegistrySettings(plain_http=True, private_address=True)
    kubernetes = KubernetesSettings(
        gateway=os.environ["RUNNER_CLUSTER_GATEWAY"],
        repository=f"{host}/runner-tests",
        kubeconfig=cluster.kubeconfig,
        namespace=cluster.namespace,
        gvisor=os.environ.get("RUNNER_CLUSTER_CLASS", "gvisor"),
        pending_seconds=60,
    )
    registries = {**settings.registries, host: plain}
    return settings.model_copy(update={"kubernetes": kubernetes, "registries": registries})


@dataclass(slots=True)
class Port:
    """The gateway's port, as a process that can be started again."""

    person: Person
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        gateway = self.person.settings.kubernetes.gateway
        assert gateway is not None
        self.process = self.person.start("gateway", "serve", "--listen", gateway)
        read_until(self.process, self.process.stderr, "listening")

    def kill(self) -> None:
        """Without a chance to say farewell to anybody."""
        assert self.process is not None
        with self.process as process:
            process.kill()


@pytest.fixture(scope="session")
def port(somebody: Person) -> Iterator[Port]:
    """Running, for everybody."""
    port = Port(somebody)
    port.start()
    yield port
    port.kill()


@pytest.fixture(scope="session")
def somebody(
    playground: Path, builders: Path, cluster: RealCluster, cluster_settings: Settings
) -> Iterator[Person]:
    """Whoever runs the tests, with a pushed builder."""
    person = replace(
        Person.move_in(playground / "cluster-me", cluster_settings, builders), backend="kubernetes"
    )
    installed = RootfsStore(person.home.builders).installed("buildah")
    assert installed is not None
    destination = ImageReference.parse(f"{cluster_settings.kubernetes.repository}/buildah:tests")
    podimage.push(Buildah.recipe, installed, destination, cluster_settings)
    yield person
    person.move_out()
