import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reference import Digest
from runner.errors import DiskExceeded
from runner.stores.blobs import BlobStore, read_all


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


def test_a_blob_is_there_under_its_digest_once_it_is_whole(store: BlobStore) -> None:
    with store.arriving() as writer:
        writer.write(b"ab")
        assert store.size(Digest.of(b"ab")) is None
        writer.write(memoryview(b"c"))
        assert writer.size == 3
        digest = writer.commit()
    assert digest == Digest.of(b"abc")
    assert store.size(digest) == 3
    assert read_all(store, digest, 3) == b"abc"
    assert store.path(digest).stat().st_mode & 0o777 == 0o444


def test_another_algorithm_has_its_own_directory(store: BlobStore) -> None:
    with store.arriving("sha512") as writer:
        writer.write(b"x")
        digest = writer.commit()
    assert digest.hex == hashlib.sha512(b"x").hexdigest()
    assert store.path(digest).parent.name == "sha512"


def test_what_was_not_committed_is_gone(store: BlobStore) -> None:
    with store.arriving() as writer:
        writer.write(b"x")
    assert [path for path in store.directory.rglob("*") if path.is_file()] == []


def test_a_blob_that_is_not_there_has_no_size(store: BlobStore) -> None:
    digest = Digest.of(b"absent")
    assert store.size(digest) is None
    with pytest.raises(FileNotFoundError):
        store.open(digest)


def test_a_blob_longer_than_allowed_is_not_read(store: BlobStore) -> None:
    digest = store.add(b"four")
    with pytest.raises(ValueError, match="longer than 3"):
        read_all(store, digest, 3)


def test_the_same_bytes_may_arrive_twice(store: BlobStore) -> None:
    assert store.add(b"x") == store.add(b"x")


@given(pieces=st.lists(st.binary(max_size=64), max_size=6))
def test_the_digest_does_not_depend_on_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    with store.arriving() as writer:
        for piece in pieces:
            writer.write(piece)
        assert writer.commit() == Digest.of(b"".join(pieces))


def test_a_full_disk_is_a_limit_and_leaves_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskExceeded):
        store.add(b"x")
    assert [path for path in store.directory.rglob("*") if path.is_file()] == []


def test_collecting_spares_what_is_still_arriving(store: BlobStore) -> None:
    left = store.directory / "arriving" / "left"
    left.touch()
    with store.arriving() as writer:
        assert store.collect() == [left]
        writer.write(b"x")
        assert store.size(writer.commit()) == 1


def test_eviction_takes_what_was_read_longest_ago(store: BlobStore) -> None:
    old, new = store.add(b"old"), store.add(b"new")
    os.utime(store.path(old), (1, 1))
    assert store.evict(6) == []
    assert store.evict(5) == [store.path(old)]
    assert store.size(new) == 3
