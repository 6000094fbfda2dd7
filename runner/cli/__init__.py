"""The command line: a module per subcommand, imported only when it is asked for."""

import argparse
import contextlib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.errors import RunnerError

COMMANDS = {
    "submit": "build an untrusted context, verify the image and publish it",
    "policy": "explain, check, test, compare or show policies",
    "builder": "list, install, export, import, verify or remove the root filesystems of builders",
    "base": "list, pull, verify or remove base images that are unpacked before builds",
    "egress": "show what a build asked the gateway for, and what it would need",
    "doctor": "say what this host can do, and how to mend what it cannot",
    "gc": "remove whatever killed runs left behind",
    "gateway": "let sandboxes on other machines reach the one door",
    "verify": "check an image in a registry with the verifier that builds go through",
}

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit status. Prints no traceback."""
    _fill_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="runner",
        description="Builds container images from source that you do not trust.",
        epilog="runner COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        if words and words[0] == name:
            import_module(f"runner.cli.{name}").configure(command)
    parsed = parser.parse_args(words)
    if parsed.version:
        from runner import __version__  # noqa: PLC0415 - start-up is a feature

        print(f"runner {__version__}")  # noqa: T201 - the answer
        return 0
    if parsed.command is None:
        parser.print_help()
        return USAGE
    return _guarded(parsed)


def _fill_standard_streams() -> None:
    """A stream that the caller closed must not become a file or socket that we open."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _guarded(parsed: argparse.Namespace) -> int:
    from runner.errors import (  # noqa: PLC0415 - start-up is a feature
        Cancelled,
        DiskExceeded,
        InternalError,
        RunnerError,
    )

    try:
        if os.environ.get("RUNNER_LOG") == "debug":
            import_module("runner.logs").configure()
        return int(import_module(f"runner.cli.{parsed.command}").run(parsed))
    except RunnerError as error:
        return _said(error)
    except KeyboardInterrupt:
        return _said(Cancelled("interrupted"))
    except BrokenPipeError:
        return _said(Cancelled("whoever read the output has gone"))
    except Exception as error:  # noqa: BLE001 - the last resort: a file and a sentence
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return _said(DiskExceeded(f"{error.filename or 'stdout'}: no space left"))
        file, path = tempfile.mkstemp(prefix="runner-diagnostics-", suffix=".txt")
        with contextlib.suppress(OSError), os.fdopen(file, "w", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        return _said(InternalError(f"a bug in runner; diagnostics are in {path}"))


def _said(error: "RunnerError") -> int:
    """Tells the user, if anybody still reads that, and returns the exit status."""
    from runner.cli.view import say_error  # noqa: PLC0415 - start-up is a feature

    try:
        say_error(error)
        sys.stdout.flush()
    except OSError:
        # Python would complain once more at its exit.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return int(error.status)
