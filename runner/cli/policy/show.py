"""``runner policy show``: the policies that apply, with all that they extend taken in."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import yaml

from policies.loader import Policy, stated
from policies.model import canonical_json, plain
from runner.cli.policy.answer import say
from runner.cli.tools import policies


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policy", metavar="FILE", type=Path, action="append", default=[], help="repeatable")
    add("--json", action="store_true", help="canonical JSON, of which the digests are made")


def run(parsed: argparse.Namespace) -> int:
    found = policies(parsed.policy)
    if parsed.json:
        documents = [
            {"source": p.source, "digest": p.digest, "policy": stated(p.document)} for p in found
        ]
        print(canonical_json(documents).decode())  # noqa: T201 - the answer
        return 0
    for policy in found:
        say(_lines(policy))
    return 0


def _lines(policy: Policy) -> Iterator[str]:
    """A YAML document that has the digest which it states."""
    yield "---"
    yield f"# {policy.digest} of {policy.source}"
    yield from yaml.safe_dump(plain(stated(policy.document)), sort_keys=False).splitlines()
