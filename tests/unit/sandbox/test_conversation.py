"""The first process talks with its host over TLS: nothing is lost by a connection that breaks."""

import os
import queue
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import render
from sandbox.report import OutputSplitter, parse_exit, words
from tests.support.front import AS_ROOT, SECONDS, Front, Pod, Spoken, changed

pytestmark = AS_ROOT
LINES = 40_000


def plan(spec: SandboxSpec, front: Front, script: str, **fields: int) -> bytes:
    """Of a build without a gateway whose one command is a script."""
    build = replace(spec.plan, commands=(("sh", "-c", script),))
    small = replace(spec, plan=build, gateway=False, limits=Limits(wall_seconds=60))
    return changed(render(small, "n", front.ways), **fields)


def split(stream: bytes) -> tuple[bytes, int]:
    """What a build wrote, and its status."""
    splitter = OutputSplitter()
    output = splitter.feed(stream)
    rest, line = splitter.finish()
    assert line is not None
    return output + rest, parse_exit(line, "n").status


def test_a_build_from_the_canary_to_done(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front, "echo out; echo err >&2; exit 7")) as process:
        host = front.take("host")
        canary = words(host.line(), b"runner-canary")
        assert (canary["nonce"], canary["reached"]) == (b"n", b"")
        host.send(b"release n\n")
        stream = b"".join(host.frames())
        assert split(stream) == (b"out\nerr\n", 7)
        time.sleep(0.3)
        assert process.poll() is None, "it waits for done"
        host.send(b"done\n")
        assert process.wait(SECONDS) == 7
    assert (pod.shown, pod.complaint) == (stream, "")
    assert not (pod.directory / "output").exists()


def test_what_is_there_is_sent_at_once(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front, "echo one; sleep 60")):
        assert front.release().frame() == b"one\n"
        assert not (pod.directory / "output").exists(), "nobody finds the spool by name"


def test_before_the_release_nothing_runs(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front, "touch /run/runner/ran")):
        host = front.take("host")
        host.line()
        time.sleep(0.5)
        assert not (pod.directory / "ran").exists()
        host.send(b"release n\n")
        list(host.frames())
        assert (pod.directory / "ran").exists()


@pytest.mark.parametrize(
    "word", [b"release m\n", b"release n \n", b"releas", b"\n", b"release n\0\n", b"x" * 4096]
)
def test_any_other_word_than_the_release_is_the_end(
    spec: SandboxSpec, front: Front, pod: Pod, word: bytes
) -> None:
    with pod.running(plan(spec, front, "touch /run/runner/ran")) as process:
        host = front.take("host")
        host.line()
        host.send(word if word != b"releas" else b"releas\n")
        assert process.wait(SECONDS) == 125
    assert not (pod.directory / "ran").exists()


