"""``runner submit --untrusted CONTEXT``: build, verify, publish."""

import argparse
import gc
import os
from pathlib import Path

from runner.cancel import Cancellation
from runner.cli import view
from runner.cli.options import build_request, configure_facts
from runner.cli.signals import cancelled_by_signals
from runner.cli.tools import assemble
from runner.errors import OutputInvalid
from runner.files import write_whole
from runner.pipeline import submit
from runner.request import BuildResult


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("context", metavar="CONTEXT", type=Path, help="directory with all that is copied")
    configure_facts(parser)
    add(
        "--output",
        metavar="oci:DIR|oci-archive:FILE|tar:FILE",
        help="write the image to this host as well",
    )
    add(
        "--reproducible",
        action="store_true",
        help="the same context and base images give the same digest: every time is 1970-01-01",
    )
    add("--digest-file", metavar="FILE", type=Path, help="write the image's digest here")
    add("--json", action="store_true", help="events as lines of JSON on stdout")


def run(parsed: argparse.Namespace) -> int:
    # What was imported stays until the end; walking it once more then would take 60 ms.
    gc.freeze()
    _check_digest_file(parsed.digest_file)
    request = build_request(parsed)
    tools = assemble(parsed.policy)
    seen = view.choose(json=parsed.json)
    cancellation = Cancellation()
    try:
        with cancelled_by_signals(cancellation):
            result = submit(request, tools, seen, cancellation)
    finally:
        seen.close()
    if not parsed.json:
        _answer(result)
    if parsed.digest_file is not None:
        _write_digest(parsed.digest_file, result)
    return 0


def _check_digest_file(path: Path | None) -> None:
    if path is not None and not os.access(path.parent, os.W_OK):
        raise OutputInvalid(
            f"{path.parent} is no directory that can be written",
            advice="--digest-file names a file in a directory that exists.",
        )


def _write_digest(path: Path, result: BuildResult) -> None:
    try:
        write_whole(path, f"{result.digest}\n".encode())
    except OSError as error:
        raise OutputInvalid(f"{path}: {error.strerror}") from None


def _answer(result: BuildResult) -> None:
    """What scripts take: each destination by digest, or the digest alone."""
    names = [name.rpartition(":")[0] for name in result.published]
    lines = [f"{name}@{result.digest}" for name in names] or [str(result.digest)]
    if result.stored is not None:
        view.say("kept", f"{result.stored} (an OCI layout)")
    try:
        print("\n".join(lines), flush=True)  # noqa: T201 - the answer
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputInvalid(
            f"the digest could not be written to stdout: {error.strerror}",
            advice=f"The build is done: {result.digest}, as result.json says.",
        ) from None
