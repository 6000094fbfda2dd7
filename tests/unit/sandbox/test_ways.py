"""The first process's ways by TLS: to whom it speaks, and that all arrives, both ways."""

import hashlib
import os
import random
import shutil
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import Ways, render
from tests.support.front import (
    AS_ROOT,
    INIT,
    INIT_POD,
    KEY,
    SECONDS,
    Front,
    Pod,
    Spoken,
    changed,
    free_port,
    make_certificate,
)

pytestmark = AS_ROOT

SOME = random.Random(7).randbytes(50_000_000)
DIGEST = hashlib.sha256(SOME).hexdigest()


# -- to whom it speaks -------------------------------------------------------------------


def lonely(spec: SandboxSpec, host: str, patience: int = 1) -> bytes:
    """The plan of who only wants to be released."""
    short = replace(spec, plan=replace(spec.plan, commands=(("true",),)), gateway=False)
    return changed(render(short, "n", Ways("", "", host)), patience=patience)


def assert_refused(front: Front, pod: Pod, spec: SandboxSpec, why: str) -> None:
    """It says no word to the front, and ends when its patience is over."""
    with pod.running(lonely(spec, front.way("host"))) as process:
        assert process.wait(SECONDS) == 125
    assert front.greetings == []
    assert why in pod.complaint


def test_the_certificate_that_it_knows_is_spoken_to_with_the_key(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    with pod.running(lonely(spec, front.way("host"))):
        assert front.take("host").line().startswith(b"runner-canary ")
    assert front.greetings == [f"runner-door 1 {KEY} host".encode()]


def test_any_of_several_certificates_will_do(
    spec: SandboxSpec, front: Front, tmp_path: Path, certificate: Path
) -> None:
    """So that a front can get a new one while sandboxes run."""
    other = make_certificate(tmp_path, "other")
    pod = Pod.make(tmp_path / "runner", other, certificate)
    with pod.running(lonely(spec, front.way("host"))):
        front.take("host")


def test_another_certificate_gets_no_word(spec: SandboxSpec, front: Front, tmp_path: Path) -> None:
    """It has the same name."""
    assert_refused(
        front, Pod.make(tmp_path / "runner", make_certificate(tmp_path, "front")), spec, "rejected"
    )


def test_one_that_was_signed_with_the_right_one_is_another(
    spec: SandboxSpec, pod: Pod, certificate: Path, tmp_path: Path
) -> None:
    with Front(make_certificate(tmp_path, "child", certificate)) as front:
        assert_refused(front, pod, spec, "rejected")


def test_who_signed_the_right_one_does_not_matter(
    spec: SandboxSpec, certificate: Path, tmp_path: Path
) -> None:
    child = make_certificate(tmp_path, "child", certificate)
    with Front(child) as front:
        pod = Pod.make(tmp_path / "runner", child)
        with pod.running(lonely(spec, front.way("host"))):
            front.take("host")


def test_older_tls_is_not_spoken(spec: SandboxSpec, pod: Pod, certificate: Path) -> None:
    with Front(certificate, ssl.TLSVersion.TLSv1_2) as front:
        assert_refused(front, pod, spec, "Protocol error")


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "a/b", "x" * 129])
def test_a_key_that_is_none_is_not_sent(
    spec: SandboxSpec, front: Front, tmp_path: Path, certificate: Path, key: str
) -> None:
    assert_refused(front, Pod.make(tmp_path / "runner", certificate, key=key), spec, "rejected")


def test_a_key_of_full_length_is_sent(
    spec: SandboxSpec, front: Front, tmp_path: Path, certificate: Path
) -> None:
    pod = Pod.make(tmp_path / "runner", certificate, key="x" * 128)
    with pod.running(lonely(spec, front.way("host"))):
        front.take("host")


@pytest.mark.parametrize(
    "way",
    ["tls:127.0.0.1:{port}/nobody", "tls:127.0.0.1:{port}/", "tls:127.0.0.1:{port}",
     "tls:127.0.0.1/host", "tls:localhost:{port}/host", "tls:127.0.0.1:{port}x/host",
     "tls:127.0.0.1:0/host", "tls:127.0.0.1:65536/host", "tls:127.0.0.1:-1/host", "tls:/host",
     "https:127.0.0.1:{port}/host", "127.0.0.1:{port}:1", "1.1.1:{port}", "x"],
)  # fmt: skip
def test_a_way_that_is_none_is_no_matter_of_patience(
    spec: SandboxSpec, front: Front, pod: Pod, way: str
) -> None:
    way = way.format(port=front.place.rpartition(":")[2])
    with pod.running(lonely(spec, way, patience=1000)) as process:
        assert process.wait(SECONDS) == 125
    assert "Invalid argument" in pod.complaint


