"""``runner gc``: remove whatever killed runs left behind."""

import argparse
from collections.abc import Iterable

from runner import settings
from runner.cli import view
from runner.cli.tools import backends
from runner.files import Home
from runner.gc import collect


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Removes sandboxes, state and half-made files of runs that were killed, and records of "
        "builds that are older than their policy's retention_days. Builds that run are not touched."
    )


def run(parsed: argparse.Namespace) -> int:
    del parsed
    home = Home.find()
    home.prepare()
    loaded = settings.load()
    report(collect(home, loaded, backends(home, loaded)))
    return 0


def report(removed: Iterable[str]) -> None:
    """Says what was removed, one by one."""
    count = 0
    for what in removed:
        view.say("removed", what)
        count += 1
    view.say("gc", f"{count} removed")
