"""``runner gc``: remove whatever killed runs left behind."""

import argparse
from collections.abc import Iterable

from runner import settings
from runner.cli import view
from runner.cli.tools import backends, kubernetes_backend
from runner.errors import UsageError
from runner.files import Home
from runner.gc import collect


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Removes sandboxes, state and half-made files of runs that were killed, and records of "
        "builds that are older than their policy's retention_days. Builds that run are not touched."
    )

    parser.add_argument(
        "--backend", choices=("kubernetes",), help="with --older-than: where to look"
    )
    parser.add_argument(
        "--older-than",
        type=_hours,
        metavar="HOURS",
        help="remove every sandbox that is older, also those of other state directories",
    )


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0
    if not 0 < hours < _MOST_HOURS:
        raise argparse.ArgumentTypeError("a number of hours is wanted")
    return hours


_MOST_HOURS = 1e6
_HOUR_SECONDS = 3600


def run(parsed: argparse.Namespace) -> int:
    home = Home.find()
    home.prepare()
    loaded = settings.load()
    if (parsed.backend is None) != (parsed.older_than is None):
        raise UsageError("--backend and --older-than belong together", advice="runner gc --help")
    if parsed.backend is not None:
        backend = kubernetes_backend(home, loaded)
        report(backend.sweep_older(parsed.older_than * _HOUR_SECONDS))
        return 0
    report(collect(home, loaded, backends(home, loaded)))
    return 0


def report(removed: Iterable[str]) -> None:
    """Says what was removed, one by one."""
    count = 0
    for what in removed:
        view.say("removed", what)
        count += 1
    view.say("gc", f"{count} removed")
