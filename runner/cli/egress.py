"""``runner egress ID``: what a build asked the gateway for, and what it would need to be allowed.

What stands in a ledger comes from the build. All of it is made printable before it is shown.
"""

import argparse
import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from policies.document import EgressDocument
from policies.reference import Digest, ImageReference
from runner.cli import view
from runner.errors import CheckFailed, InvalidReference, UsageError
from runner.files import Home
from runner.gateway.ledger import Chain, Entry, Record
from runner.terminal import clean

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
_RESULT_BYTES = 64 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Shows the ledger of a build: every request that it made, in order."
    parser.add_argument("id", metavar="ID", help="of the build; its first line of output names it")
    parser.add_argument("--denied", action="store_true", help="only what was denied")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    form.add_argument(
        "--suggest",
        action="store_true",
        help="the terms of a policy, as YAML, that allow all that the build asked for",
    )
    form.add_argument("--verify", action="store_true", help="check that nobody changed the ledger")


def run(parsed: argparse.Namespace) -> int:
    directory = _directory(parsed.id)
    chain = Chain()
    try:
        with (directory / "ledger.jsonl").open("rb") as stream:
            records = chain.records(stream)
            if parsed.verify:
                return _verify(chain, records, directory / "result.json")
            shown = (r for r in records if not parsed.denied or r.entry.decision == "denied")
            if parsed.suggest:
                _print(suggestion(parsed.id, [record.entry for record in shown]))
            elif parsed.json:
                _print(json.dumps({"time": r.time, **asdict(r.entry)}) for r in shown)
            else:
                _print(_table(map(_row, shown)))
    except FileNotFoundError:
        raise UsageError(f"build {parsed.id} has no ledger: it ended before its sandbox") from None
    _say_how_it_ends(chain)
    return 0


def _directory(build_id: str) -> Path:
    if not _ID.fullmatch(build_id):
        raise UsageError(
            f"{build_id[:100]!r} is no build's name",
            advice="It looks like 20260131-235959-0a1b2c; the directories of builds/ have them.",
        )
    directory = Home.find().builds / build_id
    if not directory.is_dir():
        raise UsageError(f"there is no build {build_id} in {directory.parent}")
    return directory


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201 - the answer


def _say_how_it_ends(chain: Chain) -> None:
    if chain.end is not None and chain.end.unrecorded:
        view.say("warning", f"the ledger was full: {chain.end.unrecorded} requests more came")
    if chain.torn:
        view.say("warning", "the last line is torn: the session was killed while it was written")
    elif chain.end is None:
        view.say("warning", "the session still runs, or was killed")


# -- is it as it was written? --------------------------------------------------------------------


def _verify(chain: Chain, records: Iterable[Record], result: Path) -> int:
    """Raises CheckFailed."""
    for _ in records:
        pass
    if result.exists():
        if chain.end is None:
            raise CheckFailed(
                "the ledger lacks its end, and the build ended",
                advice="Lines were cut off, or the disk was full: the result's code says that.",
            )
        head = _head(result)
        if head is None:
            view.say("warning", "the build's result names no head: this proves no more than order")
        else:
            chain.require(head)
    _say_how_it_ends(chain)
    view.say("ledger", f"{chain.recorded} requests, each bound to the one before")
    print(chain.head)  # noqa: T201 - the answer
    return 0


def _head(result: Path) -> Digest | None:
    """What the result says that the ledger ends with. Raises CheckFailed."""
    try:
        with result.open("rb") as stream:
            document = json.loads(stream.read(_RESULT_BYTES))
        head = document.get("ledger")
        return None if head is None else Digest(head)
    except (ValueError, AttributeError, TypeError, InvalidReference):
        raise CheckFailed(
            f"{result} is none of ours", advice="Nobody but runner writes it."
        ) from None


# -- the table -----------------------------------------------------------------------------------

_HEAD = (
    "host", "port", "kind", "method", "path", "decision", "rule", "status", "sent", "received",
)  # fmt: skip
_WIDEST = 48


