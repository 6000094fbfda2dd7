import errno
import functools
import hashlib
import os
import re
import socket
import stat
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.model import Limits
from runner.context import BuildContext, snapshot
from runner.context.names import shown
from runner.errors import (
    ContextInvalid,
    ContextTooLarge,
    DiskExceeded,
    DockerfileMissing,
    StateUnusable,
)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    directory = tmp_path / "context"
    directory.mkdir()
    (directory / "Dockerfile").write_text("FROM scratch\n")
    return directory


def take(context: Path, dockerfile: str | None = None, /, **limits: int) -> BuildContext:
    into = context.parent / "snapshot.tar"
    into.unlink(missing_ok=True)
    return snapshot(context, dockerfile=dockerfile, limits=Limits(**limits), into=into)


def entries(taken: BuildContext) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(taken.tar) as tar:
        return {member.name: member for member in tar}


def content(taken: BuildContext, name: str) -> bytes:
    with tarfile.open(taken.tar) as tar:
        stream = tar.extractfile(name)
        assert stream is not None
        return stream.read()


def refused(
    context: Path, error: type[Exception], pattern: str, dockerfile: str | None = None
) -> None:
    with pytest.raises(error, match=pattern):
        take(context, dockerfile)
    assert not (context.parent / "snapshot.tar").exists()


def too_large(context: Path, pattern: str, **limits: int) -> None:
    with pytest.raises(ContextTooLarge, match=pattern):
        take(context, **limits)
    assert not (context.parent / "snapshot.tar").exists()


def test_the_digest_is_that_of_the_tar_and_only_the_owner_may_read_it(context: Path) -> None:
    (context / "big").write_bytes(b"0123456789" * 300_000)
    taken = take(context)
    assert taken.digest.hex == hashlib.sha256(taken.tar.read_bytes()).hexdigest()
    assert stat.S_IMODE(taken.tar.stat().st_mode) == 0o600
    assert content(taken, "big") == b"0123456789" * 300_000
    assert (taken.facts.bytes, taken.facts.entries) == (3_000_013, 2)


def test_the_same_directory_gives_the_same_digest_whatever_the_order_of_creation(
    tmp_path: Path,
) -> None:
    digests: set[str] = set()
    for names in (["a", "b", "Dockerfile"], ["Dockerfile", "b", "a"]):
        directory = tmp_path / "".join(names)
        directory.mkdir()
        for name in names:
            (directory / name).write_text(name)
            os.utime(directory / name, ns=(0, 5_000_000_000 + len(digests)))
        digests.add(take(directory).digest)
        (tmp_path / "snapshot.tar").unlink()
    assert len(digests) == 1


def test_what_the_build_sees_is_kept_and_what_it_does_not_see_is_not(context: Path) -> None:
    file = context / "setuid"
    file.write_text("x")
    file.chmod(0o4751)
    os.utime(file, ns=(0, -1_500_000_000))
    (context / "hard").hardlink_to(file)
    (context / "empty").mkdir(mode=0o700)
    found = entries(take(context))
    assert {m.uid for m in found.values()} | {m.gid for m in found.values()} == {0}
    assert {m.uname for m in found.values()} | {m.gname for m in found.values()} == {""}
    assert (found["setuid"].mode, found["setuid"].mtime) == (0o4751, -2)
    assert found["hard"].isreg()
    assert found["empty"].isdir()
    assert found["empty"].mode == 0o700


def test_entries_come_in_the_order_of_their_bytes_parents_first(context: Path) -> None:
    for name in ("b", "a", "a-b", "Z", "\u00e9"):
        (context / name).mkdir()
    (context / "a" / "x").touch()
    assert list(entries(take(context))) == ["Dockerfile", "Z", "a", "a/x", "a-b", "b", "\u00e9"]


def test_names_of_any_bytes_and_length_survive(context: Path) -> None:
    odd = os.fsdecode(b"\xff\n\x1b[2J")
    (context / odd).write_text("odd")
    (context / ("d" * 200)).mkdir()
    (context / ("d" * 200) / ("f" * 200)).write_text("long")
    (context / "link").symlink_to("t" * 300)
    taken = take(context)
    found = entries(taken)
    assert content(taken, odd) == b"odd"
    assert "d" * 200 + "/" + "f" * 200 in found
    assert found["link"].linkname == "t" * 300


