"""Files that the first process of a pod takes from its host before anything runs."""

import hashlib
import random
from dataclasses import replace

import pytest

from sandbox.model import SandboxSpec
from sandbox.plan import SOCKETS, render
from tests.support.front import (
    AS_ROOT,
    INIT,
    SECONDS,
    Front,
    Pod,
    announced,
    changed,
)

pytestmark = AS_ROOT

SCRIPT = "cd /run/runner; find config door -type f | sort | xargs sha256sum"
BIG = random.Random(5).randbytes(5_000_003)


def plan(spec: SandboxSpec, front: Front, script: str = SCRIPT, **fields: int) -> bytes:
    build = replace(spec, plan=replace(spec.plan, commands=(("sh", "-c", script),)), gateway=False)
    ways = replace(front.ways, files=front.way("files"))
    return changed(render(build, "n", ways), **fields)


def refusal(front: Front, pod: Pod, spec: SandboxSpec, sent: bytes) -> str:
    """What the host reads of it, and ``kubectl logs`` as well; nothing ran then."""
    with pod.running(plan(spec, front, "touch /run/runner/ran")) as process:
        host = front.release()
        files = front.take("files")
        files.send(sent)
        files.end()
        stream = b"".join(host.frames()).decode()
        assert process.poll() is None, "it waits for done"
        host.send(b"done\n")
        assert process.wait(SECONDS) == 125
    assert not (pod.directory / "ran").exists()
    assert "runner-exit" not in stream
    assert stream == pod.complaint
    assert stream.startswith("runner: init: files: ")
    return stream.removeprefix("runner: init: files: ").rstrip("\n")


def test_files_are_there_before_anything_runs(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    sent = {
        "config/a": b"",
        "config/storage.conf": b"one line\n",
        "door/context.tar": BIG,
        "door/deep/er/-x_.": b"\n.\n",
        "door/...": b"no parent",
    }
    with pod.running(plan(spec, front)) as process:
        host = front.release()
        files = front.take("files")
        for path, data in sent.items():
            files.send(announced(path, data))
        assert process.poll() is None
        files.send(b".\n")
        assert files.everything() == b"ok\n"
        files.await_gone()
        shown = b"".join(host.frames()).partition(b"\n\nrunner-exit")[0]
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0
    assert sorted(shown.decode().splitlines()) == sorted(
        f"{hashlib.sha256(data).hexdigest()}  {path}" for path, data in sent.items()
    )
    modes = {path: (pod.directory / path).stat().st_mode & 0o7777 for path in sent}
    assert set(modes.values()) == {0o644}
    assert (pod.directory / "door/deep/er").stat().st_mode & 0o7777 == 0o755


def test_modes_do_not_depend_on_who_started_it(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    pod.umask = 0o077
    with pod.running(plan(spec, front)):
        host = front.release()
        files = front.take("files")
        files.send(announced("config/a/b", b"x") + b".\n")
        host.frame()
    assert (pod.directory / "config/a").stat().st_mode & 0o7777 == 0o755
    assert (pod.directory / "config/a/b").stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize(
    "path",
    ["../a", "a/../b", "..", ".", "a/.", "./a", "/a", "/etc/passwd", "a//b", "a/", "", "a b",
     "a\tb", "a\\b", "ä", "a%2f", "x" * 513, "a/" * 256 + "a"],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_is_refused(
    spec: SandboxSpec, front: Front, pod: Pod, path: str
) -> None:
    told = refusal(front, pod, spec, announced(path, b"x") + b".\n")
    assert told in {
        "the host sent a path that is none of ours",
        "the host announced a size that is none",  # of a path with a space
        "the host sent what is no line",
    }


@pytest.mark.parametrize("path", ["plan", "session/key", "session"])
def test_what_is_there_already_stays(spec: SandboxSpec, front: Front, pod: Pod, path: str) -> None:
    key = (pod.directory / "session/key").read_bytes()
    assert refusal(front, pod, spec, announced(path, b"x")) == f"{path}: File exists"
    assert (pod.directory / "session/key").read_bytes() == key


@pytest.mark.parametrize("link", ["door", "door/target"])
def test_no_link_is_followed(spec: SandboxSpec, front: Front, pod: Pod, link: str) -> None:
    elsewhere = pod.directory / "elsewhere"
    elsewhere.mkdir()
    (pod.directory / link).parent.mkdir(exist_ok=True)
    (pod.directory / link).symlink_to("/run/runner/elsewhere")
    told = refusal(front, pod, spec, announced("door/target", b"x"))
    assert told in {"door/target: Not a directory", "door/target: File exists",
                    "door/target: Too many levels of symbolic links"}  # fmt: skip
    assert list(elsewhere.iterdir()) == []


def test_the_same_file_comes_once(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    told = refusal(front, pod, spec, announced("a", b"1") + announced("a", b"2"))
    assert told == "a: File exists"


@pytest.mark.parametrize(
    "digest", ["0" * 64, hashlib.sha256(b"y").hexdigest(), hashlib.sha256(b"x").hexdigest().upper(),
               hashlib.sha256(b"x").hexdigest() + " ", hashlib.sha256(b"x").hexdigest()[:63], ""],
)  # fmt: skip
def test_a_wrong_digest_is_refused(spec: SandboxSpec, front: Front, pod: Pod, digest: str) -> None:
    sent = b"door/a 1\nx%s\n.\n" % digest.encode()
    assert refusal(front, pod, spec, sent) == "door/a has not the digest it should have"


@pytest.mark.parametrize(
    "sent", [b"", b"a", b"a 10\n", b"a 10\n12345", b"a 1\nx", b"a 1\nx0123", announced("a", b"x")]
)
def test_an_early_end_is_refused(spec: SandboxSpec, front: Front, pod: Pod, sent: bytes) -> None:
    assert refusal(front, pod, spec, sent) == "the host stopped in the middle"


@pytest.mark.parametrize(
    ("sent", "why"),
    [(b"a\n", "no size"), (b"a -1\n", "size"), (b"a +1\n", "size"), (b"a  1\n", "size"),
     (b"a 0x1\n", "size"), (b"a 9999999999999999\n", "size"), (b"a 1 \n", "size"),
     (b"..\n", "no size"), (b"\n", "no size"), (b"a\0 1\n", "no line"), (b"x" * 9999, "no line")],
)  # fmt: skip
def test_a_line_that_is_none_is_refused(
    spec: SandboxSpec, front: Front, pod: Pod, sent: bytes, why: str
) -> None:
    assert why in refusal(front, pod, spec, sent)


def test_a_break_in_the_middle_is_the_end(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front)) as process:
        host = front.release()
        files = front.take("files")
        files.send(b"a 1000000\n12345")
        files.break_off()
        assert b"stopped in the middle" in b"".join(host.frames())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 125


def test_the_host_may_end_it_while_files_come(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front)) as process:
        host = front.release()
        front.take("files").send(b"a 1000000\n12345")
        host.send(b"end n\n")
        assert process.wait(SECONDS) == 125


def test_the_small_binary_takes_none(spec: SandboxSpec, pod: Pod) -> None:
    """It ends as soon as it was released, whatever way files should come by."""
    build = replace(spec, plan=replace(spec.plan, commands=(("true",),)), gateway=False)
    sent = render(build, "n", replace(SOCKETS, files="/run/nobody"))
    with pod.running(sent, INIT, speaks=b"release n\n") as process:
        assert process.wait(SECONDS) == 125
    assert pod.complaint == "runner: init: files: this first process takes none\n"
