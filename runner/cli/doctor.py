"""``runner doctor``: what this host can do, row by row, each failure with what mends it."""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict

from policies.model import GIB, Isolation
from runner import settings
from runner.cli.tools import (
    BACKENDS,
    BUILDERS,
    OPERATOR_POLICY,
    backends,
    operator_policy,
    policies,
)
from runner.errors import CheckFailed, RunnerError
from runner.files import Home
from runner.stores.rootfs import RootfsStore
from runner.terminal import clean
from sandbox.rows import Row, Verdict, failed

_ROOM_BYTES = 10 * GIB


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="[%(default)s]")
    parser.add_argument(
        "--isolation", choices=[str(each) for each in Isolation], default="gvisor", help="[gvisor]"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON")


def run(parsed: argparse.Namespace) -> int:
    rows = []
    isolation = Isolation[parsed.isolation.upper()]
    for row in _rows(parsed.backend, isolation):
        rows.append(row)
        if not parsed.json:
            print(f"{row.verdict:<5} {row.name:<16} {clean(row.detail)}")  # noqa: T201 - the answer
            if row.mend and row.verdict is not Verdict.OK:
                print(f"{'':<22} -> {clean(row.mend)}")  # noqa: T201 - the answer
    if parsed.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))  # noqa: T201 - the answer
    failed = [row.name for row in rows if row.verdict is Verdict.FAIL]
    if failed:
        raise CheckFailed(f"this host cannot build yet: {', '.join(failed)}")
    return 0


def _rows(backend: str, isolation: Isolation) -> Iterator[Row]:
    home = Home.find()
    loaded = settings.Settings()
    try:
        loaded = settings.load()
        used = ", ".join(policy.document.name for policy in policies([]))
        source = str(OPERATOR_POLICY) if operator_policy() else "shipped"
        yield Row(name="policy", verdict=Verdict.OK, detail=f"{used} ({source})")
    except RunnerError as error:
        yield failed("configuration", error)
        return  # what is configured is not known, and nothing else is to be tried
    try:
        home.prepare()
        yield _room(home)
    except RunnerError as error:
        yield failed("state", error)
        return
    yield from backends(home, loaded)[backend].probe(isolation)
    for name in BUILDERS:
        yield _builder(home, name)
    yield _bootstrap()


def _room(home: Home) -> Row:
    free = shutil.disk_usage(home.state).free
    detail = f"{home.data} and {home.state}, {free / GIB:.1f} GiB free"
    if free < _ROOM_BYTES:
        mend = "runner gc, or set XDG_STATE_HOME and XDG_DATA_HOME to a larger file system"
        return Row(name="state", verdict=Verdict.WARN, detail=detail, mend=mend)
    return Row(name="state", verdict=Verdict.OK, detail=detail)


def _builder(home: Home, name: str) -> Row:
    try:
        installed = RootfsStore(home.builders).verified(name)
    except RunnerError as error:
        return failed(f"builder {name}", error)
    detail = f"{installed.version}, {installed.digest.hex[:12]} from {installed.source}"
    return Row(name=f"builder {name}", verdict=Verdict.OK, detail=detail)


def _bootstrap() -> Row:
    path = shutil.which("mmdebstrap")
    if path is None:
        return Row(
            name="mmdebstrap",
            verdict=Verdict.WARN,
            detail="not on PATH; only needed to install builders from packages",
            mend="apt-get install mmdebstrap",
        )
    return Row(name="mmdebstrap", verdict=Verdict.OK, detail=path)
