"""buildah, driven so that RUN steps see what they see under ``docker build``.

Chroot isolation is the usual choice inside another container, and ours under Kata and runc. But
gVisor keeps the read-only bind of ``/dev`` that buildah makes there, and ``/dev/null`` cannot be
written. With ``--isolation oci`` and runc inside the sandbox, RUN steps get a ``/dev`` of their
own. That needs a mount of type cgroup, and the capabilities of Docker's default set besides a
few, all of them in the Sentry alone.
"""

import base64
import json
import re
from collections.abc import Iterator

from builder.model import (
    BASE,
    CONFIG,
    CONTEXT_TAR,
    RUNNER,
    WORKSPACE,
    BuildInput,
    BuildPlan,
    UnpackedBase,
)
from builder.rootfs import Recipe
from policies.model import Isolation

STORE = "/var/lib/containers"
PACKED = "/run/base.erofs"
WRITABLE = (STORE, "/var/tmp", "/tmp", "/run", "/root", WORKSPACE)  # noqa: S108 - inside
CLAIM = "/run/runner-claim"
TAG = "latest"

RUN_CAPABILITIES = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip
"""What a RUN step has: Docker's default set."""

BUILDER_CAPABILITIES = (*RUN_CAPABILITIES, "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE")
"""What buildah and runc need besides, to mount and to enter namespaces."""

APART_CAPABILITIES = ("SETFCAP", "SETGID", "SETUID")
"""What a user namespace with every id in it takes; all else buildah has in there."""

_APART = {"_CONTAINERS_USERNS_CONFIGURED": "done"}
"""A namespace that maps each id to itself is taken for none by containers/storage, which then makes
overlays without userxattr: gVisor of 2026 breaks on those (measured; gvisor#14033, #14073)."""

RECIPE = Recipe(
    suite="trixie",
    # base-files brings the merged /usr; netavark must exist although no network is made.
    packages=("base-files", "buildah", "runc", "netavark", "tar", "ca-certificates", "erofs-utils"),
    leave_out=(
        "usr/share/doc/*",
        "usr/share/man/*",
        "usr/share/locale/*",
        "usr/share/info/*",
        "usr/libexec/buildah",  # buildah's own test programs, 90 MB
        "etc/containers/registries.conf.d/*",  # names without a host that stand for other hosts
    ),
    files={
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        "etc/hosts": b"127.0.0.1 localhost\n",
        "etc/resolv.conf": b"",
    },
    directories=(*WRITABLE, RUNNER),
    needs=("buildah", "runc", "tar", "mkfs.erofs", "fsck.erofs"),
    version_package="buildah",
)

CONTAINERS_CONF = """\
[containers]
netns = "host"
default_capabilities = {capabilities}
default_ulimits = {ulimits}
[engine]
runtime = "runc"
"""

STORAGE_CONF = f"""\
[storage]
driver = "overlay"
graphroot = "{STORE}/storage"
runroot = "/run/containers/storage"
[storage.options]
additionalimagestores = {{bases}}
"""

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "CONTAINERS_CONF": f"{CONFIG}/containers.conf",
    "CONTAINERS_REGISTRIES_CONF": f"{CONFIG}/registries.conf",
    "CONTAINERS_STORAGE_CONF": f"{CONFIG}/storage.conf",
}
_CACHE = "cache.tar"

POLICY_JSON = b'{"default":[{"type":"insecureAcceptAnything"}]}'
"""No signature is checked inside: what enters was checked by the gateway, what leaves by verify."""


