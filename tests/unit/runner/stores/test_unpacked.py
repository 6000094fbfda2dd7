"""What stands in the store is as it was written, or is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from policies.model import Limits
from policies.reference import Digest
from runner.errors import Cancelled, SandboxFailed
from runner.stores.blobs import Held
from runner.stores.unpacked import Checked, Identity, Unpacked, UnpackedStore
from tests.support.erofs import erofs
from tests.support.hosts import REPOSITORY

IDENTITY = Identity(image=Digest.of(b"image"), platform="linux/amd64", builder=Digest.of(b"b"))
OTHER = Identity(image=Digest.of(b"other"), platform="linux/amd64", builder=Digest.of(b"b"))


@pytest.fixture
def store(tmp_path: Path) -> UnpackedStore:
    (tmp_path / "store").mkdir()
    return UnpackedStore(tmp_path / "store")


@contextmanager
def holding(store: UnpackedStore) -> Iterator[Held]:
    held = store.hold()
    try:
        yield held
    finally:
        held.release()


CHECKED = Checked.under(Limits())


def add(
    store: UnpackedStore, identity: Identity = IDENTITY, data: bytes = b"a", name: str = "a:1"
) -> Unpacked:
    with holding(store) as held, store.arriving() as writer:
        writer.write(erofs(data))
        return store.add(identity, writer, held, name=name, attributes=False, checked=CHECKED)


def packed(store: UnpackedStore, unpacked: Unpacked) -> Path:
    return store._blobs.path(unpacked.packed)


def files(store: UnpackedStore) -> list[str]:
    """All but the empty directories."""
    directory = store._blobs.directory
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )


def test_an_image_is_found_by_all_that_it_is_named_by(store: UnpackedStore) -> None:
    made = add(store)
    with holding(store) as held:
        assert store.find(IDENTITY, held) == made
        assert held.path(made.packed).read_bytes() == erofs(b"a")
        for other in (
            OTHER,
            Identity(image=IDENTITY.image, platform="linux/arm64", builder=IDENTITY.builder),
            Identity(image=IDENTITY.image, platform="linux/amd64", builder=Digest.of(b"c")),
        ):
            assert store.find(other, held) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 1000,
        bytes(4096),
        erofs(b"a")[:-1],
        erofs(b"a") + b"x",
        erofs(b"a")[:1050],
        b"\x7fELF" + erofs(b"a"),
    ],
)
def test_what_is_no_erofs_image_does_not_come_in(data: bytes, store: UnpackedStore) -> None:
    with holding(store) as held, store.arriving() as writer:
        writer.write(data)
        with pytest.raises(SandboxFailed, match="no EROFS image"):
            store.add(IDENTITY, writer, held, name="a:1", attributes=False, checked=CHECKED)
    assert files(store) == []


@pytest.mark.parametrize("change", ["flipped", "cut", "longer", "touched"])
def test_what_was_changed_is_not_found_and_goes(change: str, store: UnpackedStore) -> None:
    made = add(store)
    path = packed(store, made)
    data = path.read_bytes()
    path.chmod(0o600)
    if change == "flipped":
        path.write_bytes(data[:-1] + b"\xff")
    elif change == "cut":
        os.truncate(path, len(data) - 1)
    elif change == "longer":
        os.truncate(path, len(data) + 4096)
    else:
        os.utime(path)
    with holding(store) as held:
        assert store.find(IDENTITY, held) is None
        assert files(store) == [f"held/{held.directory.name}/lock"]
        again = add(store)
        assert held.path(made.packed).exists() is False
        assert store.find(IDENTITY, held) == again
        assert held.path(again.packed).read_bytes() == erofs(b"a")


def test_a_flipped_byte_whose_time_was_set_back_is_not_sound(store: UnpackedStore) -> None:
    made = add(store)
    assert store.is_sound(made)
    path = packed(store, made)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b"\xff")
    os.utime(path, ns=(made.modified_ns, made.modified_ns))
    assert not store.is_sound(made)
    path.unlink()
    assert not store.is_sound(made)


@pytest.mark.parametrize(
    "record",
    [b"", b"{", b"[]", b"null", b'{"identity": 1}', b'{"identity": {"image": "x"}, "packed": 1}'],
)
def test_a_record_that_is_none_is_no_image(record: bytes, store: UnpackedStore) -> None:
    made = add(store)
    path = store._record(made.identity.key)
    path.write_bytes(record)
    with holding(store) as held:
        assert store.find(IDENTITY, held) is None
    assert store.all() == []
    assert not path.exists()


def test_a_record_of_another_image_is_not_believed(store: UnpackedStore) -> None:
    made = add(store)
    store._record(made.identity.key).rename(store._record(OTHER.key))
    with holding(store) as held:
        assert store.find(OTHER, held) is None


def test_a_record_without_its_image_goes(store: UnpackedStore) -> None:
    made = add(store)
    packed(store, made).unlink()
    with holding(store) as held:
        assert store.find(IDENTITY, held) is None
    assert store.all() == []
    assert files(store) == []


def test_removing_leaves_what_is_in_use(store: UnpackedStore) -> None:
    made = add(store)
    with holding(store) as held:
        assert store.find(IDENTITY, held) == made
        store.remove(made)
        assert store.all() == []
        assert held.path(made.packed).read_bytes() == erofs(b"a")
    assert files(store) == []


def test_removing_one_of_two_names_leaves_the_file(store: UnpackedStore) -> None:
    made, other = add(store), add(store, OTHER, name="b:1")
    assert made.packed == other.packed
    store.remove(made)
    assert store.all() == [other]
    assert packed(store, other).exists()


def test_they_are_listed_by_name(store: UnpackedStore) -> None:
    second, first = add(store, name="b:1"), add(store, OTHER, b"b", "a:1")
    assert store.all() == [first, second]


def test_what_was_used_longest_ago_is_evicted_first(store: UnpackedStore) -> None:
    old, new = add(store), add(store, OTHER, b"b")
    os.utime(packed(store, old), ns=(1, old.modified_ns))
    assert store.last_used(old) < store.last_used(new)
    assert store.evict(new.size_bytes) == [old]
    assert store.all() == [new]
    assert store.evict(0) == [new]
    assert files(store) == ["evicting"]
    assert store.last_used(new) > 1


def test_what_a_build_uses_is_not_evicted(store: UnpackedStore) -> None:
    made = add(store)
    with holding(store) as held:
        assert store.find(IDENTITY, held) == made
        assert store.evict(0) == []
    assert store.evict(0) == [made]


def test_one_at_a_time_makes_an_image(store: UnpackedStore) -> None:
    def waiting() -> None:
        raise Cancelled("tired of it")

    with store.turn(IDENTITY, waiting):
        with store.turn(OTHER, waiting):
            pass
        with pytest.raises(Cancelled), store.turn(IDENTITY, waiting):
            raise AssertionError
    with store.turn(IDENTITY, waiting):
        pass
    assert files(store) == []


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.unit.runner.stores import test_unpacked as tests
store = tests.UnpackedStore(Path(sys.argv[1]))
held = store.hold()
with store.turn(tests.IDENTITY, lambda: None), store.arriving() as writer:
    writer.write(tests.erofs(b"killed"))
    if sys.argv[2] == "committed":
        writer.sync()
        held.adopt(writer.digest, writer)
        writer.commit()
    os._exit(9)
"""


