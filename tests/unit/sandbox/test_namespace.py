"""Commands that run apart: root of a user namespace, and next to nothing outside of it."""

from dataclasses import replace

from policies.model import Limits
from sandbox.model import SandboxSpec
from sandbox.plan import render
from sandbox.report import OutputSplitter, parse_exit
from tests.support.front import AS_ROOT, Front, Pod

pytestmark = AS_ROOT
SIZE = 8 << 20


def ran(spec: SandboxSpec, front: Front, pod: Pod, script: str) -> tuple[str, int, str | None]:
    """What the script wrote, its status, and what it claims."""
    build = replace(
        spec.plan,
        commands=(("true",), ("bash", "-ec", script)),
        writable=("/run", "/var/tmp"),
        claim="/run/claim",
        apart=True,
    )
    limits = Limits(wall_seconds=60, disk_bytes=SIZE)
    plan = render(replace(spec, plan=build, gateway=False, limits=limits), "n", front.ways)
    with pod.running(plan) as process:
        host = front.release()
        splitter = OutputSplitter()
        output = splitter.feed(b"".join(host.frames()))
        host.send(b"done\n")
        process.wait(20)
    rest, line = splitter.finish()
    assert line is not None
    report = parse_exit(line, "n")
    return (output + rest).decode(), report.status, report.claim


def test_the_commands_are_root_of_a_namespace_that_is_not_ours(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    script = """
        id -u
        cat /proc/self/uid_map | tr -s ' '
        grep CapEff /proc/self/status
        test "$(readlink /proc/self/ns/user)" != "$(readlink /proc/1/ns/user)" || echo the same
    """
    output, status, _ = ran(spec, front, pod, script)
    assert status == 0, output
    uid, uid_map, capabilities = output.splitlines()
    assert (uid, uid_map.strip()) == ("0", "0 0 4294967295")
    assert int(capabilities.split()[1], 16) & 1 << 21, "SYS_ADMIN in there"


def test_what_they_write_is_in_memory_bounded_and_theirs(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    script = """
        stat -f -c %T /run /var/tmp
        stat -c %a /run /var/tmp
        test -d /run/runner/session
        cd /var/tmp; head -c 4M /dev/zero >small; head -c 9M /dev/zero >large || echo full
    """
    output, status, _ = ran(spec, front, pod, script)
    assert status == 0, output
    assert output.splitlines()[:4] == ["tmpfs", "tmpfs", "755", "1777"]
    assert "full" in output


def test_their_claim_and_their_status_come_through(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    assert ran(spec, front, pod, "echo sha256:abc >/run/claim; exit 7") == ("", 7, "sha256:abc")


def test_what_cannot_be_mounted_is_said_where_output_is(
    spec: SandboxSpec, front: Front, pod: Pod
) -> None:
    build = replace(spec.plan, commands=(("true",),), writable=("/nowhere",), apart=True)
    plan = render(replace(spec, plan=build, gateway=False), "n", front.ways)
    with pod.running(plan) as process:
        host = front.release()
        stream = b"".join(host.frames())
        host.send(b"done\n")
        assert process.wait(20) == 125
    assert b"runner: init: /nowhere: No such file or directory" in stream


def test_nothing_of_them_is_left(spec: SandboxSpec, front: Front, pod: Pod) -> None:
    output, status, _ = ran(spec, front, pod, "(setsid sleep 300 &) ; echo left it")
    assert (output, status) == ("left it\n", 0)