class Buildah:
    """The ``buildah`` command of Debian trixie (1.39: heredocs, ``RUN --mount``)."""

    name = "buildah"
    recipe = RECIPE
    uid = 0
    capabilities: tuple[str, ...] = BUILDER_CAPABILITIES
    runs_frontends = False
    # In Docker's it writes the random id and host name of its working container (measured, 1.39).
    reproducible_formats = frozenset({"oci"})

    def plan(self, request: BuildInput) -> BuildPlan:
        reference = f"{request.registry}/{request.repository}:{TAG}"
        build = [
            "buildah", "build",
            f"--isolation={_run_isolation(request.isolation)}",
            "--network=host",
            f"--format={request.image_format}",
            f"--signature-policy={CONFIG}/policy.json",
            # Locked for each name without a host, by default below /var/cache, which is read-only.
            "--short-name-alias-conf=/run/short-names.conf",
            "--tls-verify=false",
            f"--platform={request.platform}",
            f"--file={CONFIG}/Dockerfile",
            f"--ignorefile={CONFIG}/ignore",
            f"--tag={reference}",
        ]  # fmt: skip
        build += [f"--build-arg={name}={value}" for name, value in request.build_args.items()]
        if request.target is not None:
            build.append(f"--target={request.target}")
        if request.reproducible:
            build.append("--timestamp=0")  # of the image, its history, and every file of its layers
        build.append(WORKSPACE)
        push = ["buildah", "push", "--tls-verify=false", f"--digestfile={CLAIM}", reference]
        prepare = (
            (
                "tar",
                "--extract",
                f"--file={CONTEXT_TAR}",
                f"--directory={WORKSPACE}",
                "--preserve-permissions",
                "--numeric-owner",
            ),
            *_bases(request.bases),
        )
        return BuildPlan(
            commands=(*prepare, tuple(build), tuple(push)),
            build_command=len(prepare),
            environment={
                **ENVIRONMENT,
                "REGISTRY_AUTH_FILE": f"{CONFIG}/auth.json",
                **_proxies(request),
                **(_APART if request.confined else {}),
            },
            files={
                # Not the context's own: buildah runs cpp over a name that ends in .in, and would
                # look for a .containerignore that the snapshot does not know.
                "Dockerfile": request.dockerfile,
                "ignore": _ignore(request.ignored),
                "auth.json": _auth(request),
                "registries.conf": _registries(request),
                **_configuration(request.bases, _ulimits(request)),
            },
            writable=WRITABLE,
            uid=self.uid,
            capabilities=APART_CAPABILITIES if request.confined else self.capabilities,
            apart=request.confined,
            claim=CLAIM,
        )  # fmt: skip

    def base_at(self, number: int) -> str:
        return f"{STORE}/base-{number}"

    def unpack(self, platform: str) -> BuildPlan:
        return BuildPlan(
            commands=(
                ("buildah", "pull", "--quiet", f"--signature-policy={CONFIG}/policy.json",
                 f"--platform={platform}", f"dir:{BASE}"),
                # Blocks of file data must be whole ones, or gVisor says "bad address".
                ("mkfs.erofs", "--quiet", "-Enoinline_data", PACKED, f"{STORE}/storage"),
            ),
            build_command=0,
            environment=ENVIRONMENT,
            files={"registries.conf": b"", **_configuration(())},
            writable=WRITABLE,
            uid=self.uid,
            capabilities=self.capabilities,
            claim="",
            output=PACKED,
        )  # fmt: skip


def _run_isolation(sandbox: Isolation) -> str:
    """Of RUN steps: runc makes cgroups for them, which gVisor alone lets it do in a container."""
    return "oci" if sandbox is Isolation.GVISOR else "chroot"


def _ulimits(request: BuildInput) -> tuple[str, ...]:
    """Of RUN steps. buildah would raise them to 1,048,576, which few sandboxes allow."""
    may_raise = request.isolation is Isolation.GVISOR and not request.confined
    return () if may_raise else ("nofile=1024:4096", "nproc=1024:1024")


def _bases(bases: tuple[UnpackedBase, ...]) -> Iterator[tuple[str, ...]]:
    """Commands that make the store know every base image by the names that the Dockerfile uses."""
    if bases:
        yield "tar", "--extract", f"--file={CONFIG}/{_CACHE}", f"--directory={STORE}"
    for base in bases:
        if base.packed is not None:
            yield "fsck.erofs", "-d0", "--xattrs", f"--extract={base.at}", base.packed
    for base in bases:
        yield "buildah", "tag", base.config.partition(":")[2], *base.names


def _configuration(
    bases: tuple[UnpackedBase, ...], ulimits: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """Files that have no secret and name no registry."""
    files = {
        "containers.conf": CONTAINERS_CONF.format(
            capabilities=json.dumps([f"CAP_{name}" for name in RUN_CAPABILITIES]),
            ulimits=json.dumps(ulimits),
        ).encode(),
        "policy.json": POLICY_JSON,
        "storage.conf": STORAGE_CONF.format(bases=json.dumps([base.at for base in bases])).encode(),
    }
    if bases:
        from builder import blobcache  # noqa: PLC0415 - sqlite3 is not needed otherwise

        files[_CACHE] = blobcache.archive(layer for base in bases for layer in base.layers)
    return files


def _auth(request: BuildInput) -> bytes:
    token = base64.b64encode(f"session:{request.token}".encode()).decode()
    return json.dumps({"auths": {request.registry: {"auth": token}}}).encode()


def _proxies(request: BuildInput) -> dict[str, str]:
    """Of the process: handed on to RUN steps, and kept out of the image and its history."""
    if request.proxy is None:
        return {}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), request.proxy)
    proxies["NO_PROXY"] = "127.0.0.1,localhost"  # the registry is asked directly
    return proxies | {name.lower(): value for name, value in proxies.items()}


def _ignore(paths: tuple[str, ...]) -> bytes:
    """The snapshot has left out the rest; each path is one pattern that matches it alone."""
    escaped = (re.sub(r"([\\*?\[\]])", r"\\\1", path) for path in paths)
    return "".join(f"/{path}\n" for path in escaped).encode("utf-8", "surrogateescape")


def _registries(request: BuildInput) -> bytes:
    """Every registry that the build may ask for is a path of the one that it sees."""
    lines = ['unqualified-search-registries = ["docker.io"]', 'short-name-mode = "disabled"']
    for host, alias in request.upstreams.items():
        lines += [
            "[[registry]]",
            f"prefix = {json.dumps(host)}",
            f"location = {json.dumps(f'{request.registry}/{alias}')}",
            "insecure = true",
        ]
    return "\n".join(lines).encode() + b"\n"
