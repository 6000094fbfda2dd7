"""``runner gc``: remove whatever killed runs left behind."""

import argparse

from runner import settings
from runner.cli import view
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
    removed = 0
    for what in collect(home, settings.load()):
        view.say("removed", what)
        removed += 1
    view.say("gc", f"{removed} removed")
    return 0
