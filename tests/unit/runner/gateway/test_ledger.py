"""What is written down cannot be changed unnoticed, holds no secret, and has an end."""

import contextlib
import errno
import io
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reference import Digest
from runner.errors import CheckFailed, DiskExceeded, QuotaExceeded
from runner.gateway import ledger
from runner.gateway.ledger import FIRST, LINE_BYTES, Chain, End, Entry, Kind, Ledger, bounded
from tests.support.gateway import Gate, Gates, decision

ENTRY = Entry(
    kind="http", host="files.example.org", port=80, method="GET", path="/a", decision="allowed",
    rule="files.example.org", status=200, sent_bytes=1, received_bytes=2, digest=Digest.of(b"x"),
)  # fmt: skip


def written(path: Path, *entries: Entry, closed: bool = True) -> bytes:
    book = Ledger(path, clock=lambda: 1.23456)
    for entry in entries:
        book.record(entry)
    if closed:
        book.close()
    else:
        book._file.close()
    return path.read_bytes()


def read(data: bytes) -> Chain:
    chain = Chain()
    for _ in chain.records(io.BytesIO(data)):
        pass
    return chain


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


# -- writing and reading -----------------------------------------------------------------------


def test_what_was_recorded_is_read_again(path: Path) -> None:
    entries = [ENTRY, replace(ENTRY, kind="connect", path="", digest=None, decision="denied")]
    chain = Chain()
    records = list(chain.records(io.BytesIO(written(path, *entries))))
    assert [record.entry for record in records] == entries
    assert {record.time for record in records} == {1.235}
    assert (chain.recorded, chain.end, chain.torn) == (2, End(recorded=2, unrecorded=0), False)


def test_the_head_is_the_digest_of_the_last_line(path: Path) -> None:
    book = Ledger(path)
    assert book.head == FIRST
    book.record(ENTRY)
    book.close()
    data = path.read_bytes()
    assert book.head == Digest.of(data.splitlines(keepends=True)[-1]) == read(data).head
    read(data).require(book.head)


def test_an_empty_ledger_has_an_end(path: Path) -> None:
    assert read(written(path)).end == End(recorded=0, unrecorded=0)
    assert read(b"").head == FIRST


def test_a_ledger_is_never_continued(path: Path) -> None:
    written(path, ENTRY)
    with pytest.raises(FileExistsError):
        Ledger(path)


def test_after_the_end_nothing_is_recorded(path: Path) -> None:
    book = Ledger(path)
    book.close()
    head = book.head
    book.record(ENTRY)
    book.close()
    assert book.head == head
    assert read(path.read_bytes()).recorded == 0


def test_a_full_ledger_says_how_many_requests_it_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "REGISTRY_BYTES", 1000)
    pull = replace(ENTRY, kind="registry")
    small = replace(pull, rule="", path="", digest=None)
    data = written(path, *[pull] * 20, small)
    chain = read(data)
    assert chain.end == End(recorded=2, unrecorded=19)
    assert len(data) < 1000 + LINE_BYTES


def test_room_is_left_for_egress_where_registries_have_filled_theirs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "REGISTRY_BYTES", 1000)
    pulls = [replace(ENTRY, kind="registry")] * 20
    tunnel = replace(ENTRY, kind="connect")
    chain = read(written(path, *pulls, tunnel, *pulls, ENTRY))
    assert chain.end == End(recorded=4, unrecorded=38)


def test_what_was_reserved_is_recorded_whatever_came_in_between(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MOST_BYTES", 4 * LINE_BYTES)
    book = Ledger(path)
    book.reserve()
    for kind in ("registry", "http", "connect"):
        for _ in range(50):
            with contextlib.suppress(QuotaExceeded):
                if kind != "registry":
                    book.reserve()
                book.record(replace(ENTRY, kind=kind))
    with pytest.raises(QuotaExceeded, match="the ledger is full"):
        book.reserve()
    book.record(replace(ENTRY, host="last.example.org", path="/" + "\\" * 600))
    book.close()
    data = path.read_bytes()
    assert b"last.example.org" in data.splitlines()[-2]
    assert len(data.splitlines(keepends=True)[-1]) + 4 * LINE_BYTES >= len(data)
    assert read(data).end is not None


def test_several_threads_make_one_chain(path: Path) -> None:
    book = Ledger(path)

    def record() -> None:
        for _ in range(100):
            book.record(ENTRY)

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book.close()
    assert read(path.read_bytes()).end == End(recorded=800, unrecorded=0)


class _FullFile(io.FileIO):
    """A file on a file system with room for a few bytes more."""

    room = 50

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "full")
        size = super().write(data[: self.room])
        self.room -= size
        return size


