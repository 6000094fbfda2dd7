"""The header reader agrees with Python's tarfile on sound archives and refuses the rest."""

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import VerificationFailed
from runner.layers import BLOCK, Entry, HeaderReader, Special
from tests.support.images import HELLO_TAR, entry, tar_of

END = bytes(2 * BLOCK)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read(tar: bytes, *, piece: int = 1 << 20, most_entries: int = 100) -> list[Entry]:
    seen: list[Entry] = []
    reader = HeaderReader(most_entries=most_entries, path_bytes=1000, seen=seen.append)
    for start in range(0, len(tar), piece):
        reader.feed(tar[start : start + piece])
    reader.finish()
    assert reader.entries >= len(seen)
    return seen


def broken_rule(tar: bytes) -> str:
    with pytest.raises(VerificationFailed) as caught:
        read(tar)
    return caught.value.rule


def header(name: str = "file", kind: bytes = b"0", size: int = 0, link: str = "") -> bytes:
    info = entry(name, kind, link)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def changed(block: bytes, position: int, value: bytes) -> bytes:
    """The header with other bytes at ``position``, its checksum right."""
    block = block[:position] + value + block[position + len(value) :]
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def extended(kind: bytes, payload: bytes) -> bytes:
    return header("././@Long", kind, len(payload)) + payload + bytes(-len(payload) % BLOCK)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    payload = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        payload += b"%d %s=%s\n" % (length, key, value)
    return extended(kind, payload)


def as_tarfile_sees_it(tar: bytes) -> list[Entry]:
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        return [
            Entry(
                member.name.encode(errors="surrogateescape"),
                member.type,
                member.size,
                member.linkname.encode(errors="surrogateescape"),
            )
            for member in archive
        ]


names = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
    .map(lambda text: text[:120])
    .filter(lambda text: text != ".." and not text.startswith(".wh.")),
    min_size=1,
    max_size=5,
).map("/".join)
members = st.lists(
    st.one_of(
        st.tuples(names, st.binary(max_size=1500)),
        st.builds(entry, names, st.just(tarfile.DIRTYPE)),
        st.builds(entry, names, st.just(tarfile.LNKTYPE), names),
        st.builds(entry, names, st.just(tarfile.SYMTYPE), names.map("../../".__add__)),
        st.builds(entry, names, st.sampled_from([tarfile.CHRTYPE, tarfile.FIFOTYPE])),
    ),
    max_size=5,
)


@given(members=members, tar_format=st.sampled_from(FORMATS[1:]), piece=st.integers(1, 2000))
def test_it_sees_what_tarfile_sees_whatever_the_chunks(
    members: list[tarfile.TarInfo | tuple[str, bytes]], tar_format: int, piece: int
) -> None:
    tar = tar_of(*members, tar_format=tar_format)
    seen = read(tar, piece=piece)
    # tarfile drops a directory's last slash from its name.
    assert [(e.name.rstrip(b"/"), e.kind, e.size, e.link) for e in seen] == [
        (e.name, e.kind, e.size, e.link) for e in as_tarfile_sees_it(tar)
    ]


@given(position=st.integers(0, len(HELLO_TAR) - 1), value=st.integers(0, 255))
def test_what_passes_after_a_mutation_is_read_by_tarfile_alike(position: int, value: int) -> None:
    tar = HELLO_TAR[:position] + bytes([value]) + HELLO_TAR[position + 1 :]
    try:
        seen = read(tar)
    except VerificationFailed:
        return
    assert len(seen) == len(as_tarfile_sees_it(tar))


@given(
    position=st.integers(0, 147) | st.integers(156, 511),
    value=st.binary(min_size=1, max_size=4) | st.text("01234567 \0/.x", min_size=1).map(str.encode),
    tar_format=st.sampled_from(FORMATS),
)
def test_a_spoiled_header_with_its_checksum_right_is_refused_or_read_alike(
    position: int, value: bytes, tar_format: int
) -> None:
    tar = tar_of(("a/file", b"x" * 700), ("b", b""), tar_format=tar_format)
    tar = changed(tar[:BLOCK], position, value[: BLOCK - position]) + tar[BLOCK:]
    try:
        seen = read(tar)
    except VerificationFailed:
        return
    theirs = as_tarfile_sees_it(tar)
    assert [(e.name.rstrip(b"/"), e.size) for e in seen] == [
        (e.name.rstrip(b"/"), e.size) for e in theirs
    ]


@given(data=st.binary(max_size=2000))
def test_random_bytes_raise_nothing_but_verification_failed(data: bytes) -> None:
    try:
        read(data)
    except VerificationFailed:
        return
    assert not any(data)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_names_are_read_in_every_format(tar_format: int) -> None:
    name = "a" * 60 + "/" + "b" * 60  # USTAR needs its prefix
    (seen,) = read(tar_of((name, b"x" * 600), tar_format=tar_format))
    assert (seen.name, seen.size) == (name.encode(), 600)


