"""Events as people read them: lines in CI, colours and progress bars on a terminal.

All of it goes to stderr; stdout is for the answer. Whatever came from a build, a registry or a
file name is made printable first.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from policies.errors import RunnerError
from policies.model import MIB, Decision
from runner import events
from runner.events import Event, as_line
from runner.terminal import Lines, clean
from sandbox.model import ClusterView, HostView

if TYPE_CHECKING:
    from rich.progress import TaskID

STYLES = {"error": "bold red", "warning": "yellow", "advice": "cyan", "digest": "bold green"}


class View(Protocol):
    """A reader of events."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def choose(*, json: bool) -> View:
    """The view that suits where our output goes."""
    if json:
        return JsonView()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return TerminalView()
    if isinstance(sys.stderr, io.TextIOWrapper):
        # Flushed by event, not by line: a build may write millions of short ones.
        sys.stderr.reconfigure(line_buffering=False)
    return TextView(_to_stderr)


def _to_stderr(label: str, text: str) -> None:
    sys.stderr.write(f"{label:<10} {text}\n")


def say(label: str, text: str) -> None:
    """One line of our own, outside of any build."""
    _to_stderr(label, clean(text))
    sys.stderr.flush()


def say_error(error: RunnerError) -> None:
    """What happened, and what to do next."""
    for line in error.message.splitlines() or [""]:
        say("error", line)
    say("code", f"{error.code} (exit status {int(error.status)})")
    if error.advice:
        say("advice", error.advice)


class JsonView:
    """A line of JSON per event, on stdout."""

    def __call__(self, event: Event) -> None:
        sys.stdout.buffer.write(as_line(event))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        pass


class TextView:
    """A line per event; nothing moves."""

    def __init__(self, line: Callable[[str, str], None]) -> None:
        self._line = line
        self._output = Lines(lambda text: self._line("|", text))

    def _say(self, label: str, text: str) -> None:
        self._output.finish()
        self._line(label, clean(text))
        sys.stderr.flush()

    def close(self) -> None:
        self._output.finish()
        sys.stderr.flush()

    def __call__(self, event: Event) -> None:  # noqa: C901, PLR0912 - a table of events
        match event:
            case events.Output(data):
                self._output.feed(data)
                sys.stderr.flush()
            case events.Progress():
                self._progress(event)
            case events.Started(build_id, context):
                self._say("build", f"{build_id} of {context}")
            case events.Snapshotted(digest, size, entries):
                self._say("context", f"{digest}, {entries} entries, {_bytes(size)}")
            case events.Decided(decision):
                self._decided(decision)
            case events.Resolved(image, digest):
                self._say("base", f"{image} is {digest}")
            case events.Unpacking(image):
                self._say("unpack", f"{image}, once")
            case events.Provided(image, how):
                self._say("base", f"{image} is {how}")
            case events.Waiting(reason):
                self._say("waiting", f"for {reason}")
            case events.Observed(evidence):
                self._say(
                    "observed",
                    f"{evidence.isolation}: kernel {evidence.kernel_release} by "
                    f"{evidence.runtime} {evidence.runtime_version}; "
                    f"{_outside(evidence.outside)}; interfaces {', '.join(evidence.interfaces)}",
                )
            case events.Verified(digest, size, layers):
                self._say(
                    "verified",
                    f"{digest}, {layers} {'layer' if layers == 1 else 'layers'}, {_bytes(size)}",
                )
            case events.Published(destination, digest):
                self._say("published", f"{destination} is {digest}")
            case events.Warned(message):
                self._say("warning", message)
            case events.Failed(_, _, _, log):
                self._output.finish()
                if log:
                    self._say("log", log)
            case events.Finished(_, seconds):
                self._say("done", f"in {seconds:.1f} s")
            case events.StageEnded(stage, seconds):
                self._stage_ended(stage, seconds)
            case events.StageStarted():
                pass

    def _decided(self, decision: Decision) -> None:
        limits = decision.limits
        policies = ", ".join(f"{name}@{digest.hex[:12]}" for name, digest in decision.policies)
        self._say(
            "decision",
            f"isolation {decision.isolation}, backend {decision.backend}, builder "
            f"{decision.builder}, network {decision.network}; {limits.memory_bytes // MIB} MiB, "
            f"{limits.cpu_millis / 1000:g} cpus, {limits.pids} pids, {limits.wall_seconds} s "
            f"(policy {policies})",
        )

    def _stage_ended(self, stage: events.Stage, seconds: float) -> None:
        self._say("stage", f"{stage} took {seconds:.2f} s")

    def _progress(self, event: events.Progress) -> None:
        """Quiet where nothing can move."""


class TerminalView(TextView):
    """Colours, and a bar for whatever takes long."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only on a terminal
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

        super().__init__(self._print)
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def _print(self, label: str, text: str) -> None:
        from rich.text import Text  # noqa: PLC0415 - only on a terminal

        style = STYLES.get(label, "dim" if label == "stage" else "bold")
        self._console.print(Text(f"{label:<10} ", style=style), Text(text), sep="", soft_wrap=True)

    def _progress(self, event: events.Progress) -> None:
        if 0 < event.total <= MIB:
            return
        total = event.total or None  # a bar without an end moves all the same
        task = self._tasks.get(event.what)
        if task is None:
            task = self._tasks[event.what] = self._bars.add_task(clean(event.what), total=total)
        self._bars.update(task, completed=event.done, total=total)
        if total is not None and event.done >= total:
            self._bars.remove_task(self._tasks.pop(event.what))

    def _stage_ended(self, stage: events.Stage, seconds: float) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        super()._stage_ended(stage, seconds)

    def close(self) -> None:
        super().close()
        self._bars.stop()


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:  # noqa: PLR2004 - decimal units
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"


def _outside(view: HostView | ClusterView) -> str:
    if isinstance(view, ClusterView):
        return f"node {view.node}, pod {view.pod}"
    uids = sorted({process.uid for process in view.processes})
    return f"host uid {', '.join(map(str, uids))}"
