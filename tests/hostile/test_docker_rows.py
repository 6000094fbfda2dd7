"""Attacks on and through the docker backend, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import itertools
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cancel import Cancellation
from runner.errors import Cancelled, RunnerError
from runner.events import Event, Output, Stage, StageStarted
from runner.settings import Settings
from sandbox.docker import containers
from sandbox.docker.containers import NAME_LABEL
from sandbox.docker.place import of_state
from tests.support.engine import RealEngine
from tests.support.hosts import STRANGER, Person, output_of, read_until, write_context
from tests.support.toolbox import install_as_buildah, toolbox_tar

pytestmark = [pytest.mark.sandbox, pytest.mark.registry, pytest.mark.root]

SUPPORT = Path(__file__).parent.parent / "support"
PORT = 9999
BOTH_DOORS = pytest.mark.parametrize("runtime", ["runsc", "runsc-networked"])


class Attack:
    """A builder that is the attacker's, whose every program is one script."""

    def __init__(self, place: Path, engine: RealEngine, settings: Settings) -> None:
        self._place, self._engine, self._settings = place, engine, settings

    def run(
        self,
        script: str,
        *,
        runtime: str = "runsc",
        files: Mapping[str, str],
        ready: Callable[[Person], None] = lambda _: None,
    ) -> str:
        """What it wrote. ``ready`` is called once, when it writes that."""
        install_as_buildah(self._place / "hostile", script, **files)
        settings = self._engine.settings(self._settings, runsc=runtime)
        moved = Person.move_in(self._place / "victim", settings, self._place / "hostile")
        victim = replace(moved, backend="docker")
        events: list[Event] = []

        def listen(event: Event) -> None:
            before = output_of(events)
            events.append(event)
            if "\nready\n" not in before and "\nready\n" in output_of(events):
                ready(victim)

        context = write_context(self._place / "context", "FROM scratch\n")
        with pytest.raises(RunnerError):
            victim.submit(context, listen=listen)
        victim.assert_nothing_left()
        return output_of(events)


@pytest.fixture
def attack(place: Path, engine: RealEngine, settings: Settings) -> Attack:
    return Attack(place, engine, settings)


def support(name: str) -> str:
    return (SUPPORT / name).read_text()


# -- rows 15, 25, 28: what a sandbox is given is not its to change ---------------------------------


# Defence: ``volume`` in sandbox.docker.containers: ``_guest`` as a bind mount was writable.
@BOTH_DOORS
def test_row_25_root_of_the_sandbox_changes_nothing_that_the_host_gave_it(
    attack: Attack, runtime: str
) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def look(victim: Person) -> None:
        for path in victim.home.sandboxes.rglob("guest/**/*"):
            status = path.lstat()
            seen[str(path.relative_to(victim.home.sandboxes))] = (
                status.st_mode, status.st_uid, status.st_size,
            )  # fmt: skip

    log = attack.run(
        "perl /s.pl; exit 3", runtime=runtime, ready=look, files={"s.pl": support("spoil.pl")}
    )
    did = {line for line in log.splitlines() if line.startswith("did: ")}
    assert did == {"did: remount", "did: bind", "did: remount other"}
    names = {name.partition("/guest/")[2] for name in seen}
    assert {name for name in names if not name.startswith("config/")} == {
        "config", "door", "door/context.tar", "door/gateway.sock", "init", "plan",
    }  # fmt: skip
    assert {uid for _, uid, _ in seen.values()} == {0}
    assert all(mode & 0o7022 == 0 for mode, _, _ in seen.values())


# -- rows 7, 8: one neighbour, and nothing else on the network -------------------------------------


