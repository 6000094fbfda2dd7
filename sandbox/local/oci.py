"""Renders a SandboxSpec as the ``config.json`` of the OCI runtime specification 1.0. Pure."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from builder.model import RUNNER
from sandbox.model import FILES_LIMIT, SandboxSpec


def config_json(spec: SandboxSpec, guest: str, images: Mapping[str, str]) -> bytes:
    """``config`` as the file that the runtime reads."""
    return json.dumps(config(spec, guest, images), indent=1).encode()


def config(spec: SandboxSpec, guest: str, images: Mapping[str, str]) -> dict[str, Any]:
    """The runtime's configuration.

    Args:
        spec: What to render.
        guest: The host directory that appears at RUNNER.
        images: Where each of the spec's images stands for this sandbox, by mount point.
    """
    names = [f"CAP_{name}" for name in spec.plan.capabilities]
    return {
        "ociVersion": "1.0.2",
        "hostname": "sandbox",
        "root": {"path": str(spec.root), "readonly": True},
        "process": {
            "user": {"uid": spec.plan.uid, "gid": spec.plan.uid},
            "cwd": "/",
            "args": [f"{RUNNER}/init", f"{RUNNER}/plan"],
            "env": [f"{name}={value}" for name, value in spec.plan.environment.items()],
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names),
            "rlimits": [
                {"type": kind, "soft": FILES_LIMIT, "hard": FILES_LIMIT}
                for kind in ("RLIMIT_NOFILE", "RLIMIT_NPROC")
            ],
        },
        "mounts": _mounts(spec, guest, images),
        "linux": {
            "namespaces": [
                {"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")
            ],
        },
    }  # fmt: skip


def _mounts(spec: SandboxSpec, guest: str, images: Mapping[str, str]) -> list[dict[str, Any]]:
    mounts = [
        _mount("/proc", "proc"),
        _mount("/dev", "tmpfs", "nosuid"),
        _mount("/sys", "sysfs", "ro", "nosuid", "noexec", "nodev"),
        # runc inside finds its cgroups by this mount: "could not join cgroup" without it.
        _mount("/sys/fs/cgroup", "cgroup"),
    ]
    # Parents first: /run before /run/runner.
    mounts += [
        _mount(
            path, "tmpfs", "nosuid", "nodev", f"size={spec.limits.disk_bytes}",
            f"mode={'1777' if PurePosixPath(path).name == 'tmp' else '0755'}",
        )
        for path in sorted(spec.plan.writable)
    ]  # fmt: skip
    mounts += [
        {"destination": path, "type": "erofs", "source": source, "options": ["ro", "nodev"]}
        for path, source in sorted(images.items())
    ]
    # A single bind: each one is a connection to the gofer and costs start-up time.
    bind = {"type": "bind", "source": guest, "options": ["bind", "ro", "nosuid", "nodev"]}
    return [*mounts, {"destination": RUNNER, **bind}]


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}
