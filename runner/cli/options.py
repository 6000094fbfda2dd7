"""The options that say what to build, and the request that they make.

``runner submit`` has them, and ``runner policy explain``, which only asks what would be decided.
"""

import argparse
import re
from pathlib import Path

from policies.facts import SourceFacts, is_tenant
from policies.reference import ImageReference
from runner.errors import UsageError
from runner.output import Output
from runner.request import BuildRequest

_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s?)?")
_ARG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[\x21-\x7e]{1,1024}")
_USER_INFO = re.compile(r"(?<=//)[^/]*@")
_SIZE = re.compile(r"([0-9]{1,15})([bkmgt]?)")
_MOST_BYTES = 1 << 62
_CPUS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,3})?")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


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
    add("--backend", help="where the sandbox runs [the first that policy takes]")
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
        reproducible=getattr(parsed, "reproducible", False),
        untrusted=parsed.untrusted,
        tenant=parsed.tenant,
        source=_source(parsed.source),
        wall_seconds=None if parsed.timeout is None else _seconds(parsed.timeout),
        memory_bytes=None if parsed.memory is None else _bytes(parsed.memory),
        cpu_millis=None if parsed.cpus is None else _cpu_millis(parsed.cpus),
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
    if not 0 < number < _MOST_BYTES:
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