@contextmanager
def answering(engine: RealEngine) -> Iterator[Callable[[], list[str]]]:
    """The host answers on PORT, by every address that it has; gives what it heard."""
    with subprocess.Popen(
        [*engine.inside, sys.executable, SUPPORT / "neighbour.py", str(PORT)],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        heard: list[str] = []
        reader = threading.Thread(target=heard.extend, args=(process.stdout,))
        reader.start()
        yield lambda: heard
        process.kill()
        reader.join()


@contextmanager
def neighbours(engine: RealEngine, place: Path) -> Iterator[list[str]]:
    """Addresses of containers that answer: on docker0, and on the network of another build."""
    (place / "root.tar").write_bytes(toolbox_tar())
    serve = (
        "use Socket; socket(S, AF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(9999, INADDR_ANY));"
        "listen(S, 9); accept(C, S) while 1"
    )
    labels = {"tests": "neighbour"}
    config = {"Image": "tests/toolbox:1", "Cmd": ["perl", "-e", serve], "Labels": labels}
    with (place / "root.tar").open("rb") as tar, engine.client() as client:
        client.import_image(tar, "tests/toolbox:1", {})
        client.create_network("theirs", containers.network("theirs", labels))
        found = []
        try:
            for network in ("bridge", "theirs"):
                host = {"NetworkMode": network}
                made = client.create(f"on-{network}", {**config, "HostConfig": host})
                client.start(made)
                found.append(f"{client.address(made, network)}:{PORT}")
            yield found
        finally:
            for container, _ in client.labelled(labels):
                client.remove(container)
            client.remove_network("theirs")


# Defences: ``_capabilities`` and ``driver.mtu`` in sandbox.docker.containers, each for its half.
def test_row_8_a_builder_that_is_root_of_its_kernel_finds_nobody_but_the_relay(
    attack: Attack, engine: RealEngine, place: Path
) -> None:
    addresses: list[str] = []

    def look(_: Person) -> None:
        shown = engine.run_inside("ip", "-o", "addr", "show")
        addresses.extend(line for line in shown.splitlines() if containers.BRIDGE in line)
        bridges = engine.run_inside("ip", "-o", "link", "show", "type", "bridge")
        assert bridges.count(f" {containers.BRIDGE}") == 2, "the other build's, and its own"

    with answering(engine) as heard, neighbours(engine, place) as others:
        targets = [
            *(f"{address}:{PORT}" for address in ("172.17.0.1", "ff02::1", "::1")),
            *others, "169.254.169.254:80", "127.0.0.11:53", "8.8.8.8:53", "GATEWAY:53",
            f"GATEWAY:{PORT}", "RELAY:5000", "RELAY:22", f"RELAY:{PORT}", "127.0.0.1:5000",
        ]  # fmt: skip
        script = f"perl /n.pl {' '.join(targets)}; echo; echo ready; sleep 0.5; exit 3"
        log = attack.run(
            script, runtime="runsc-networked", ready=look, files={"n.pl": support("neighbours.pl")}
        )
    seen = {line.removeprefix("seen: ") for line in log.splitlines() if line.startswith("seen: ")}
    assert seen == {"interface eth0", "connected 127.0.0.1:5000", "connected RELAY:5000", "end"}
    assert heard() == []
    assert addresses == []


# Defence: ``_RELAY_BYTES`` in sandbox.docker.containers: enough for ``FORWARD_CONNECTIONS``.
def test_row_20_a_relay_that_is_flooded_still_serves_when_the_flood_is_over(
    attack: Attack,
) -> None:
    flood = """
        use Socket; $| = 1; $SIG{PIPE} = "IGNORE"; my @open;
        my ($network) = `cat /etc/hosts` =~ /^(\\d+\\.\\d+\\.\\d+)\\.\\d+\\s+sandbox/m;
        sub door { socket(my $s, AF_INET, SOCK_STREAM, 0) or die;
                   connect($s, sockaddr_in(5000, inet_aton("$network.2"))) or return; $s }
        for (1 .. 200) {
            my $s = door() or next;
            $s->blocking(0);
            syswrite($s, "POST /v2/ HTTP/1.1\\r\\nHost: a\\r\\n");
            syswrite($s, "Content-Length: 99999999\\r\\n\\r\\n");
            syswrite($s, "x" x 1000000) for 1 .. 2;
            push @open, $s;
        }
        print "open: ", scalar @open, "\\n";
        undef @open;
        for (1 .. 50) {
            select undef, undef, undef, 0.1;
            my $s = door() or next;
            syswrite($s, "GET /v2/ HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n");
            sysread($s, my $answer, 100) or next;
            if ($answer =~ /^HTTP.1.1 401/) { print "serves\\n"; last }
        }
    """
    log = attack.run(
        "perl -MIO::Handle /f.pl; exit 3", runtime="runsc-networked", files={"f.pl": flood}
    )
    assert "serves" in log.splitlines(), log
    opened = {int(line.split()[1]) for line in log.splitlines() if line.startswith("open: ")}
    assert opened == {200}


# Defence: ``relay`` in init.c ends with its standard input, which ``StdinOnce`` ends.
def test_row_22_relay_and_sandbox_end_with_the_runner(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    own = place / "networked.toml"
    own.write_text(
        docker_person.config.read_text().replace(
            "[docker]", '[docker]\nrunsc = "runsc-networked"', 1
        )
    )
    context = write_context(
        place / "context", f"FROM {tools_base}\nRUN echo; echo ready; sleep 99\n"
    )
    somebody = docker_person.having(RUNNER_CONFIG=str(own))
    with somebody.start("submit", "--backend", "docker", "--json", context) as process:
        read_until(process, process.stdout, "echo ready")
        process.kill()
    end = time.monotonic() + 15
    with engine.client() as client:
        while running := [
            each
            for each, _ in client.labelled(of_state(docker_person.home.sandboxes))
            if (state := client.state(each)) is not None and state.pid
        ]:
            assert time.monotonic() < end, running
            time.sleep(0.1)
    assert docker_person.run("gc").status == 0
    docker_person.assert_nothing_left()


# Defence: ``stack.callback(place.release)`` in runner.pipeline, and ``_leave_nothing``.
@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.4])
def test_row_22_a_build_that_is_cancelled_while_it_starts_leaves_nothing(
    docker_person: Person, engine: RealEngine, place: Path, seconds: float
) -> None:
    cancellation = Cancellation()
    somebody = replace(
        docker_person, settings=engine.settings(docker_person.settings, runsc="runsc-networked")
    )
    timers: list[threading.Timer] = []

    def listen(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage is Stage.LAUNCH:
            timers.append(threading.Timer(seconds, cancellation.cancel))
            timers[0].start()

    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    begun = time.monotonic()
    with suppress(Cancelled):
        somebody.submit(context, listen=listen, cancellation=cancellation)
    assert time.monotonic() - begun < 20
    timers[0].join()
    somebody.assert_nothing_left()


# -- row 18: what users write ----------------------------------------------------------------------


# Defence: sandbox.docker.containers takes of the plan environment, uid and places to write only.
def test_row_18_nothing_that_a_user_wrote_is_in_what_the_engine_is_asked_for(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    mark = "mark\x1b[2J,ro=false;--privileged\n{}$(id)"
    context = write_context(
        place / "context",
        f"FROM {tools_base} AS marked\nARG A\nLABEL marked=marked\nRUN echo; echo ready; sleep 9\n",
        marked="marked",
    )
    cancellation = Cancellation()
    seen: list[str] = []
    log: list[bytes] = []

    def listen(event: Event) -> None:
        if isinstance(event, Output):
            log.append(event.data)
        if not seen and b"\nready\n" in b"".join(log):
            ours = of_state(docker_person.home.sandboxes)
            with engine.client() as client:
                for each, _ in client.labelled(ours):
                    seen.append(json.dumps(client._client.inspect_container(each)))
                seen.extend(map(str, (client.volumes(ours), client.networks(ours))))
            cancellation.cancel()

    with pytest.raises(Cancelled):
        docker_person.submit(
            context,
            build_args={"A": mark, "MARK": mark},
            target="marked",
            listen=listen,
            cancellation=cancellation,
        )
    assert seen
    assert "mark" not in "".join(seen).lower()


# -- rows 22, 33: other users, and other state directories -----------------------------------------


# Defence: ``directory.chmod(0o700)`` in sandbox.docker.place.reserve.
def test_row_33_no_other_user_of_the_host_sees_a_sandboxs_files(
    docker_person: Person, place: Path, tools_base: str
) -> None:
    context = write_context(
        place / "context", f"FROM {tools_base}\nRUN echo; echo ready; sleep 9\n"
    )
    cancellation = Cancellation()
    seen: list[str] = []
    log: list[bytes] = []

    def listen(event: Event) -> None:
        if isinstance(event, Output):
            log.append(event.data)
        if not seen and b"\nready\n" in b"".join(log):
            find = ["find", str(docker_person.home.sandboxes), "-mindepth", "1"]
            for user in (None, STRANGER):
                ran = subprocess.run(
                    find, user=user, group=user, extra_groups=None if user is None else [],
                    capture_output=True, text=True, check=False, timeout=10,
                )  # fmt: skip
                seen.append(ran.stdout)
            cancellation.cancel()

    with pytest.raises(Cancelled):
        docker_person.submit(context, listen=listen, cancellation=cancellation)
    mine, theirs = seen
    assert "auth.json" in mine
    assert len(theirs.splitlines()) == 1, theirs  # its name; nothing that is in it


# Defence: ``of_state`` and ``_is_place`` in sandbox.docker.place.
def test_row_22_gc_takes_what_is_ours_whatever_it_is_called_and_nothing_else(
    docker_person: Person, engine: RealEngine, place: Path
) -> None:
    names = ("", ".", "..", "../..", "/", "/etc", "a/../..", "x" * 4000, "\x1b[2J\n", "lock")
    ours = of_state(docker_person.home.sandboxes)
    other = of_state(place / "other/runner/sandboxes")
    (place / "root.tar").write_bytes(toolbox_tar())
    with (place / "root.tar").open("rb") as tar, engine.client() as client:
        client.import_image(tar, "tests/gc:1", {})
        for name, labels in itertools.product(names, (ours, other)):
            labelled = {**labels, NAME_LABEL: name}
            client.create(
                f"x{secrets.token_hex(8)}",
                {"Image": "tests/gc:1", "Cmd": ["/x"], "Labels": labelled},
            )
        ran = docker_person.run("gc")
        theirs = client.labelled(other)
        assert (ran.status, client.labelled(ours)) == (0, []), ran.stderr
        assert len(theirs) == len(names)
        for each, _ in theirs:
            client.remove(each)
    assert "\x1b" not in ran.stdout + ran.stderr
    docker_person.assert_nothing_left()