def test_links_are_kept_verbatim_and_those_that_leave_are_named(context: Path) -> None:
    (context / "sub").mkdir()
    targets = {
        "inside": "./sub/../Dockerfile",
        "absolute": "/etc/passwd",
        "up": "../x",
        "sub/fine": "../Dockerfile",
        "sub/bad\x1b": "../sub/../../x",
        "dangling": "nowhere",
    }
    for name, target in targets.items():
        (context / name).symlink_to(target)
    taken = take(context)
    assert {n: m.linkname for n, m in entries(taken).items() if m.issym()} == targets
    assert taken.facts.links_leaving == ("absolute", "sub/bad\\x1b", "up")


def test_the_list_of_leaving_links_is_bounded(context: Path) -> None:
    for index in range(1001):
        (context / f"l{index}").symlink_to("/")
    assert take(context).facts.links_leaving is None  # and so unknown, never known to be few


def test_sockets_fifos_and_devices_are_left_out_with_a_warning(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(context)
    os.mkfifo("fifo\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        taken = take(context)
    assert list(entries(taken)) == ["Dockerfile"]
    assert taken.warnings == (
        "fifo\\n was left out: it is a FIFO",
        "socket was left out: it is a socket",
    )


def test_the_warnings_are_bounded(context: Path) -> None:
    for index in range(25):
        os.mkfifo(context / f"fifo{index}")
    warnings = take(context).warnings
    assert len(warnings) == 21
    assert warnings[-1] == "and 5 more were left out"


def test_the_ignore_file_is_honoured_and_sent(context: Path) -> None:
    (context / ".dockerignore").write_text("*.log\ndir\n!dir/deep/keep\n!none/x\nnone")
    (context / "a.log").touch()
    (context / "dir" / "deep").mkdir(parents=True)
    (context / "dir" / "deep" / "keep").touch()
    (context / "dir" / "deep" / "other").touch()
    (context / "dir" / "empty").mkdir()
    (context / "none").mkdir()
    names = list(entries(take(context)))
    assert names == [".dockerignore", "Dockerfile", "dir", "dir/deep", "dir/deep/keep"]


def test_an_excluded_directory_that_exceptions_search_in_vain_is_not_sent(context: Path) -> None:
    (context / ".dockerignore").write_text("dir\n!dir/x\n.dockerignore")
    (context / "dir").mkdir()
    (context / "z").touch()
    assert list(entries(take(context))) == ["Dockerfile", "z"]


def test_the_dockerfile_is_sent_although_it_is_ignored(context: Path) -> None:
    (context / ".dockerignore").write_text("*")
    (context / "build").mkdir()
    (context / "build" / "My.Dockerfile").write_text("FROM x")
    (context / "build" / "other").touch()
    taken = take(context, "build/My.Dockerfile")
    assert list(entries(taken)) == ["build", "build/My.Dockerfile"]
    assert (taken.dockerfile, taken.dockerfile_bytes) == ("build/My.Dockerfile", b"FROM x")


def test_the_ignore_file_of_the_dockerfile_takes_precedence(context: Path) -> None:
    (context / ".dockerignore").write_text("b")
    (context / "Dockerfile.dockerignore").write_text("a")
    (context / "a").touch()
    (context / "b").touch()
    assert {"a", "b"} & set(entries(take(context))) == {"b"}


def test_a_containerfile_serves_where_there_is_no_dockerfile(context: Path) -> None:
    (context / "Dockerfile").rename(context / "Containerfile")
    assert take(context).dockerfile == "Containerfile"


@pytest.mark.parametrize("via_link", [False, True])
def test_the_dockerfile_may_be_named_absolutely_and_the_context_may_be_a_link(
    context: Path, *, via_link: bool
) -> None:
    link = context.parent / "link"
    link.symlink_to(context)
    base = link if via_link else context
    assert take(link, str(base / "." / "Dockerfile")).dockerfile == "Dockerfile"


@pytest.mark.parametrize(
    ("dockerfile", "error", "pattern"),
    [
        ("missing", DockerfileMissing, "no file missing"),
        ("no/such", DockerfileMissing, "no file no/such"),
        ("../context/Dockerfile", ContextInvalid, "does not lie inside"),
        ("/etc/passwd", ContextInvalid, "does not lie inside"),
        ("", ContextInvalid, "does not lie inside"),
        ("a\0b", ContextInvalid, "does not lie inside"),
        ("link", ContextInvalid, "link is a symbolic link"),
        ("linked/Dockerfile", ContextInvalid, "linked is a symbolic link"),
        ("dir", ContextInvalid, "dir is a directory"),
        ("Dockerfile/x", ContextInvalid, "Dockerfile is a file"),
        ("fifo", ContextInvalid, "fifo is a FIFO"),
        ("n" * 300, ContextInvalid, "cannot be read: File name too long"),
    ],
)
def test_a_dockerfile_that_is_no_file_of_the_context_is_refused(
    context: Path, dockerfile: str, error: type[Exception], pattern: str
) -> None:
    (context / "dir").mkdir()
    (context / "link").symlink_to("Dockerfile")
    (context / "linked").symlink_to("dir")
    (context / "dir" / "Dockerfile").touch()
    os.mkfifo(context / "fifo")
    refused(context, error, pattern, dockerfile)


def test_a_context_without_a_dockerfile_says_so(context: Path) -> None:
    (context / "Dockerfile").unlink()
    refused(context, DockerfileMissing, "neither a Dockerfile nor a Containerfile")


def test_an_ignore_file_that_is_a_link_is_refused(context: Path) -> None:
    (context / ".dockerignore").symlink_to("/etc/passwd")
    refused(context, ContextInvalid, ".dockerignore is a symbolic link")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.touch(), "is a file, not a directory"),
        (os.mkfifo, "is a FIFO, not a directory"),
        (lambda path: path.symlink_to("/dev/null"), "is a device, not a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_a_context_that_is_no_directory_is_told_what_it_is(
    tmp_path: Path, make: Callable[[Path], Any], pattern: str
) -> None:
    path = tmp_path / "context"
    make(path)
    refused(path, ContextInvalid, pattern)


def test_a_context_path_with_a_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextInvalid, match="not a path"):
        snapshot(Path("a\0b"), dockerfile=None, limits=Limits(), into=tmp_path / "tar")