def test_the_small_binary_has_no_such_way(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(lonely(spec, front.way("host"), patience=1000), INIT) as process:
        assert process.wait(SECONDS) == 125
    assert "not supported" in pod.complaint
    assert front.refused == []


def test_no_configuration_of_openssl_is_read(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    """It may name code to load. A FIFO: whoever opens it would wait."""
    trap = pod.directory / "openssl.cnf"
    os.mkfifo(trap)
    pod.environment["OPENSSL_CONF"] = "/run/runner/openssl.cnf"
    with pod.running(lonely(spec, front.way("host"))):
        front.take("host")


# -- what it carries ---------------------------------------------------------------------

CLIENT = """
import hashlib, socket, sys, threading
door = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def send():
    with open("/run/runner/some", "rb") as file:
        door.sendfile(file)
    door.shutdown(socket.SHUT_WR)
def receive():
    digest = hashlib.sha256()
    while data := door.recv(1 << 20):
        digest.update(data)
    print(digest.hexdigest(), flush=True)
steps = {"send": send, "receive": receive}
if sys.argv[2] == "both":
    thread = threading.Thread(target=send)
    thread.start()
    receive()
    thread.join()
else:
    for step in sys.argv[2:]:
        steps[step]()
"""


def first_all_then_answer(outside: Spoken) -> bytes:
    received = outside.everything()
    outside.send(SOME)
    outside.end()
    return received


def first_speak_then_listen(outside: Spoken) -> bytes:
    outside.send(SOME)
    outside.end()
    return outside.everything()


def both_at_once(outside: Spoken) -> bytes:
    received = outside.exchange(SOME)
    outside.end()
    return received


@pytest.mark.parametrize(
    ("steps", "play"),
    [(("send", "receive"), first_all_then_answer), (("receive", "send"), first_speak_then_listen),
     (("both",), both_at_once)],
)  # fmt: skip
def test_an_end_in_one_direction_leaves_the_other(
    spec: SandboxSpec, front: Front, pod: Pod, steps: tuple[str, ...],
    play: Callable[[Spoken], bytes],
) -> None:  # fmt: skip
    """50 MB each way through the door, and each side ends its own direction."""
    (pod.directory / "some").write_bytes(SOME)
    (pod.directory / "client.py").write_text(CLIENT)
    port = free_port()
    command = (sys.executable, "/run/runner/client.py", str(port), *steps)
    build = replace(spec, plan=replace(spec.plan, commands=(command,)))
    with pod.running(changed(render(build, "n", front.ways), port=port)) as process:
        host = front.release()
        outside = front.take("gateway")
        assert hashlib.sha256(play(outside)).hexdigest() == DIGEST
        assert b"".join(host.frames()).startswith(f"{DIGEST}\n\nrunner-exit ".encode())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0


def test_a_front_that_breaks_off_is_an_end_inside(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    port = free_port()
    script = f"exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3; echo ended"
    build = replace(spec, plan=replace(spec.plan, commands=(("bash", "-c", script),)))
    with pod.running(changed(render(build, "n", front.ways), port=port)):
        host = front.release()
        outside = front.take("gateway")
        outside.send(b"begun\n")
        assert host.frame() == b"begun\n"
        outside.break_off()
        assert host.frame() == b"ended\n"


def test_a_connection_ends_when_both_have_ended(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    """What was sent before comes through, and nothing stays behind that holds it."""
    port = free_port()
    script = f"echo last words >/dev/tcp/127.0.0.1/{port}; sleep 60"
    build = replace(spec, plan=replace(spec.plan, commands=(("bash", "-c", script),)))
    with pod.running(changed(render(build, "n", front.ways), port=port)):
        front.release()
        outside = front.take("gateway")
        assert outside.everything() == b"last words\n"
        outside.end()
        outside.await_gone()


def test_nobody_at_the_door_waits_for_another(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    """Fifty connections at once, of which the last is answered first."""
    port = free_port()
    script = (
        f"for i in $(seq 50); do (exec 3<>/dev/tcp/127.0.0.1/{port}; echo $i >&3; cat <&3) & done;"
        " wait"
    )
    build = replace(spec, plan=replace(spec.plan, commands=(("bash", "-c", script),)))
    with pod.running(changed(render(build, "n", front.ways), port=port)) as process:
        host = front.release()
        peers = [front.take("gateway") for _ in range(50)]
        for peer in reversed(peers):
            peer.send(peer.line() + b"\n")
            peer.end()
        answers = b"".join(host.frames()).split(b"\n\nrunner-exit")[0]
        assert sorted(answers.split()) == sorted(b"%d" % i for i in range(1, 51))
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0


# -- handing a file out ------------------------------------------------------------------


def handing_out(spec: SandboxSpec, front: Front, pod: Pod) -> bytes:
    (pod.directory / "some").write_bytes(SOME)
    shutil.copy(INIT_POD, pod.directory / "init")
    command = ("/run/runner/init", "send", "/run/runner/some", front.way("outlet"))
    build = replace(spec, plan=replace(spec.plan, commands=(command,)), gateway=False)
    return render(replace(build, limits=Limits(wall_seconds=60)), "n", front.ways)


def test_a_file_is_handed_out_whole(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    with pod.running(handing_out(spec, front, pod)) as process:
        host = front.release()
        outlet = front.take("outlet")
        assert hashlib.sha256(outlet.everything()).hexdigest() == DIGEST
        outlet.end()
        list(host.frames())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 0


def test_a_file_that_was_half_handed_out_is_not_taken_for_whole(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    with pod.running(handing_out(spec, front, pod)) as process:
        host = front.release()
        outlet = front.take("outlet")
        outlet.exactly(1_000_000)
        outlet.break_off()
        stream = b"".join(host.frames())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 125
    assert b"/outlet: Connection reset by peer" in stream or b"Broken pipe" in stream


def test_an_end_of_which_nobody_knows_whether_all_arrived_is_none(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    """Everything was sent, and then the connection broke instead of being ended."""
    with pod.running(handing_out(spec, front, pod)) as process:
        host = front.release()
        outlet = front.take("outlet")
        outlet.everything()
        outlet.break_off()
        list(host.frames())
        host.send(b"done\n")
        assert process.wait(SECONDS) == 125
