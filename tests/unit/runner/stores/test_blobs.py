import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reference import Digest
from runner.errors import DiskExceeded
from runner.stores.blobs import BlobStore, read_all, turn
from sandbox.locks import Lock


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


def test_a_blob_is_for_all_sandboxes_whatever_the_umask(store: BlobStore) -> None:
    umask = os.umask(0o077)
    try:
        digest = store.add(b"abc")
    finally:
        os.umask(umask)
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
    with pytest.raises(DiskExceeded), store.arriving() as writer:
        writer.sync()
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


def test_the_digest_can_be_of_another_kind_after_all(store: BlobStore) -> None:
    with store.arriving() as writer:
        writer.write(b"ab")
        writer.hash_with("sha512")
        writer.write(b"c")
        assert writer.digest == f"sha512:{hashlib.sha512(b'abc').hexdigest()}"
        writer.hash_with("sha256")
        assert writer.commit() == Digest.of(b"abc")


def test_a_linked_blob_does_not_need_its_source(store: BlobStore, tmp_path: Path) -> None:
    other = BlobStore(tmp_path / "other")
    digest = store.add(b"x")
    other.link(digest, store)
    other.link(digest, store)
    store.remove(digest)
    store.remove(digest)
    assert (store.size(digest), other.size(digest)) == (None, 1)
    with pytest.raises(FileNotFoundError):
        other.link(Digest.of(b"absent"), store)


# -- bounded, and shared -------------------------------------------------------------------------


def aged(store: BlobStore, *contents: bytes) -> list[Digest]:
    """Blobs that were used in this order, long ago."""
    digests = [store.add(data) for data in contents]
    for age, digest in enumerate(digests):
        os.utime(store.path(digest), (age, age))
    return digests


def test_what_is_held_survives_eviction_and_goes_with_the_next_one(store: BlobStore) -> None:
    (digest,) = aged(store, b"base")
    held = store.hold()
    assert held.take(digest)
    assert held.take(digest)
    assert store.evict(0) == []
    assert (held.size(digest), read_all(held, digest, 4)) == (4, b"base")
    held.release()
    held.release()
    assert store.evict(0) == [store.path(digest)]
    assert not held.take(digest)


def test_a_held_blob_stays_readable_though_the_store_lost_it(store: BlobStore) -> None:
    (digest,) = aged(store, b"base")
    held = store.hold()
    assert held.take(digest)
    store.remove(digest)
    assert read_all(held, digest, 4) == b"base"
    assert held.size(Digest.of(b"absent")) is None
    held.release()


def test_holding_is_using(store: BlobStore) -> None:
    first, second = aged(store, b"1", b"2")
    held = store.hold()
    assert held.take(first)
    held.release()
    assert store.evict(1) == [store.path(second)]


def test_what_is_known_of_a_blob_goes_with_it(store: BlobStore) -> None:
    (digest,) = aged(store, b"x")
    store.notes(digest).mkdir(parents=True)
    (store.notes(digest) / "delivered").touch()
    assert store.evict(0) == [store.path(digest)]
    assert not store.notes(digest).exists()


def test_what_a_killed_holder_held_can_be_evicted(store: BlobStore) -> None:
    (digest,) = aged(store, b"x")
    child = os.fork()
    if child == 0:
        held = store.hold()
        held.take(digest)
        os._exit(0)  # no farewell
    os.waitpid(child, 0)
    (left,) = (store.directory / "held").iterdir()
    assert store.evict(0) == [store.path(digest)]
    assert not left.exists()
    assert store.collect() == []


def test_one_evicts_at_a_time(store: BlobStore) -> None:
    aged(store, b"x")
    lock = Lock(store.directory / "evicting")
    assert store.evict(0) == []
    lock.release()
    assert len(store.evict(0)) == 1


# -- taking turns --------------------------------------------------------------------------------


def test_a_turn_is_taken_by_one_at_a_time(tmp_path: Path) -> None:
    inside, most = [], []

    def work() -> None:
        with turn(tmp_path / "turn", waiting=lambda: None, patience_seconds=60):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 2  # one who waits, and one who came when the file was just gone
    assert len(most) == 4


def test_nobody_waits_for_one_that_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    with turn(path, waiting=lambda: None, patience_seconds=60) as alive:
        os.utime(path, (1, 1))
        with turn(path, waiting=lambda: None, patience_seconds=60):
            assert path.exists()
        assert path.exists()
        alive()
        with (
            pytest.raises(InterruptedError),
            turn(path, waiting=stop_waiting, patience_seconds=60),
        ):
            pytest.fail("it is not our turn")
    assert not path.exists()


def stop_waiting() -> None:
    raise InterruptedError