SOUND: list[tuple[str, bytes, int]] = [
    ("an empty archive", END, 0),
    ("nothing at all", b"", 0),
    ("no end blocks", header(), 1),
    ("one end block", header() + bytes(BLOCK), 1),
    ("padding to a large record", header() + bytes(1 << 20), 1),
    ("padding that is no whole block", header() + END + bytes(100), 1),
    ("a global comment", pax((b"comment", b"c0ffee"), kind=b"g") + header() + END, 1),
    ("an extended attribute", pax((b"SCHILY.xattr.user.a", b"\0\n=")) + header() + END, 1),
    ("a binary size", changed(header(), 124, b"\x80" + bytes(9) + b"\2\0") + bytes(512) + END, 1),
    ("a size that PAX repeats", pax((b"size", b"3")) + header(size=3) + bytes(512) + END, 1),
    ("a long link and a long name", extended(b"L", b"a\0") + extended(b"K", b"b\0") + header(), 1),
    ("a time before 1970", changed(header(), 136, b"\xff" * 12) + END, 1),
    ("symlinks to anywhere", header("a", b"2", link="/etc/passwd") + END, 1),
    ("names with dots", header("..a/b../...") + header(".") + header("./") + END, 3),
    ("whiteouts", header("a/.wh.b") + header(".wh..wh..opq") + header(".wh...c") + END, 3),
]


@pytest.mark.parametrize(("tar", "count"), [row[1:] for row in SOUND], ids=[r[0] for r in SOUND])
def test_what_real_tools_write_passes(tar: bytes, count: int) -> None:
    assert len(read(tar)) == count


def test_a_size_beyond_octal_is_read_from_pax() -> None:
    seen: list[Entry] = []
    reader = HeaderReader(most_entries=1, path_bytes=100, seen=seen.append)
    reader.feed(pax((b"size", b"8589934592")) + header())
    assert seen[0].size == 8 << 30
    with pytest.raises(VerificationFailed):
        reader.finish()


BROKEN: list[tuple[str, str, bytes]] = [
    ("tar-header", "a wrong checksum", b"x" + header()[1:] + END),
    ("tar-header", "a checksum that is no number", header()[:148] + b"zzzzzzzz" + header()[156:]),
    ("tar-header", "no magic", changed(header(), 257, bytes(8)) + END),
    ("tar-header", "star's trailer", changed(entry("a").tobuf(), 508, b"tar\0") + END),
    ("tar-header", "a prefix that only some readers take", changed(header(), 345, b"up/") + END),
    ("tar-header", "GNU's times", changed(header(), 345, b"01234567012\0") + END),
    ("tar-header", "a sparse map", changed(header(), 386, b"1") + END),
    ("tar-header", "a size that is no number", changed(header(), 124, b"0o17") + END),
    ("tar-header", "a size with something behind", changed(header(), 124, b"17\x003") + END),
    ("tar-header", "an owner that is no number", changed(header(), 108, b"root") + END),
    ("tar-header", "a negative size", changed(header(), 124, b"\xff" * 12) + END),
    ("tar-header", "a lone zero block", bytes(BLOCK) + header() + END),
    ("tar-header", "two long names", extended(b"L", b"a\0") * 2 + header() + END),
    ("tar-header", "two PAX headers", pax((b"path", b"a")) * 2 + header() + END),
    ("tar-header", "names of two kinds", extended(b"L", b"a\0") + pax((b"path", b"b")) + header()),
    ("tar-header", "a zero byte in a name", extended(b"L", b"a\0b\0") + header() + END),
    ("tar-header", "an empty long name", extended(b"L", b"\0") + header() + END),
    ("tar-header", "a long name without content", header("a", b"L") + header() + END),
    ("tar-type", "a volume label", header("a", b"V") + END),
    ("tar-type", "a directory for some", header("a/", b"\0", 512) + bytes(512) + END),
    ("tar-type", "one by its short name", pax((b"path", b"a")) + header("a/", b"\0") + END),
    ("tar-size", "a directory with data", header("a", b"5", 512) + bytes(512) + END),
    ("tar-size", "a hard link with data", header("a", b"1", 512, "b") + bytes(512) + END),
    ("tar-size", "a link that PAX gives data", pax((b"size", b"8589934592")) + header("a", b"2")),
    ("tar-pax", "a record without length", extended(b"x", b"path=a\n") + header() + END),
    ("tar-pax", "a length too great", extended(b"x", b"99 path=a\n") + header() + END),
    ("tar-pax", "a length too small", extended(b"x", b"7 path=a\n") + header() + END),
    ("tar-pax", "a length with a sign", extended(b"x", b"+10 path=a\n") + header() + END),
    ("tar-pax", "no equals sign", extended(b"x", b"9 path a\n") + header() + END),
    ("tar-pax", "a repeated key", pax((b"path", b"a"), (b"path", b"b")) + header() + END),
    ("tar-pax", "an empty path", pax((b"path", b"")) + header() + END),
    ("tar-pax", "a zero byte in a path", pax((b"linkpath", b"a\0b")) + header() + END),
    ("tar-pax", "a size that is no number", pax((b"size", b"-1")) + header() + END),
    ("tar-pax", "a size of another digit", pax((b"size", "٣".encode())) + header() + END),
    ("tar-pax", "a size where the header has zero", pax((b"size", b"512")) + header() + END),
    ("tar-pax", "another size than the header's", pax((b"size", b"1024")) + header(size=512)),
    ("tar-pax", "a global path", pax((b"path", b"a"), kind=b"g") + header() + END),
    ("tar-pax", "a giant header", header("a", b"x", 2 << 20) + END),
    ("tar-sparse", "GNU sparse", header("a", b"S") + END),
    ("tar-sparse", "PAX sparse", pax((b"GNU.sparse.major", b"1")) + header() + END),
    ("tar-truncated", "half a header", header()[:100]),
    ("tar-truncated", "file data missing", header(size=10)),
    ("tar-truncated", "padding missing", header(size=10) + bytes(10)),
    ("tar-truncated", "half a long name", header("a", b"L", 20)),
    ("tar-truncated", "a long name of nothing", extended(b"L", b"a\0") + END),
    ("tar-truncated", "a long name, then the end", extended(b"K", b"a\0")),
    ("tar-truncated", "a PAX header of nothing", pax((b"path", b"a")) + END),
    ("tar-truncated", "a PAX header, then the end", pax((b"path", b"a"))),
    ("tar-trailing", "a second archive", header() + END + header() + END),
    ("entry-count", "too many entries", header() * 101 + END),
    ("entry-count", "too many global headers", pax((b"comment", b"a"), kind=b"g") * 101 + END),
    ("entry-path-length", "a long GNU name", extended(b"L", b"a" * 1001 + b"\0") + header() + END),
    ("entry-path-length", "a long PAX name", pax((b"path", b"a" * 1001)) + header() + END),
    ("entry-path-length", "a long PAX link", pax((b"linkpath", b"a" * 1001)) + header("a", b"2")),
    ("entry-escape", "an absolute name", header("/etc/passwd") + END),
    ("entry-escape", "no name", changed(header(), 0, bytes(100)) + END),
    ("entry-escape", "up", header("../a") + END),
    ("entry-escape", "up in the middle", header("a/../b") + END),
    ("entry-escape", "up at the end", header("a/..", b"5") + END),
    ("entry-escape", "up by PAX", pax((b"path", b"../a")) + header() + END),
    ("entry-escape", "up by a long name", extended(b"L", b"../a\0") + header() + END),
    ("entry-escape", "a whiteout of what is above", header("a/.wh...") + END),
    ("entry-escape", "a whiteout of nothing", header("a/.wh.") + END),
    ("hard-link-escape", "an absolute hard link", header("a", b"1", link="/etc/passwd") + END),
    ("hard-link-escape", "a hard link up", header("a", b"1", link="b/../../c") + END),
    ("hard-link-escape", "a hard link to nothing", header("a", b"1") + END),
]


