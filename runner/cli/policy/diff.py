"""``runner policy diff OLD NEW``: which known builds another policy would decide differently."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from policies import cases, factsfile
from policies.engine import decide
from policies.errors import PolicyInvalid
from policies.facts import BuildFacts
from policies.loader import Policy
from policies.model import plain
from runner.cli import view
from runner.cli.policy.answer import say, say_json, shown
from runner.files import Home

DIFFERENT = 1
"""Exit status with --exit-code, as of diff."""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", metavar="OLD", help="a policy file, or library/NAME for a shipped one")
    add("new", metavar="NEW", help="likewise; each is taken as the operator's")
    add(
        "--facts",
        metavar="DIR",
        type=Path,
        help="with facts documents or decision.json of builds [the builds of this user]",
    )
    add("--exit-code", action="store_true", help="end with status 1 where anything differs")
    add("--json", action="store_true", help="differences as JSON")


def run(parsed: argparse.Namespace) -> int:
    old, new = (cases.policy(name, beside=Path()) for name in (parsed.old, parsed.new))
    known = list(_of_builds() if parsed.facts is None else _in_directory(parsed.facts))
    found = [(name, changes) for name, facts in known if (changes := _changes(old, new, facts))]
    if parsed.json:
        say_json([{"build": name, "differences": changes} for name, changes in found])
    else:
        say(
            f"{name}: {change['field']} {shown(change['old'])} -> {shown(change['new'])}"
            for name, changes in found
            for change in changes
        )
        say([f"{len(known)} builds, {len(found)} would be decided differently"])
    return DIFFERENT if found and parsed.exit_code else 0


def _changes(old: Policy, new: Policy, facts: BuildFacts) -> list[dict[str, object]]:
    before, after = (cases.outcome(plain(decide([policy], facts))) for policy in (old, new))
    return [
        {"field": field, "old": was, "new": now}
        for field, was, now in cases.differences(before, after)
    ]


def _in_directory(directory: Path) -> Iterator[tuple[str, BuildFacts]]:
    paths = sorted(path for kind in ("*.yaml", "*.json") for path in directory.rglob(kind))
    if not paths:
        raise PolicyInvalid(f"{directory}: no *.yaml and no *.json in it")
    for path in paths:
        yield str(path.relative_to(directory)), factsfile.read(path).facts


def _of_builds() -> Iterator[tuple[str, BuildFacts]]:
    """What builds recorded. One that another version wrote is passed over, and said."""
    for path in sorted(Home.find().builds.glob("*/decision.json")):
        try:
            yield path.parent.name, factsfile.read(path).facts
        except PolicyInvalid as error:
            view.say("skipped", error.message)
