"""The same builder on the host, with nothing around it: what a sandbox is compared with.

The very plan that a sandbox carries out, in a chroot of the very root filesystem: read-only, with
an empty tmpfs at each writable path, but with the host's kernel, devices and cgroups. The mounts
live in a mount namespace of this one build and go with its last process.
"""

import contextlib
import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.buildah import STORE, Buildah
from builder.model import CONFIG, CONTEXT_TAR, BuildInput, BuildPlan
from policies.model import Isolation
from policies.reference import Digest
from tests.support.hosts import write_context

SECONDS = 600
GONE_SECONDS = 5
_CGROUPS = Path("/sys/fs/cgroup")


class BareFailed(Exception):
    """The builder does not run on this host without a sandbox, or its build failed."""


@dataclass(frozen=True, slots=True)
class Bare:
    """A builder's root filesystem, and how its RUN steps are isolated from the host.

    Attributes:
        storage: Where images stay between builds; None for an empty storage in memory each time.
    """

    root: Path
    isolation: str
    work: Path
    storage: Path | None = None

    def build(
        self, context: Path, *, registry: str, repository: str, build_args: Mapping[str, str]
    ) -> float:
        """Builds and pushes; how many seconds it took from the first command to the last.

        Raises:
            BareFailed: With the end of what the builder wrote.
        """
        plan = Buildah().plan(
            BuildInput(
                dockerfile=(context / "Dockerfile").read_bytes(),
                ignored=(),
                build_args=build_args,
                target=None,
                platform="linux/amd64",
                isolation=Isolation.GVISOR,  # driven the same
                image_format="oci",
                registry=registry,
                repository=repository,
                token="none",  # an open registry does not look at it
                upstreams={},
            )
        )
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "root").mkdir(parents=True)
        files = self.work / "files"
        files.mkdir()
        for name, data in plan.files.items():
            (files / name).write_bytes(data)
        subprocess.run(
            [
                "tar",
                "--create",
                f"--file={self.work / 'context.tar'}",
                f"--directory={context}",
                ".",
            ],
            check=True,
        )
        with _no_cgroups_left():
            return self._run(plan)

    def _run(self, plan: BuildPlan) -> float:
        log = self.work / "log"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "sh", "-euc", self._script(plan)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            ) as process,
        ):  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdout.readline()  # the mounts are made; only the builder is measured
                started = time.monotonic()
                process.stdin.write(b"go\n")
                process.stdin.flush()
                process.communicate(timeout=SECONDS)
                seconds = time.monotonic() - started
            except BrokenPipeError:
                seconds = 0.0
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            raise BareFailed(log.read_text(errors="replace")[-2000:])
        return seconds

    def _script(self, plan: BuildPlan) -> str:
        """Mounts, says so, waits for its turn, and does what the sandbox's first process does."""
        root = shlex.quote(str(self.work / "root"))
        lines = [
            f"mount --bind {shlex.quote(str(self.root))} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount --rbind /sys {root}/sys",
            *(f"mount -t tmpfs -o size=8g tmpfs {root}{path}" for path in plan.writable),
            *(
                [f"mount --bind {shlex.quote(str(self.storage))} {root}{STORE}"]
                if self.storage
                else []
            ),
            f"mkdir -p {root}{CONFIG} {root}{Path(CONTEXT_TAR).parent}",
            f"cp {self.work}/files/* {root}{CONFIG}/",
            f"cp {self.work}/context.tar {root}{CONTEXT_TAR}",
            "echo ready",
            "read -r go",
        ]
        environment = [f"{name}={value}" for name, value in plan.environment.items()]
        for index, command in enumerate(plan.commands):
            words = list(command)
            if index == plan.build_command:
                words[2:2] = [*_ulimits(), f"--isolation={self.isolation}"]
                words.remove("--isolation=oci")
            enter = shlex.join(["env", "-i", *environment, "chroot", str(self.work / "root")])
            lines.append(f"{enter} {shlex.join(words)} >&2")
        return "\n".join(lines)


def _ulimits() -> list[str]:
    """What this host allows; buildah would raise them, and not every root may."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    hard = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
    return [f"--ulimit={name}={limit}:{limit}" for name, limit in hard.items()]


def working(root: Path, work: Path, *, registry: str, base: str) -> Bare:
    """The builder with the isolation of the sandbox's plan, or else with what works here.

    Raises:
        BareFailed: None does.
    """
    if os.geteuid() != 0:
        raise BareFailed("only root can mount what the bare builder needs; run make bench as root")
    context = work.with_name("trial")
    if not context.exists():
        write_context(context, f'FROM {base}\nRUN ["true"]\n')
    reasons = []
    for isolation in ("oci", "chroot"):
        bare = Bare(root, isolation, work)
        repository = f"bench/trial-{Digest.of(isolation.encode()).hex[:8]}"
        try:
            bare.build(context, registry=registry, repository=repository, build_args={})
        except BareFailed as error:
            reasons.append(f"{isolation}: {error}")
        else:
            return bare
    raise BareFailed("\n".join(reasons))


@contextmanager
def _no_cgroups_left() -> Iterator[None]:
    """Removes cgroups that runc had no time to remove, when it was interrupted."""
    before = set(_runc_cgroups())
    try:
        yield
    finally:
        end = time.monotonic() + GONE_SECONDS
        while (left := set(_runc_cgroups()) - before) and time.monotonic() < end:
            for group in left:
                with contextlib.suppress(OSError):  # its last process is still going
                    group.rmdir()
            time.sleep(0.05)


def _runc_cgroups() -> Iterator[Path]:
    yield from _CGROUPS.glob("*/buildah-buildah*")
    yield from _CGROUPS.glob("buildah-buildah*")