@pytest.mark.parametrize(
    ("rule", "tar"), [(r[0], r[2]) for r in BROKEN], ids=[r[1] for r in BROKEN]
)
def test_what_readers_disagree_about_is_refused(rule: str, tar: bytes) -> None:
    assert broken_rule(tar) == rule


@pytest.mark.parametrize("write", [header, lambda: entry("file").tobuf()])
def test_the_rows_start_from_a_sound_header(write: Callable[[], bytes]) -> None:
    assert len(read(write() + END)) == 1


def test_messages_show_names_escaped() -> None:
    with pytest.raises(VerificationFailed) as caught:
        read(header("/\x1b[2J\n") + END)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("member", "special"),
    [
        (("file", b"data"), Special.NOTHING),
        (entry("link", tarfile.SYMTYPE, "/x"), Special.NOTHING),
        (entry("fifo", tarfile.FIFOTYPE), Special.NOTHING),
        (("etc/.wh.gone", b""), Special.NOTHING),
        (("etc/.wh..wh..opq", b""), Special.ATTRIBUTES),
        (entry("null", tarfile.CHRTYPE), Special.ATTRIBUTES),
        (entry("disk", tarfile.BLKTYPE), Special.ATTRIBUTES),
        ({"SCHILY.xattr.user.a": "1"}, Special.ATTRIBUTES),
        ({"LIBARCHIVE.xattr.user.a": "1"}, Special.ATTRIBUTES),
        ({"SCHILY.xattr.security.capability": "1"}, Special.SECURITY),
        ({"SCHILY.xattr.security.a": "1", "SCHILY.xattr.user.a": "1"}, Special.SECURITY),
        ({"comment": "SCHILY.xattr.security.capability"}, Special.NOTHING),
    ],
)
def test_the_most_special_thing_is_known_afterwards(
    member: tuple[str, bytes] | tarfile.TarInfo | dict[str, str], special: Special
) -> None:
    if isinstance(member, dict):
        records, member = member, entry("file")
        member.pax_headers = records
    reader = HeaderReader(most_entries=10, path_bytes=1000)
    reader.feed(tar_of(("before", b"x"), member, ("behind", b"x")))
    reader.finish()
    assert reader.special is special