@pytest.mark.parametrize("when", ["arriving", "committed"])
def test_what_a_killed_build_left_is_never_used_and_collected(
    when: str, store: UnpackedStore
) -> None:
    kept = add(store, OTHER, b"other")
    directory = store._blobs.directory
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory), when, str(REPOSITORY)],
        check=False,
        timeout=60,
    )
    assert ran.returncode == 9
    with holding(store) as held:
        assert store.find(IDENTITY, held) is None
    with store.turn(IDENTITY, lambda: pytest.fail("nobody has the turn")):
        pass
    (directory / "turns" / IDENTITY.key).touch()
    removed = store.collect()
    assert {path.parent.name for path in removed} >= {"held", "turns"}
    assert files(store) == sorted(
        [f"blobs/sha256/{kept.packed.hex}", f"records/{kept.identity.key}.json"]
    )
    assert store.collect() == []


def test_collecting_spares_what_is_being_made(store: UnpackedStore) -> None:
    with (
        holding(store) as held,
        store.turn(IDENTITY, lambda: None),
        store.arriving() as writer,
    ):
        writer.write(erofs(b"a"))
        assert store.collect() == []
        writer.sync()
        held.adopt(writer.digest, writer)
        writer.commit()
        assert store.collect() == []


def test_a_record_is_for_its_user_alone(store: UnpackedStore) -> None:
    path = store._record(add(store).identity.key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_bytes())["name"] == "a:1"
