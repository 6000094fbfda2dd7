"""Renders a SandboxSpec as what the Docker Engine API 1.41 makes containers and networks of. Pure.

Nothing in here comes from a build's context: names, labels and options are ours, and what the user
gave is in the plan, a file that the first process reads.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from builder.model import DOOR, RUNNER
from policies.model import Isolation, Limits
from sandbox.model import FILES_LIMIT, GATEWAY_PORT, GATEWAY_SOCKET, OUTLET_SOCKET, SandboxSpec

LABEL = "untrusted-runner"
"""Whose containers and networks these are; its value names the state directory."""
NAME_LABEL = f"{LABEL}.sandbox"
DIGEST_LABEL = f"{LABEL}.root"
REPOSITORY = "untrusted-runner/builder"
BRIDGE = "ur-"
"""How the host's interfaces of our networks begin; the kernel allows 15 characters altogether."""
OUTLET_PORT = GATEWAY_PORT + 1
_PERIOD_MICROSECONDS = 100_000
_RELAY_BYTES = 256 << 20
"""A buffer of 1 MiB for each way of ``guest/door.c``'s 64 connections, and what sockets hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What the engine needs to know besides the spec.

    Attributes:
        image: Of the builder's root filesystem.
        runtime: As the engine calls it.
        guest: Volume that appears at RUNNER.
        network: ``none``, or a network of the sandbox's own.
        apparmor: Whether the engine would confine it by AppArmor.
    """

    image: str
    runtime: str
    guest: str
    network: str
    labels: Mapping[str, str]
    apparmor: bool


def sandbox(spec: SandboxSpec, container: Container) -> dict[str, Any]:
    """The builder's container."""
    limits = spec.limits
    host = {
        **_bounded(limits.memory_bytes, limits.pids),
        "Runtime": container.runtime,
        "NetworkMode": container.network,
        "CpuPeriod": _PERIOD_MICROSECONDS,
        "CpuQuota": limits.cpu_millis * _PERIOD_MICROSECONDS // 1000,
        "CapAdd": _capabilities(spec, container),
        "SecurityOpt": _security(spec.isolation, apparmor=container.apparmor),
        "Ulimits": _ulimits(spec),
        "Tmpfs": {path: _tmpfs(path, limits) for path in sorted(spec.plan.writable)},
        "Mounts": [_guest(container.guest)],
    }
    return {
        **_process(container.image, [f"{RUNNER}/init", f"{RUNNER}/plan"], container.labels),
        "User": f"{spec.plan.uid}:{spec.plan.uid}",
        "Env": [f"{name}={value}" for name, value in spec.plan.environment.items()],
        "HostConfig": host,
    }


def relay(container: Container) -> dict[str, Any]:
    """The only neighbour of a sandbox that has a network: our first process as a forwarder.

    It belongs to the trusted side, and has nothing but the sockets of this one sandbox.
    """
    ways = [
        str(GATEWAY_PORT), f"{DOOR}/{GATEWAY_SOCKET}", str(OUTLET_PORT), f"{DOOR}/{OUTLET_SOCKET}",
    ]  # fmt: skip
    host = {
        **_bounded(_RELAY_BYTES, _RELAY_TASKS),
        "Runtime": container.runtime,
        "NetworkMode": container.network,
        "SecurityOpt": ["no-new-privileges"],
        "Mounts": [_guest(container.guest)],
    }
    return {
        **_process(container.image, [f"{RUNNER}/init", "relay", *ways], container.labels),
        "User": "0:0",  # whose sockets these are; without a single capability
        "Env": [],
        "HostConfig": host,
    }


_RELAY_TASKS = 256
"""Two for each of the 64 connections of ``guest/door.c``, at two doors."""


