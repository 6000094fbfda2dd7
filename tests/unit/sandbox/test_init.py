"""The first process by itself, in a PID namespace of its own."""

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import render
from sandbox.report import text, words
from tests.support.front import AS_ROOT, INIT, INIT_POD, SECONDS, Front, Pod, free_port

pytestmark = AS_ROOT


@pytest.mark.parametrize("init", [INIT, INIT_POD], ids=["init", "init-pod"])
def test_it_ends_by_itself_where_nobody_is_left_to_end_it(
    spec: SandboxSpec, pod: Pod, init: Path
) -> None:
    """As when an engine crashes that keeps the standard input of its containers open."""
    plan = replace(spec.plan, commands=(("sleep", "60"),))
    late = replace(spec, plan=plan, limits=Limits(wall_seconds=1), gateway=False)
    started = time.monotonic()
    with pod.running(render(late, "n"), init, speaks=b"release n\n") as process:
        assert process.wait(SECONDS) == 125
    assert b"runner-exit" not in pod.shown
    assert 1.5 < time.monotonic() - started < 15


# -- probes ------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_place() -> Iterator[str]:
    """An address that answers nothing, as behind a policy that drops: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def reached(spec: SandboxSpec, pod: Pod, *probes: str) -> tuple[list[str], float]:
    """What the canary says of it, and how long it took."""
    began = time.monotonic()
    with pod.running(render(spec, "n", probes=probes), speaks=b"") as process:
        while b"\n" not in pod.shown:
            assert process.poll() is None, pod.complaint
            time.sleep(0.05)
    found = words(pod.shown.splitlines()[0], b"runner-canary")
    return text(found, "reached").splitlines(), time.monotonic() - began


def test_without_probes_nothing_is_reached_at_once(spec: SandboxSpec, pod: Pod) -> None:
    names, seconds = reached(spec, pod)
    assert names == []
    assert seconds < 1


def test_what_refuses_or_does_not_answer_was_not_reached(spec: SandboxSpec, pod: Pod) -> None:
    with silent_place() as silent:
        names, seconds = reached(spec, pod, f"127.0.0.1:{free_port()}", silent)
    assert names == []
    assert 0.9 < seconds < 3


def test_what_answers_was_reached_and_only_that(spec: SandboxSpec, pod: Pod, front: Front) -> None:
    """It is tried again first, three times: a policy may come late."""
    with silent_place() as silent, socket.create_server(("127.0.0.1", 0)) as other:
        second = f"127.0.0.1:{other.getsockname()[1]}"
        refusing = f"127.0.0.1:{free_port()}"
        names, seconds = reached(spec, pod, front.place, silent, refusing, second)
    assert names == [front.place, second]
    assert 4 * 0.9 + 3 < seconds < 4 * 1.0 + 3 + 2


def test_what_is_closed_meanwhile_was_not_reached(spec: SandboxSpec, pod: Pod) -> None:
    """As by a policy that is enforced a moment after the pod has started."""
    listener = socket.create_server(("127.0.0.1", 0))
    probe = f"127.0.0.1:{listener.getsockname()[1]}"
    with pod.running(render(spec, "n", probes=(probe,)), speaks=b"") as process:
        listener.accept()[0].close()
        listener.close()
        while b"\n" not in pod.shown:
            assert process.poll() is None, pod.complaint
            time.sleep(0.05)
    assert text(words(pod.shown.splitlines()[0], b"runner-canary"), "reached") == ""


@pytest.mark.parametrize("probe", ["localhost:80", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:80x", ""])
def test_a_probe_that_is_no_address_is_refused(spec: SandboxSpec, pod: Pod, probe: str) -> None:
    with pod.running(render(spec, "n", probes=(probe,)), speaks=b"") as process:
        assert process.wait(SECONDS) == 125
    assert "bad probe" in pod.complaint
