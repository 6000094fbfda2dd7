"""``runner policy check FILE...``: mistakes in policy files, a line each."""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from policies.errors import PolicyInvalid
from policies.loader import MOST_BYTES
from policies.review import Finding, Severity, review
from runner.cli import view
from runner.cli.policy.answer import say, say_json
from runner.errors import CheckFailed

_PLACE = re.compile(r"(?::(\d+):\d+)?: (.*)", re.DOTALL)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument("--strict", action="store_true", help="fail on warnings too")
    parser.add_argument("--json", action="store_true", help="findings as JSON")


def run(parsed: argparse.Namespace) -> int:
    found = [(path, finding) for path in parsed.files for finding in _findings(path)]
    if parsed.json:
        say_json([{"file": path, **asdict(finding)} for path, finding in found])
    else:
        say(f"{path}:{f.line}: {f.severity}: {f.sentence} ({f.code})" for path, f in found)
    counts = Counter(finding.severity for _, finding in found)
    view.say("checked", f"{len(parsed.files)} files; {_numbers(counts)}")
    if counts[Severity.ERROR] or (parsed.strict and counts[Severity.WARNING]):
        raise CheckFailed(f"policies: {_numbers(counts)}", advice="Each line names its place.")
    return 0


def _numbers(counts: Counter[Severity]) -> str:
    return ", ".join(f"{counts[severity]} {severity}s" for severity in Severity)


def _findings(path: Path) -> Iterator[Finding]:
    try:
        with path.open("rb") as stream:
            yield from review(stream.read(MOST_BYTES + 1), str(path))
    except PolicyInvalid as error:
        match = _PLACE.fullmatch(error.message.removeprefix(str(path)))
        line, sentence = (match[1] or 1, match[2]) if match else (1, error.message)
        yield Finding(int(line), Severity.ERROR, error.code, sentence)
    except OSError as error:
        yield Finding(1, Severity.ERROR, PolicyInvalid.code, str(error.strerror))