def test_a_full_disk_is_an_error_and_leaves_no_half_line(path: Path) -> None:
    book = Ledger(path)
    book.record(ENTRY)
    before = path.read_bytes()
    sound = book._file
    with _FullFile(path, "ab") as book._file, pytest.raises(DiskExceeded):
        book.record(ENTRY)
    assert path.read_bytes() == before
    book._file = sound
    book.record(ENTRY)
    book.close()
    assert read(path.read_bytes()).end == End(recorded=2, unrecorded=0)


# -- tampering, and a kill ---------------------------------------------------------------------


def three(path: Path, *, closed: bool = True) -> list[bytes]:
    entries = [replace(ENTRY, path=f"/{number}") for number in range(3)]
    return written(path, *entries, closed=closed).splitlines(keepends=True)


@pytest.mark.parametrize("torn_at", [1, 50, -1])
def test_a_line_torn_by_a_kill_is_not_tampering(path: Path, torn_at: int) -> None:
    lines = three(path, closed=False)
    chain = read(b"".join(lines[:2]) + lines[2][:torn_at])
    assert (chain.recorded, chain.end, chain.torn) == (2, None, True)


def test_a_ledger_without_its_last_line_is_of_a_killed_session(path: Path) -> None:
    chain = read(b"".join(three(path, closed=False)))
    assert (chain.recorded, chain.end, chain.torn) == (3, None, False)


def test_what_was_cut_off_shows_in_the_head(path: Path) -> None:
    lines = three(path)
    head = read(b"".join(lines)).head
    with pytest.raises(CheckFailed, match="the build's result says"):
        read(b"".join(lines[:2])).require(head)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda lines: [lines[0].replace(b"/0", b"/x"), *lines[1:]],
        lambda lines: [*lines[:2], lines[2].replace(b"allowed", b"denied"), lines[3]],
        lambda lines: [*lines[:3], lines[3].replace(b'"recorded":3', b'"recorded":2')],
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0], *lines],
        lambda lines: [*lines, lines[3]],
        lambda lines: [*lines, b"{"],
        lambda lines: [lines[0][:-10] + b"\n", *lines[1:]],
        lambda lines: [lines[0], b"\n", *lines[1:]],
        lambda lines: [lines[0], b"x" * 9999, *lines[1:]],
        lambda lines: [*lines[:3], b"[" * 4000 + b"\n"],
        lambda lines: [*lines[:3], b'{"previous":"sha256:","time":1}\n'],
    ],
)  # fmt: skip
def test_whatever_is_changed_breaks_the_chain(path: Path, tamper: object) -> None:
    assert callable(tamper)
    with pytest.raises(CheckFailed, match="tampered"):
        read(b"".join(tamper(three(path))))


@given(st.data())
def test_no_byte_can_be_changed_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = three(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    whole = b"".join(lines)
    head = read(whole).head
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    with pytest.raises(CheckFailed):
        read(whole[:at] + bytes([byte]) + whole[at + 1 :]).require(head)


# -- what stands in it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target", "recorded"),
    [
        ("http", "/simple/x/", "/simple/x/"),
        ("http", "/x?token=secret", "/x"),
        ("http", "/x?digest=sha256:" + "a" * 64, "/x"),
        ("http", "/x#secret", "/x"),
        ("http", "http://me:secret@files.example.org/x?y=secret", ""),
        ("http", "me:secret@files.example.org/", ""),
        ("http", "ftp:secret@files.example.org/", ""),
        ("http", "", ""),
        ("connect", "me:secret@files.example.org:443", ""),
        ("registry", "/v2/a/blobs/uploads/", "/v2/a/blobs/uploads/"),
        ("registry", "/v2/a/tags/list?n=5&last=1.2&secret=1", "/v2/a/tags/list?n=5&last=1.2"),
        ("registry", "/v2/a?digest=sha256%3A" + "a" * 64, "/v2/a?digest=sha256%3A" + "a" * 64),
        ("registry", "/v2/a?mount=sha256:" + "a" * 64 + "&from=b%2Fc",
         "/v2/a?mount=sha256:" + "a" * 64 + "&from=b%2Fc"),
        ("registry", "/v2/a?digest=secret", "/v2/a"),
        ("registry", "//me:secret@files.example.org/x", "/x"),
        ("registry", "///me:secret@files.example.org", ""),
        ("registry", "/v2/https://me:secret@files.example.org/x", "/v2/https:/x"),
    ],
)  # fmt: skip
def test_no_secret_of_a_target_is_recorded(kind: Kind, target: str, recorded: str) -> None:
    assert bounded(replace(ENTRY, kind=kind, path=target)).path == recorded