def test_a_context_that_is_closed_to_us_is_told_apart(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_open(monkeypatch, context.name, errno.EACCES)
    refused(context, ContextInvalid, "permission denied")


@pytest.mark.parametrize(
    ("limits", "pattern"),
    [
        ({"context_bytes": 1012}, "more than 1012 bytes; sub/big, 1000 bytes, goes over"),
        ({"context_entries": 2}, "more than 2 entries; sub/big goes over"),
        ({"path_bytes": 9}, "has 10 bytes, more than 9: Dockerfile"),
    ],
)
def test_each_limit_names_itself_and_the_path(
    context: Path, limits: dict[str, int], pattern: str
) -> None:
    (context / "sub").mkdir()
    (context / "sub" / "big").write_bytes(bytes(1000))
    too_large(context, re.escape(pattern), **limits)
    take(context, context_bytes=1013, context_entries=3, path_bytes=10)


def test_names_that_are_ignored_are_bounded_too(context: Path) -> None:
    (context / ".dockerignore").write_text("f*")
    for index in range(30):
        (context / f"f{index}").touch()
    too_large(context, "more than 20 names", context_entries=2)


def test_directories_are_not_followed_without_end(context: Path) -> None:
    deepest = context.joinpath(*["d"] * 256)
    deepest.mkdir(parents=True)
    take(context)
    (deepest / "d").mkdir()
    refused(context, ContextTooLarge, "deeper than 256")


def test_a_dockerfile_over_a_mebibyte_is_refused(context: Path) -> None:
    (context / "Dockerfile").write_bytes(b"#" * (1 << 20))
    assert len(take(context).dockerfile_bytes) == 1 << 20
    (context / "Dockerfile").write_bytes(b"#" * ((1 << 20) + 1))
    refused(context, ContextTooLarge, "a Dockerfile may have 1048576")


def fail_open(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    real = os.open

    def fake(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.basename(os.fspath(path)) == name:  # noqa: PTH119 - may be str or Path
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake)


def before_open(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[], Any]) -> None:
    """Runs ``change`` between the listing of ``name`` and its opening."""
    real = os.open

    def fake(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == name:
            change()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake)


@pytest.mark.parametrize("name", ["file", "dir"])
def test_an_unreadable_entry_is_named_with_a_mend(
    context: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (context / "file").touch()
    (context / "dir").mkdir()
    fail_open(monkeypatch, name, errno.EACCES)
    with pytest.raises(ContextInvalid, match=f"{name} in the context cannot be read") as caught:
        take(context)
    assert "permissions" in caught.value.advice
    assert ".dockerignore" in caught.value.advice


def test_a_swap_for_a_link_is_never_followed(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = context.parent / "secret"
    secret.mkdir()
    (context / "file").touch()
    (context / "dir").mkdir()

    def swap(name: str) -> None:
        entry = context / name
        entry.rename(context.parent / f"{name}.moved")
        entry.symlink_to(secret)

    for name in ("dir", "file"):
        with monkeypatch.context() as patch:
            before_open(patch, name, functools.partial(swap, name))
            refused(context, ContextInvalid, f"{name} changed while it was read")
        (context / name).unlink()


def test_a_swap_for_another_file_or_a_fifo_or_nothing_is_noticed(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = context / "file"
    other = context.parent / "other"

    def fifo() -> None:
        file.unlink()
        os.mkfifo(file)

    for change in (lambda: other.replace(file), fifo, file.unlink):
        file.unlink(missing_ok=True)
        file.touch()
        other.touch()
        with monkeypatch.context() as patch:
            before_open(patch, "file", change)
            refused(context, ContextInvalid, "file changed while it was read")


@pytest.mark.parametrize("size", [0, 5, 15])
def test_a_file_that_changes_while_it_is_read_ends_the_snapshot(
    context: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    file = context / "file"
    file.write_bytes(bytes(10))
    before_open(monkeypatch, "file", lambda: os.truncate(file, size))
    refused(context, ContextInvalid, "file changed while it was read")


def test_a_rewrite_of_equal_length_is_noticed(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = context / "file"
    file.write_bytes(bytes(10))
    before_open(monkeypatch, "file", lambda: os.utime(file, ns=(1, 1)))
    refused(context, ContextInvalid, "file changed while it was read")


def test_a_dockerfile_that_vanishes_is_noticed(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", lambda fd: [])
    refused(context, ContextInvalid, "Dockerfile changed while it was read")


def test_an_existing_file_is_never_written_over(context: Path) -> None:
    into = context.parent / "taken"
    into.write_text("mine")
    with pytest.raises(StateUnusable, match="File exists"):
        snapshot(context, dockerfile=None, limits=Limits(), into=into)
    assert into.read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, DiskExceeded), (errno.EIO, StateUnusable)]
)
def test_a_disk_that_fails_is_told_from_a_context_that_does(
    context: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def fail(fd: int, data: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    refused(context, error, os.strerror(number))


def test_no_descriptor_is_left_open(context: Path) -> None:
    (context / "dir").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    take(context)
    too_large(context, "entries", context_entries=1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_small_files_take_little_time(context: Path) -> None:
    for index in range(2000):
        (context / f"f{index}").touch()
    start = time.process_time()
    take(context)
    assert time.process_time() - start < 1  # ten times what it takes


@given(st.text(max_size=300))
def test_a_shown_name_is_printable_and_short(name: str) -> None:
    assert shown(name).isprintable()
    assert len(shown(name)) <= 2000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.sets(st.binary(min_size=1, max_size=20).filter(lambda b: not {0, 47} & {*b}), max_size=5))
def test_every_file_name_comes_back_from_the_tar(
    tmp_path_factory: pytest.TempPathFactory, names: set[bytes]
) -> None:
    directory = tmp_path_factory.mktemp("any") / "context"
    directory.mkdir()
    wanted = {os.fsdecode(n) for n in names - {b".", b"..", b".dockerignore"}} | {"Dockerfile"}
    for name in wanted:
        (directory / name).touch()
    assert set(entries(take(directory))) == wanted
