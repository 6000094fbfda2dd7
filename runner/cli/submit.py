"""``runner submit --untrusted CONTEXT``: build, verify, publish."""

import argparse
import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policies.facts import SourceFacts, is_tenant
from policies.reference import ImageReference
from runner.cancel import Cancellation
from runner.cli import view
from runner.cli.tools import assemble
from runner.errors import OutputInvalid, UsageError
from runner.files import write_whole
from runner.output import Output
from runner.pipeline import submit
from runner.request import BuildRequest, BuildResult

_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s?)?")
_ARG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[\x21-\x7e]{1,1024}")
_USER_INFO = re.compile(r"(?<=//)[^/]*@")
_SIZE = re.compile(r"([0-9]{1,15})([bkmgt]?)")
_CPUS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,3})?")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("context", metavar="CONTEXT", type=Path, help="directory with all that is copied")
    configure_facts(parser)
    add("--output", metavar="oci:DIR|tar:FILE", help="write the image to this host as well")
    add("--digest-file", metavar="FILE", type=Path, help="write the image's digest here")
    add("--json", action="store_true", help="events as lines of JSON on stdout")


def configure_facts(parser: argparse.ArgumentParser) -> None:
    """The options that policy sees; ``runner policy explain`` has them too."""
    add = parser.add_argument
    add(
        "--untrusted",
        action="store_true",
        help="state that the source is not trusted; then no policy can say otherwise",
    )
    add("--file", metavar="FILE", help="the Dockerfile, relative to CONTEXT [Dockerfile]")
    add(
        "--destination",
        metavar="HOST/REPO:TAG",
        action="append",
        default=[],
        help="where to publish; repeatable",
    )
    add("--build-arg", metavar="NAME=VALUE", action="append", default=[], help="repeatable")
    add("--target", metavar="STAGE", help="build this stage instead of the last one")
    add("--platform", metavar="OS/ARCH", default="linux/amd64", help="[%(default)s]")
    add("--backend", default="local", help="where the sandbox runs [%(default)s]")
    add("--builder", default="buildah", help="[%(default)s]")
    add(
        "--policy",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="tighten the operator's policy; repeatable",
    )
    add("--timeout", metavar="DURATION", help="less than policy allows, such as 90s or 1h30m")
    add("--memory", metavar="SIZE", help="less than policy allows, such as 512m or 2g")
    add("--cpus", metavar="NUMBER", help="likewise, such as 0.5 or 2")
    add("--tenant", metavar="NAME", help="on whose behalf; policies may ask for it")
    add(
        "--source",
        metavar="FACT=VALUE",
        action="append",
        default=[],
        help="where the context comes from: url=URL, ref=REF, pull_request=true|false, "
        "fork=true|false; repeatable. What nobody says is unknown",
    )


def run(parsed: argparse.Namespace) -> int:
    # What was imported stays until the end; walking it once more then would take 60 ms.
    gc.freeze()
    _check_digest_file(parsed.digest_file)
    request = build_request(parsed)
    tools = assemble(parsed.policy)
    seen = view.choose(json=parsed.json)
    cancellation = Cancellation()
    try:
        with _signals(cancellation):
            result = submit(request, tools, seen, cancellation)
    finally:
        seen.close()
    if not parsed.json:
        _answer(result)
    if parsed.digest_file is not None:
        _write_digest(parsed.digest_file, result)
    return 0


def build_request(parsed: argparse.Namespace) -> BuildRequest:
    """What the options of ``configure_facts`` ask for, and those of ``configure`` if given.

    Raises:
        UsageError: An option means nothing.
    """
    target, output = parsed.target, getattr(parsed, "output", None)
    if target is not None and not _TARGET.fullmatch(target):
        raise UsageError(f"not a stage's name: {target[:200]!a}")
    if parsed.tenant is not None and not is_tenant(parsed.tenant):
        raise UsageError(
            f"not a tenant's name: {parsed.tenant[:200]!a}",
            advice="Write a-z, 0-9 and - inside, at most 63 characters.",
        )
    return BuildRequest(
        context=parsed.context,
        dockerfile=parsed.file,
        destinations=tuple(map(ImageReference.parse, dict.fromkeys(parsed.destination))),
        output=Output.parse(output) if output is not None else None,
        build_args=dict(map(_build_arg, parsed.build_arg)),
        target=target,
        platform=parsed.platform,
        backend=parsed.backend,
        builder=parsed.builder,
        untrusted=parsed.untrusted,
        tenant=parsed.tenant,
        source=_source(parsed.source),
        wall_seconds=None if parsed.timeout is None else _seconds(parsed.timeout),
        memory_bytes=None if parsed.memory is None else _bytes(parsed.memory),
        cpu_millis=None if parsed.cpus is None else _cpu_millis(parsed.cpus),
    )


def _check_digest_file(path: Path | None) -> None:
    if path is not None and not os.access(path.parent, os.W_OK):
        raise OutputInvalid(
            f"{path.parent} is no directory that can be written",
            advice="--digest-file names a file in a directory that exists.",
        )


def _source(stated: list[str]) -> SourceFacts:
    facts: dict[str, str | bool] = {}
    for text in stated:
        name, _, value = text.partition("=")
        if name in {"url", "ref"} and _WORD.fullmatch(value):
            facts[name] = _USER_INFO.sub("", value)
        elif name in {"pull_request", "fork"} and value in {"true", "false"}:
            facts[name] = value == "true"
        else:
            raise UsageError(
                f"not a fact about the source: {_USER_INFO.sub('', text)[:200]!a}",
                advice="Write url=URL, ref=REF, pull_request=true or fork=false.",
            )
    return SourceFacts(**facts)  # type: ignore[arg-type] # each of its own type


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.lower())
    number = int(match[1]) << (10 * "bkmgt".index(match[2] or "b")) if match else 0
    if number <= 0:
        raise UsageError(f"not a size: {text[:100]!a}", advice="Write 512m or 2g.")
    return number


def _cpu_millis(text: str) -> int:
    match = _CPUS.fullmatch(text)
    millis = round(float(text) * 1000) if match else 0
    if millis <= 0:
        raise UsageError(f"not a number of processors: {text[:100]!a}", advice="Write 0.5 or 2.")
    return millis


def _build_arg(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _ARG_NAME.fullmatch(name) or "\0" in value:
        raise UsageError(
            f"not a build argument: {text[:200]!a}", advice="Write --build-arg NAME=VALUE."
        )
    return name, value


def _seconds(text: str) -> int:
    match = _DURATION.fullmatch(text)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = hours * 3600 + minutes * 60 + seconds
    if total <= 0:
        raise UsageError(f"not a duration: {text[:100]!a}", advice="Write 90s, 20m or 1h30m.")
    return total


@contextmanager
def _signals(cancellation: Cancellation) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP cancels cleanly; a second one interrupts that too."""

    def first(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.default_int_handler)
        # Never in the handler itself: it may have interrupted a holder of the locks it needs.
        threading.Thread(target=cancellation.cancel, name="cancel").start()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