def test_a_connection_that_breaks_before_the_release_begins_anew(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    with pod.running(plan(spec, front, "echo ran")) as process:
        front.take("host").break_off()
        again = front.take("host")
        assert again.line().startswith(b"runner-canary 1 ")
        again.send(b"rel")
        again.close()
        host = front.release()
        assert split(b"".join(host.frames()))[0] == b"ran\n"
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0


def again(front: Front, offset: int) -> Spoken:
    host = front.take("host")
    assert host.line() == b"runner-again 1 nonce=n"
    host.send(b"from %d\n" % offset)
    return host


def test_nothing_is_lost_and_nothing_comes_twice(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    """Breaks in the middle of frames, between them, and by an end as well as by a reset."""
    script = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done"
    with pod.running(plan(spec, front, script)) as process:
        host = front.release()
        stream = host.frame()
        host.exactly(7)
        host.break_off()
        for end in (Spoken.close, Spoken.break_off, Spoken.end):
            host = again(front, len(stream))
            stream += host.frame()
            end(host)
        host = again(front, len(stream))
        stream += b"".join(host.frames())
        host.break_off()  # it was all there, but nobody said so
        host = again(front, len(stream))
        assert host.frame() == b""
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0
    expected = b"".join(b"line %d\n" % i for i in range(LINES))
    assert split(stream) == (expected, 0)
    assert pod.shown == stream


def test_the_host_may_want_all_of_it_again(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(plan(spec, front, "seq 100000")) as process:
        host = front.release()
        first = b"".join(host.frames())
        host.close()
        host = again(front, 0)
        assert b"".join(host.frames()) == first
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    "word",
    [b"from 9999999\n", b"from -1\n", b"from \n", b"from 0x1\n", b"from 1 1\n", b"done\n",
     b"from 99999999999999999999\n", b"end n\n"],
)  # fmt: skip
def test_who_does_not_say_where_to_go_on_is_the_end(
    spec: SandboxSpec, front: Front, pod: Pod, word: bytes
) -> None:
    with pod.running(plan(spec, front, "echo one; sleep 60")) as process:
        front.release().break_off()
        host = front.take("host")
        host.line()
        host.send(word)
        assert process.wait(SECONDS) == 125


@pytest.mark.parametrize("word", [b"end n\n", b"done\n", b"end m\n"])
def test_the_host_ends_it_at_any_time(
    spec: SandboxSpec, front: Front, pod: Pod, word: bytes
) -> None:
    with pod.running(plan(spec, front, "echo one; sleep 60; echo two")) as process:
        host = front.release()
        assert host.frame() == b"one\n"
        began = time.monotonic()
        host.send(word)
        assert process.wait(SECONDS) == 125
    assert b"two" not in pod.shown
    assert time.monotonic() - began < 5


def test_the_end_may_come_together_with_the_release(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    with pod.running(plan(spec, front, "sleep 60")) as process:
        host = front.take("host")
        host.line()
        host.send(b"release n\nend n\n")
        assert process.wait(SECONDS) == 125


def test_its_patience_is_over_where_nobody_listens(
    spec: SandboxSpec, certificate: Path, pod: Pod
) -> None:
    with Front(certificate) as front:
        late = plan(spec, front, "true", patience=2)
    began = time.monotonic()
    with pod.running(late) as process:
        assert process.wait(SECONDS) == 125
    assert "no patience left" in pod.complaint
    assert 2 < time.monotonic() - began < 8


def test_its_patience_is_over_after_the_release_too(
    spec: SandboxSpec, certificate: Path, pod: Pod
) -> None:
    with (
        Front(certificate) as front,
        pod.running(plan(spec, front, "sleep 60", patience=2)) as process,
    ):
        front.release()
        front.__exit__()
        began = time.monotonic()
        assert process.wait(SECONDS) == 125
    assert 1.5 < time.monotonic() - began < 8


@pytest.mark.parametrize("released", [False, True])
def test_a_front_that_lets_it_in_and_turns_it_away_uses_its_patience_up(
    spec: SandboxSpec, front: Front, pod: Pod, *, released: bool
) -> None:
    """As one that has forgotten the session: the runner is gone, and the front is not."""
    began = time.monotonic()
    with pod.running(plan(spec, front, "sleep 60", patience=3)) as process:
        if released:
            front.release().close()
        while process.poll() is None:
            try:
                front.take("host", 0.5).close()
            except queue.Empty:
                continue
        assert process.returncode == 125
    assert time.monotonic() - began < 15


def test_it_ends_by_itself_when_twice_the_time_is_over(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    with pod.running(plan(spec, front, "sleep 60", seconds=2)) as process:
        began = time.monotonic()
        front.release()
        assert process.wait(SECONDS) == 125
    assert 1.5 < time.monotonic() - began < 8


def test_a_build_that_writes_too_much_is_cut_and_its_end_is_not(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    script = "head -c 1000000 /dev/zero | tr '\\0' x; exit 3"
    with pod.running(plan(spec, front, script, log_bytes=100_000)) as process:
        host = front.release()
        stream = b"".join(host.frames())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 3
    assert split(stream) == (b"x" * (100_000 + (64 << 10)), 3)
    assert pod.shown == stream


@pytest.mark.parametrize("reads", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_who_looks_at_the_output_does_not_hold_the_build_up(
    spec: SandboxSpec, front: Front, pod: Pod, *, reads: bool
) -> None:
    """A log collector that died, or one that has not read for ten seconds."""
    reader, writer = os.pipe()
    collector = os.fdopen(reader)
    late = plan(spec, front, "sleep 0.5; seq 100000")
    with pod.running(late, stdout=writer) as process:
        os.close(writer)
        if not reads:
            collector.close()
        host = front.release()
        assert re.search(rb"\n100000\n\nrunner-exit 1 ", b"".join(host.frames()))
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0
    collector.close()


def test_a_pipe_that_is_broken_kills_its_writer_as_anywhere(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    """The first process ignores SIGPIPE; what it starts does not."""
    with pod.running(plan(spec, front, "(yes; echo $? >&2) | true")):
        assert front.release().frame() == b"141\n"