def test_user_info_of_a_host_is_not_recorded() -> None:
    assert bounded(replace(ENTRY, host="me:secret@files.example.org")).host == "files.example.org"


_TEXT = st.text(max_size=600) | st.text(alphabet='"\\\x1b\u202e\U0001f600', min_size=500)


@given(_TEXT, _TEXT, _TEXT, _TEXT, st.integers(), st.sampled_from(["http", "registry", "connect"]))
def test_whatever_is_asked_makes_one_short_printable_line(
    tmp_path_factory: pytest.TempPathFactory,
    method: str, host: str, path: str, rule: str, port: int, kind: Kind,
) -> None:  # fmt: skip
    entry = replace(
        ENTRY, kind=kind, method=method, host=host, path=path, rule=rule, port=port,
        sent_bytes=1 << 63, received_bytes=1 << 63,
    )  # fmt: skip
    data = written(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", entry)
    lines = data.splitlines(keepends=True)
    assert len(lines) == 2
    assert len(lines[0]) < LINE_BYTES
    assert re.fullmatch(rb"[\x20-\x7e]*\n", lines[0])
    assert read(data).recorded == 1


# -- what a session records --------------------------------------------------------------------


def entries(gate: Gate) -> list[Entry]:
    gate.session.close()
    with (gate.home / "ledger.jsonl").open("rb") as stream:
        chain = Chain()
        found = [record.entry for record in chain.records(stream)]
    chain.require(gate.session.ledger_head)
    return found


def test_a_pull_is_recorded_under_the_name_of_its_registry(gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    answer = gate.ask("GET", f"/v2/{gate.session.aliases['r.example']}/base/manifests/1")
    (entry,) = entries(gate)
    assert (entry.host, entry.path) == ("r.example", "/v2/base/manifests/1")
    assert (entry.decision, entry.rule, entry.status) == ("allowed", "base_images", 200)
    assert entry.digest == Digest.of(answer.body)
    assert entry.received_bytes == len(answer.body)


def test_a_registrys_port_is_told_apart(gates: Gates) -> None:
    gate = gates.open(hosts=("r.example:5000",))
    gate.ask("GET", f"/v2/{gate.session.aliases['r.example:5000']}/base/manifests/1")
    (entry,) = entries(gate)
    assert (entry.host, entry.port, entry.decision) == ("r.example", 5000, "denied")


def test_what_policy_forbids_is_told_from_what_is_missing(gate: Gate) -> None:
    alias = gate.session.aliases["r.example"]
    gate.session.decide(decision(base_images=(("r.example/base",),)))
    gate.ask("GET", f"/v2/{alias}/base/manifests/1")
    gate.ask("HEAD", f"/v2/{alias}/other/manifests/1")
    gate.ask("GET", "/v2/elsewhere.example/base/manifests/1")
    gate.ask("GET", f"/v2/staged/image/blobs/{Digest.of(b'x')}")
    gate.ask("GET", "/v2/", headers={"Authorization": "Basic guessed"})
    found = [(entry.decision, entry.rule, entry.status) for entry in entries(gate)]
    assert found == [
        ("allowed", "base_images", 404),
        ("denied", "base_images", 404),
        ("denied", "", 404),
        ("allowed", "staged", 404),
        ("denied", "token", 401),
    ]


def test_a_push_is_recorded_with_its_digest_and_bytes(gate: Gate) -> None:
    digest = gate.push(b"pushed")
    (entry,) = entries(gate)
    assert (entry.host, entry.rule, entry.digest) == ("", "staged", digest)
    assert (entry.sent_bytes, entry.received_bytes) == (6, 0)
    assert entry.path.endswith(f"/uploads/?digest={digest}")


def test_no_line_has_the_sessions_token(gate: Gate) -> None:
    gate.ask("GET", f"/v2/?token={gate.session.token}")
    gate.session.close()
    text = (gate.home / "ledger.jsonl").read_text(encoding="ascii")
    assert gate.session.token not in text
    assert json.loads(text.splitlines()[0])["path"] == "/v2/"
