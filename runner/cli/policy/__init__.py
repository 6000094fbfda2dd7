"""``runner policy explain|check|test|diff|show``: what policies say, before a build asks them."""

import argparse
from importlib import import_module
from typing import Any

ACTIONS = {
    "explain": "say how a build would be decided, and which rule of which policy made it so",
    "check": "find mistakes in policy files",
    "test": "run the test files of policies",
    "diff": "say which known builds another policy would decide differently",
    "show": "print the policies that apply, with all that they extend",
}


class _Action(argparse.ArgumentParser):
    """Configured when it is asked to parse: what one action imports costs no other anything."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - argparse's own
        _module(self.prog.rpartition(" ")[2]).configure(self)
        return super().parse_known_args(*args, **kwargs)


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_Action
    )
    for name, purpose in ACTIONS.items():
        actions.add_parser(name, help=purpose, description=purpose.capitalize() + ".")


def run(parsed: argparse.Namespace) -> int:
    return int(_module(parsed.action).run(parsed))


def _module(action: str) -> Any:  # noqa: ANN401 - a module
    return import_module(f"runner.cli.policy.{action}")
