"""``runner submit`` as a process, with the moment at which each of its events arrived."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.hosts import REPOSITORY, Person

END_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Timeline:
    """One submit. Moments are seconds since the process was started.

    Attributes:
        seconds: Until it had ended.
        moments: Of the first event of each kind; stages are ``launch started``, ``launch ended``.
    """

    seconds: float
    moments: Mapping[str, float]

    def stretches(self) -> dict[str, float]:
        """From the start of the command to the builder's first line, without a gap."""
        names = {
            "interpreter, imports, arguments": "started",
            "prepare: runsc": "prepare ended",
            "context: snapshot": "context ended",
            "decide": "decide ended",
            "builder's seal, place, session, gateway's socket": "resolve started",
            "resolve base images": "resolve ended",
            "fetch and unpack base images, or find them unpacked": "bases ended",
            "launch: runsc, canary, judgement, release": "observed",
            "unpack the context, exec of buildah, its first line": "output",
        }
        found, before = {}, 0.0
        for name, event in names.items():
            found[name] = self.moments[event] - before
            before = self.moments[event]
        return found

    @property
    def start_path(self) -> float:
        """Until the builder's first line: its argv was executed just before."""
        return self.moments["output"]

    def stage(self, name: str) -> float:
        return self.moments[f"{name} ended"] - self.moments[f"{name} started"]


def submit(
    person: Person,
    context: Path,
    *,
    destination: str,
    build_args: Mapping[str, str],
    policies: Sequence[Path] = (),
) -> Timeline:
    """Builds, verifies and publishes, from the command line."""
    words = ["submit", "--untrusted", "--json", f"--backend={person.backend}", str(context)]
    words += [f"--policy={path}" for path in policies]
    words += ["--destination", destination]
    words += [f"--build-arg={name}={value}" for name, value in build_args.items()]
    started = time.monotonic()
    moments: dict[str, float] = {}
    last = ""
    with person.start(*words) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                now = time.monotonic() - started
                moments.setdefault(_name(json.loads(line)), now)
                last = line
            process.wait()
        except BaseException:
            _end(process)
            raise
        seconds = time.monotonic() - started
    if process.returncode != 0:
        raise RuntimeError(f"runner submit ended with {process.returncode}: {last}")
    return Timeline(seconds, moments)


def _end(process: subprocess.Popen[str]) -> None:
    """A terminal's Ctrl-C reached it as well; a second signal would cut its cleaning-up short."""
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()


def _name(event: Mapping[str, str]) -> str:
    kind = event["event"]
    if kind in {"stagestarted", "stageended"}:
        return f"{event['stage']} {kind.removeprefix('stage')}"
    return kind


def wall_seconds(*arguments: str) -> float:
    """Of a Python with these arguments."""
    started = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=REPOSITORY)
    return time.monotonic() - started


def import_seconds(module: str) -> float:
    """What ``python -X importtime`` adds up to; measuring makes it dearer than it is."""
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        check=True, capture_output=True, text=True, cwd=REPOSITORY,
    ).stderr  # fmt: skip
    own = (line.removeprefix("import time:").partition("|")[0] for line in shown.splitlines())
    return sum(int(microseconds) for microseconds in own if microseconds.strip().isdigit()) / 1e6
