"""``runner policy test DIR``: the test files of policies, a line for each case that failed."""

import argparse
from pathlib import Path

from policies import cases
from policies.cases import CaseResult
from runner.cli.policy.answer import say, say_json
from runner.errors import CheckFailed, OutputInvalid
from runner.files import write_whole


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help="with *.yaml, here or below")
    add("--junit", metavar="FILE", type=Path, help="write the results as JUnit's XML as well")
    add("--json", action="store_true", help="results as JSON")


def run(parsed: argparse.Namespace) -> int:
    results = [
        result for path in cases.find(parsed.directory) for result in cases.run(cases.read(path))
    ]
    if parsed.junit is not None:
        _write(parsed.junit, cases.junit(results))
    failed = [result for result in results if not result.passed]
    summary = f"{len(results)} cases, {len(failed)} failed"
    if parsed.json:
        say_json([_plain(result) for result in results])
    else:
        say(f"{f.source}:{f.line}: {f.name}: {'; '.join(f.differences)}" for f in failed)
        say([summary])
    if failed:
        raise CheckFailed(summary, advice="Either the policy or what the cases expect is wrong.")
    return 0


def _plain(result: CaseResult) -> dict[str, object]:
    return {
        "file": result.source,
        "line": result.line,
        "name": result.name,
        "passed": result.passed,
        "differences": result.differences,
    }


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise OutputInvalid(f"{path}: {error.strerror}") from None