def network(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """A network of two: no way out, and no address of the host in it.

    Args:
        name: Of the network.
        labels: That it gets.
    """
    return {
        "driver": "bridge",
        "internal": True,
        "enable_ipv6": False,
        "labels": dict(labels),
        "options": {
            "com.docker.network.bridge.name": bridge(name),
            # The kernel gives every bridge an address of IPv6, by which all that listens on the
            # host is reached; but none to a link that carries less than 1280 bytes (RFC 8200, 5).
            "com.docker.network.driver.mtu": str(_MTU),
            # Nor one of IPv4: what Engine 28 calls a gateway mode "isolated", under an older name.
            "com.docker.network.bridge.inhibit_ipv4": "true",
            "com.docker.network.bridge.enable_ip_masquerade": "false",
        },
    }


_MTU = 1279


def volume(directory: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """``directory`` of the host as a volume that the host's kernel keeps read-only.

    Of a bind mount in a container that is so inside gVisor only: root of the sandbox can remount
    it, and the gofer writes for it as the host's root. This mount is the engine's, out of reach.
    """
    options = {"type": "none", "o": "bind,ro,nosuid,nodev", "device": directory}
    return {"driver": "local", "driver_opts": options, "labels": dict(labels)}


def bridge(network: str) -> str:
    """The host's interface of a network: one rule of the host's firewall can name all of ours."""
    return f"{BRIDGE}{hashlib.sha256(network.encode()).hexdigest()[:12]}"


def _capabilities(spec: SandboxSpec, container: Container) -> list[str]:
    """On a network no one inside may take other addresses.

    A host takes what is sent to any of its own on every one of its interfaces, also without one.
    """
    wanted = spec.plan.capabilities
    if container.network == "none":
        return list(wanted)
    return [each for each in wanted if each not in {"NET_ADMIN", "NET_RAW"}]


def _process(image: str, command: list[str], labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "Image": image,
        "Entrypoint": command[:1],
        "Cmd": command[1:],
        "WorkingDir": "/",
        "Hostname": "sandbox",
        "Labels": dict(labels),
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGKILL",  # an engine that stops does not wait for it
        "Tty": False,
        # Its standard input ends with whoever started it, and so does our first process.
        "OpenStdin": True, "StdinOnce": True,
        "AttachStdin": True, "AttachStdout": True, "AttachStderr": True,
    }  # fmt: skip


def _bounded(memory_bytes: int, pids: int) -> dict[str, Any]:
    return {
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,  # both together: no swap
        "PidsLimit": pids,
        "CapDrop": ["ALL"],
        "Privileged": False,
        "ReadonlyRootfs": True,
        "AutoRemove": False,  # how it ended is asked for afterwards
        "RestartPolicy": {"Name": "no"},
        # Its output comes to us and is bounded here; the engine keeps none.
        "LogConfig": {"Type": "none"},
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Init": False,
        # The host's name servers are nobody's business inside, and nothing asks them.
        "Dns": ["127.0.0.1"], "DnsSearch": ["."], "DnsOptions": [],
    }  # fmt: skip


def _security(isolation: Isolation, *, apparmor: bool) -> list[str]:
    options = ["no-new-privileges"]
    if apparmor and isolation is Isolation.CONTAINER:
        # docker-default refuses every mount, and builders make some for each RUN.
        options.append("apparmor=unconfined")
    return options


def _ulimits(spec: SandboxSpec) -> list[dict[str, Any]]:
    """Of the sandbox's own kernel. On the host's they are the engine's, which it may not raise."""
    if spec.isolation is Isolation.CONTAINER:
        return []
    # Kata bounds no tasks on the host: the guest's kernel does, for all but its root.
    tasks = spec.limits.pids if spec.isolation is Isolation.KATA else FILES_LIMIT
    wanted = (("nofile", FILES_LIMIT), ("nproc", tasks))
    return [{"Name": name, "Soft": most, "Hard": most} for name, most in wanted]


def _tmpfs(path: str, limits: Limits) -> str:
    mode = "1777" if PurePosixPath(path).name == "tmp" else "0755"
    return f"exec,nosuid,nodev,size={limits.disk_bytes},mode={mode}"


def _guest(volume: str) -> dict[str, Any]:
    return {
        "Type": "volume",
        "Source": volume,
        "Target": RUNNER,
        "ReadOnly": True,
        "VolumeOptions": {"NoCopy": True},
    }
