"""A builder's root filesystem is what was installed, or no build starts."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.rootfs import Recipe
from policies.reference import Digest
from runner.errors import BuilderCorrupt, BuilderInstallFailed, BuilderNotInstalled
from runner.stores import rootfs
from runner.stores.rootfs import Installed, RootfsStore, remove_tree, tree_digest
from sandbox.locks import Lock

RECIPE = Recipe(
    suite="trixie",
    packages=(),
    leave_out=(),
    files={"etc/passwd": b"root\n", "etc/kept": b"ours\n"},
    directories=("/run/runner", "/tmp"),
    needs=("tool",),
    version_package="tool",
)


def make(root: Path) -> str:
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr").chmod(0o700)
    (root / "usr/bin/tool").write_bytes(b"#!tool")
    (root / "usr/bin/tool").chmod(0o4755)
    (root / "usr/bin/link").symlink_to("/bin/tool")
    (root / "etc").mkdir()
    (root / "etc/kept").write_bytes(b"theirs\n")
    return "1.0"


@pytest.fixture
def store(tmp_path: Path) -> RootfsStore:
    return RootfsStore(tmp_path / "builders")


@pytest.fixture
def installed(store: RootfsStore) -> Installed:
    return store.install("b", RECIPE, "here", make)


def test_what_was_installed_is_found_complete_and_without_privilege(
    store: RootfsStore, installed: Installed
) -> None:
    assert store.installed("b") == store.verified("b") == installed
    assert store.verified("b", every_byte=True) == installed
    root = installed.root
    assert (installed.version, installed.source, installed.entries) == ("1.0", "here", 10)
    assert installed.size_bytes == len(b"#!toolroot\ntheirs\n")
    assert (root / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (root / "usr").stat().st_mode & 0o7777 == 0o755
    assert (root / "etc/passwd").read_bytes() == b"root\n"
    assert (root / "etc/kept").read_bytes() == b"theirs\n"
    assert (root / "run/runner").is_dir()


def test_the_same_tree_has_the_same_digest_wherever_it_is(
    tmp_path: Path, installed: Installed
) -> None:
    other = RootfsStore(tmp_path / "other").install("b", RECIPE, "there", make)
    assert other.digest == installed.digest
    assert other.root != installed.root


def one_byte(root: Path) -> None:
    path = root / "usr/bin/tool"
    before = path.stat()
    path.write_bytes(b"#!tooL")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def relink(root: Path) -> None:
    (root / "usr/bin/link").unlink()
    (root / "usr/bin/link").symlink_to("/bin/other")


@pytest.mark.parametrize(
    "tamper",
    [
        one_byte,
        relink,
        lambda root: (root / "usr/bin/tool").chmod(0o4755),
        lambda root: (root / "usr/bin/more").touch(),
        lambda root: (root / "usr/bin/tool").unlink(),
        lambda root: (root / "usr/bin/tool").rename(root / "usr/bin/tool2"),
        lambda root: (root / "tmp").rmdir(),
        remove_tree,
    ],
)
@pytest.mark.parametrize("every_byte", [True, False])
def test_the_smallest_change_is_found(
    store: RootfsStore, installed: Installed, tamper: Callable[[Path], None], every_byte: bool
) -> None:
    tamper(installed.root)
    with pytest.raises(BuilderCorrupt):
        store.verified("b", every_byte=every_byte)


def test_an_intact_seal_saves_hashing(
    store: RootfsStore, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counted(root: Path) -> Digest:
        hashed.append(root)
        return tree_digest(root)

    monkeypatch.setattr(rootfs, "tree_digest", counted)
    store.verified("b")
    assert hashed == []
    (installed.root / "usr/bin/tool").touch()
    store.verified("b")
    assert hashed == [installed.root]
    store.verified("b")
    assert hashed == [installed.root]
    (installed.root.parent / "seal.json").unlink()
    store.verified("b")
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", '"x"', "3", "{}", '{"digest": "x"}', '{"digest": 3}', "\xff"]
)
def test_an_unreadable_record_is_corruption(
    store: RootfsStore, installed: Installed, text: str
) -> None:
    record = installed.root.parent.parent / "current.json"
    record.write_text(text)
    with pytest.raises(BuilderCorrupt):
        store.installed("b")


def test_what_is_not_installed_is_said(store: RootfsStore) -> None:
    assert store.installed("b") is None
    for action in (store.verified, store.remove):
        with pytest.raises(BuilderNotInstalled):
            action("b")


def test_a_failed_installation_leaves_all_as_it_was(
    store: RootfsStore, installed: Installed
) -> None:
    def fails(root: Path) -> str:
        (root / "half").mkdir(mode=0o500)
        raise BuilderInstallFailed("no")

    with pytest.raises(BuilderInstallFailed):
        store.install("b", RECIPE, "here", fails)

    def lacks(root: Path) -> str:
        make(root)
        (root / "usr/bin/tool").unlink()
        return "1"

    with pytest.raises(BuilderInstallFailed, match="no tool"):
        store.install("b", RECIPE, "here", lacks)
    assert store.verified("b") == installed
    home = installed.root.parent.parent
    assert {path.name for path in home.iterdir()} <= {
        "current.json", "install.lock", installed.digest.hex,
    }  # fmt: skip


def test_two_installations_do_not_meet(store: RootfsStore, installed: Installed) -> None:
    lock = Lock(installed.root.parent.parent / "install.lock")
    with pytest.raises(BuilderInstallFailed, match="another process"):
        store.install("b", RECIPE, "here", make)
    assert store.collect() == []
    lock.release()


@pytest.mark.parametrize("link", ["etc", "run", "tmp"])
def test_a_link_in_the_tree_never_leads_outside(
    tmp_path: Path, store: RootfsStore, link: str
) -> None:
    outside = tmp_path / "outside"
    (outside / "runner").mkdir(parents=True)
    (outside / "tool").touch()

    def hostile(root: Path) -> str:
        make(root)
        remove_tree(root / link)
        (root / link).symlink_to(outside)
        return "1"

    before = sorted((p, p.stat().st_mtime_ns, p.stat().st_mode) for p in outside.rglob("*"))
    with pytest.raises(BuilderInstallFailed, match="is a link"):
        store.install("b", RECIPE, "here", hostile)
    after = sorted((p, p.stat().st_mtime_ns, p.stat().st_mode) for p in outside.rglob("*"))
    assert before == after


def test_a_file_that_is_a_link_is_not_written_through(tmp_path: Path, store: RootfsStore) -> None:
    def hostile(root: Path) -> str:
        make(root)
        (root / "etc/passwd").symlink_to(tmp_path / "written")
        return "1"

    with pytest.raises(BuilderInstallFailed, match="is a link"):
        store.install("b", RECIPE, "here", hostile)
    assert not (tmp_path / "written").exists()


def test_nothing_special_is_taken(store: RootfsStore) -> None:
    def hostile(root: Path) -> str:
        make(root)
        os.mkfifo(root / "usr/bin/fifo")
        return "1"

    with pytest.raises(BuilderCorrupt, match="fifo"):
        store.install("b", RECIPE, "here", hostile)


def test_collecting_keeps_the_current_tree_alone(store: RootfsStore, installed: Installed) -> None:
    home = installed.root.parent.parent
    (home / "arriving-left").mkdir()
    assert store.collect() == [home / "arriving-left"]
    assert store.verified("b") == installed
    store.remove("b")
    assert not home.exists()


def test_removing_takes_links_and_read_only_trees_and_nothing_beyond(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/link").symlink_to(tmp_path / "kept")
    (tmp_path / "tree/sub").chmod(0o500)
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/file").exists()


def test_the_digest_does_not_look_at_times(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    before = tree_digest(tmp_path)
    os.utime(tmp_path / "f", (1, 1))
    assert tree_digest(tmp_path) == before


def test_nobody_takes_the_tree_of_a_running_build_away(
    store: RootfsStore, installed: Installed
) -> None:
    def another(root: Path) -> str:
        version = make(root)
        (root / "usr/bin/tool").write_bytes(b"newer")
        return version

    with store.using("b") as used:
        assert used == installed
        with pytest.raises(BuilderInstallFailed, match="running build"):
            store.remove("b")
        store.install("b", RECIPE, "there", make)  # the same tree: kept as it is
        store.install("b", RECIPE, "there", another)
        assert store.collect() == []
        assert tree_digest(used.root) == used.digest
    assert [path.name for path in store.collect()] == [installed.digest.hex]
    store.remove("b")
    assert store.installed("b") is None