def _row(record: Record) -> tuple[str, ...]:
    entry = record.entry
    return (
        entry.host or "-", str(entry.port or "-"), entry.kind, entry.method, entry.path or "-",
        entry.decision, entry.rule or "-", str(entry.status), str(entry.sent_bytes),
        str(entry.received_bytes),
    )  # fmt: skip


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns; a long cell is cut, ``--json`` has all of it."""
    cells = [_HEAD, *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()


def _cell(text: str) -> str:
    shown = clean(text)
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 3]}..."


# -- what would allow it -------------------------------------------------------------------------

MOST_HOSTS = 500
"""In a suggestion: who needs more has no list that anybody reads."""


@dataclass(slots=True)
class _Asked:
    """What a build did with one host and port."""

    methods: set[str] = field(default_factory=set)
    connected: bool = False
    denied: bool = False

    def add(self, entry: Entry) -> None:
        self.denied = self.denied or entry.decision == "denied"
        if entry.kind == "http":
            self.methods.add(entry.method)
        else:
            self.connected = True


def suggestion(build_id: str, entries: Sequence[Entry]) -> Iterator[str]:
    """Terms of a policy that would allow ``entries``, as lines of YAML."""
    yield f"# What build {build_id} asked for. Whoever wrote the build wrote this list: read it."
    asked: dict[tuple[str, int], _Asked] = {}
    images: dict[str, bool] = {}
    for entry in entries:
        if entry.kind == "registry":
            if (image := _image(entry)) is not None:
                images[image] = images.get(image, False) or entry.decision == "denied"
        else:
            port = entry.port or (80 if entry.kind == "http" else 443)
            asked.setdefault((entry.host, port), _Asked()).add(entry)
    yield from _egress(asked)
    yield from _base_images(images)


def _egress(asked: dict[tuple[str, int], _Asked]) -> Iterator[str]:
    rules: dict[tuple[int, tuple[str, ...]], dict[str, bool]] = {}
    for (host, port), how in sorted(asked.items())[:MOST_HOSTS]:
        methods = () if how.connected else tuple(sorted(how.methods))
        if _can_be_named(host, port, methods):
            rules.setdefault((port, methods), {})[host] = how.denied
        else:
            named = clean(host) or "a target that makes no sense"
            yield f"# left out, since no policy can name it: {named}, port {port}"
    if len(asked) > MOST_HOSTS:
        yield f"# left out: {len(asked) - MOST_HOSTS} hosts more"
    if rules:
        yield "network: egress"
    yield "egress:" if rules else "egress: []"
    for (port, methods), hosts in sorted(rules.items()):
        yield "  - hosts:"
        yield from (
            f"      - {_quoted(host)}{_remark(host, denied)}" for host, denied in hosts.items()
        )
        yield f"    ports: [{port}]"
        if methods:
            yield f"    methods: [{', '.join(map(_quoted, methods))}]"


def _base_images(images: dict[str, bool]) -> Iterator[str]:
    yield "base_images:" if images else "base_images: []"
    for image, denied in sorted(images.items())[:MOST_HOSTS]:
        yield f"  - {_quoted(image)}{_remark('', denied)}"
    if len(images) > MOST_HOSTS:
        yield f"# left out: {len(images) - MOST_HOSTS} images more"


def _can_be_named(host: str, port: int, methods: tuple[str, ...]) -> bool:
    try:
        EgressDocument(hosts=(host,), ports=(port,), methods=methods)
    except ValueError:
        return False
    return not host.startswith("*")


def _image(entry: Entry) -> str | None:
    """The image whose manifest was asked for, as ``base_images`` names it."""
    name, found, _ = entry.path.removeprefix("/v2/").rpartition("/manifests/")
    host = f"{entry.host}:{entry.port}" if entry.port else entry.host
    if not entry.host or not found:
        return None
    try:
        image = ImageReference.parse(f"{host}/{name}")
    except InvalidReference:
        return None
    return image.name if image.tag is None and image.digest is None else None


def _remark(host: str, denied: bool) -> str:
    try:
        ipaddress.ip_address(host)
        remarks = ["an address, not a name"]
    except ValueError:
        remarks = []
    remarks += ["was denied"] if denied else []
    return f"  # {', '.join(remarks)}" if remarks else ""


def _quoted(text: str) -> str:
    """In quotes: YAML would take some names for numbers."""
    return json.dumps(text)
