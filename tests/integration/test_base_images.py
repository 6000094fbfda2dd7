"""Base images come into a build unpacked: the very same trees, named as their registry has them."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.reference import Digest, ImageReference
from runner.registry.auth import Anonymous
from runner.registry.client import RegistryClient
from runner.registry.image import OCI_INDEX, Descriptor
from runner.settings import Settings
from runner.stores.unpacked import UnpackedStore
from runner.verify import StagedImage
from sandbox.local.backend import LocalBackend
from sandbox.model import Provided
from tests.support.hosts import Built, Person, write_context
from tests.support.images import MemoryBlobs, entry, make_image, tar_of
from tests.support.push import layers_of, manifest_of, push
from tests.support.toolbox import toolbox_tar

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

LISTING = r"""
use strict;
sub attributes {
    my ($path) = @_;
    my ($names, $found) = ("\0" x 4096, "");
    my $size = syscall(195, $path, $names, 4096);  # llistxattr
    for my $name (sort split /\0/, substr($names, 0, $size > 0 ? $size : 0)) {
        my $value = "\0" x 4096;
        my $got = syscall(192, $path, my $key = $name, $value, 4096);  # lgetxattr
        $found .= " $name=" . unpack("H*", substr($value, 0, $got));
    }
    return $found;
}
sub show {
    my ($path) = @_;
    my @is = lstat $path or die "$path: $!";
    my ($shown, $kind) = ("", $is[2] & 0170000);
    if ($kind == 0120000) { $shown = "-> " . unpack("H*", readlink $path) }
    if ($kind == 0100000) {
        open my $file, "<", $path or die "$path: $!";
        local $/;
        my $data = <$file>;
        $shown = unpack("%32C*", $data) . " " . length $data;
    }
    my ($links, $time) = ($kind == 0040000 ? 0 : $is[3], $path =~ m{^/odd} ? $is[9] : 0);
    printf "%s %o %d:%d links=%d device=%x time=%d %s%s\n",
        unpack("H*", $path), @is[2, 4, 5], $links, $is[6], $time, $shown, attributes($path);
    if ($kind == 0040000) {
        opendir my $directory, $path or die "$path: $!";
        show(($path eq "/" ? "" : $path) . "/$_") for sort grep { !/^\.\.?$/ } readdir $directory;
    }
}
show($_) for @ARGV;
"""
"""Every path with all that its file system knows of it. Times are whole seconds, as tar has
them, of ``/odd`` alone: other directories are in no layer, and made when it is unpacked."""

LONG = "l" * 255
CAPABILITY = "\x01\x00\x00\x02\x00\x20" + "\x00" * 14
"""CAP_NET_RAW, effective and permitted (linux/capability.h, version 2)."""


@dataclass(frozen=True)
class Way:
    """How base images come into the builds of ``person``, who has this runsc."""

    runsc: str
    person: Person
    provided: Provided


@dataclass(frozen=True)
class Base:
    """One in the registry."""

    name: str
    image: StagedImage

    @property
    def digest(self) -> Digest:
        return self.image.root.digest


def made(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any
) -> tarfile.TarInfo:
    info = entry(name, kind, link)
    info.mtime = 1_000_000_000
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archived(
    *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], tar_format: int = tarfile.GNU_FORMAT
) -> bytes:
    """Names in bytes, as file systems have them."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tar_format, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for member in members:
            info, data = (member, b"") if isinstance(member, tarfile.TarInfo) else member
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


DIRECTORY = tarfile.DIRTYPE
ODD = made("odd", DIRECTORY, mode=0o2751, uid=7, gid=8)
LOWER = archived(
    ODD,
    (made("odd/setuid", mode=0o6755, uid=2000, gid=3000), b"set"),
    (made("odd/far", uid=4_000_000, gid=5_000_000), b"far"),
    (made("odd/one"), b"linked"),
    made("odd/two", tarfile.LNKTYPE, "odd/one"),
    made("odd/dangling", tarfile.SYMTYPE, "/nowhere/at all"),
    made("odd/upwards", tarfile.SYMTYPE, "../../../../etc/passwd"),
    made("odd/fifo", tarfile.FIFOTYPE, mode=0o620),
    made("odd/empty", DIRECTORY),
    made("odd/sticky", DIRECTORY, mode=0o1777),
    made("odd/closed", DIRECTORY, mode=0),
    (made("odd/closed/file", mode=0), b"closed"),
    (made("odd/line\nbreak"), b"1"),
    (made("odd/\udcff\udcfe"), b"2"),
    (made(f"odd/{LONG}"), b"3"),
    (made("odd/a\\b 'c' \"d\" $e*"), b"4"),
    (made("odd/ancient", mtime=-1000), b"5"),
    (made("odd/zero"), b""),
    (made("odd/large"), bytes(range(256)) * 40_000),
    (made("odd/gone"), b"6"),
    made("odd/gone-too", DIRECTORY),
    (made("odd/gone-too/file"), b"7"),
    made("odd/merged", DIRECTORY, mode=0o700),
    (made("odd/merged/below"), b"8"),
    (made("odd/becomes-a-directory"), b"9"),
    made("odd/becomes-a-file", DIRECTORY),
    (made("odd/becomes-a-file/file"), b"10"),
)
UPPER = archived(
    ODD,
    (made("odd/.wh.gone"), b""),
    (made("odd/.wh.gone-too"), b""),
    made("odd/merged", DIRECTORY, mode=0o750, uid=9),
    (made("odd/merged/above"), b"11"),
    made("odd/becomes-a-directory", DIRECTORY),
    (made("odd/becomes-a-directory/file"), b"12"),
    (made("odd/becomes-a-file"), b"13"),
    (made("odd/setuid", mode=0o755), b"not any more"),
)
BESIDE = archived(ODD, (made("odd/two"), b"no link any more"))
DEVICES = archived(
    ODD,
    made("odd/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    made("odd/disk", tarfile.BLKTYPE, devmajor=300, devminor=112, mode=0o660),
)
CAPABLE = archived(
    (made("odd/capable", pax_headers={"SCHILY.xattr.security.capability": CAPABILITY}), b"15"),
    tar_format=tarfile.PAX_FORMAT,
)
ATTRIBUTES = archived(
    ODD,
    (made("odd/greets", pax_headers={"SCHILY.xattr.user.greeting": "hello"}), b"14"),
    made("odd/merged", DIRECTORY, mode=0o700),
    (made("odd/merged/.wh..wh..opq"), b""),
    (made("odd/merged/alone"), b"16"),
    tar_format=tarfile.PAX_FORMAT,
)


@pytest.fixture(scope="module")
def home(playground: Path, builders: Path, settings: Settings) -> Iterator[Person]:
    person = Person.move_in(playground / "bases", settings, builders)
    yield person
    person.move_out()


WAYS = [
    ("packaged", Provided.PULLED),
    ("packaged", Provided.COPIED),
    ("current", Provided.PULLED),
    ("current", Provided.COPIED),
    ("current", Provided.MOUNTED),
]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def way(request: pytest.FixtureRequest, home: Person, monkeypatch: pytest.MonkeyPatch) -> Way:
    runsc, provided = request.param
    person = home
    if runsc == "current":
        person = home.with_runsc(request.getfixturevalue("current_runsc"))
    if provided is Provided.PULLED:
        monkeypatch.setattr("runner.unpack.MOST_BASES", 0)
    if provided is Provided.COPIED:
        monkeypatch.setattr(LocalBackend, "provides", lambda *_: Provided.COPIED)
    return Way(runsc, person, provided)


@pytest.fixture(params=["packaged", "current"])
def unpacked(request: pytest.FixtureRequest, home: Person) -> Way:
    """As it is without a test's doing."""
    if request.param == "packaged":
        return Way("packaged", home, Provided.COPIED)
    person = home.with_runsc(request.getfixturevalue("current_runsc"))
    return Way("current", person, Provided.MOUNTED)


@pytest.fixture(scope="module")
def plain(registry: "RealRegistry") -> Base:
    """Of several layers, with all that every file system keeps."""
    image = make_image(tars=[toolbox_tar(), LOWER, UPPER, BESIDE])
    return Base(push(registry.settings, f"{registry.host}/odd/plain:1", image), image)


@pytest.fixture(scope="module")
def special(registry: "RealRegistry") -> Base:
    """With what gVisor's EROFS would lose: devices, attributes, an opaque directory."""
    image = make_image(tars=[toolbox_tar(), LOWER, UPPER, DEVICES, ATTRIBUTES])
    return Base(push(registry.settings, f"{registry.host}/odd/special:1", image), image)


@pytest.fixture(scope="module")
def first() -> dict[str, object]:
    """What was seen first, by what it is: whatever is seen later has to be the same."""
    return {}


def listed(built: Built) -> list[str]:
    """Paths in readable form, and what is known of each."""
    rows = [line.partition(" ") for line in built.log.splitlines() if line.startswith("2f")]
    return [f"{bytes.fromhex(path)!r} {rest}" for path, _, rest in rows]


def ledger_of(person: Person, built: Built) -> list[dict[str, Any]]:
    path = person.home.builds / built.result.build_id / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Published:
    """A build's image as the registry has it."""

    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    top: list[tuple[object, ...]]

    @property
    def layers(self) -> list[str]:
        return [layer["digest"] for layer in self.manifest["layers"]]

    @property
    def timeless(self) -> object:
        """All that does not tell when it was built."""
        config = {key: value for key, value in self.config.items() if key != "created"}
        config.pop("history", None)
        del config["rootfs"]
        return config, self.layers[:-1], self.top


def published(registry: "RealRegistry", built: Built) -> Published:
    image = ImageReference.parse(built.result.published[0]).at(built.result.digest)
    with RegistryClient(registry.settings, Anonymous()) as client:

        def blob(descriptor: Mapping[str, Any]) -> bytes:
            with client.read_blob(image, Digest(descriptor["digest"]), None) as pieces:
                return b"".join(pieces)

        manifest = json.loads(client.manifest(image)[1])
        with tarfile.open(fileobj=io.BytesIO(blob(manifest["layers"][-1]))) as archive:
            top: list[tuple[object, ...]] = [
                (
                    *(each.name, each.type, each.mode, each.uid, each.gid, each.linkname),
                    (file.read() if (file := archive.extractfile(each)) else b"")
                    if each.isreg()
                    else b"",
                    {key for key in each.pax_headers if "xattr" in key},
                )
                for each in archive
            ]
        return Published(manifest, json.loads(blob(manifest["config"])), top)


# -- the same by every way -----------------------------------------------------------------------


@pytest.mark.parametrize("which", [pytest.param("plain", marks=pytest.mark.slow), "special"])
def test_the_tree_is_the_same_by_every_way(
    which: str, way: Way, place: Path, first: dict[str, object], request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(which)
    context = write_context(
        place / "context",
        f"FROM {base.name}\nCOPY list.pl /tmp/\nRUN perl /tmp/list.pl /odd /usr\n"
        f"RUN --mount=from={base.name},target=/mnt perl /tmp/list.pl /mnt/odd\n",
        **{"list.pl": LISTING},
    )
    built = way.person.submit(context)
    loses = way.provided is Provided.MOUNTED and which == "special"
    provided = Provided.COPIED if loses else way.provided
    assert built.result.provided == {base.name: provided}
    found = listed(built)
    assert any(LONG in line for line in found)
    assert found == first.setdefault(f"{which} {way.runsc}", found)


def test_the_image_is_the_same_by_every_way(
    way: Way, plain: Base, place: Path, registry: "RealRegistry", first: dict[str, object]
) -> None:
    context = write_context(
        place / "context",
        f"FROM {plain.name} AS other\n"
        f"FROM {plain.name}\n"
        "ENV A=1\nLABEL b=2\nCOPY --chown=7:8 --chmod=640 Dockerfile /odd/empty/\n"
        "COPY --from=other /odd /copied\n"
        f"COPY --from={plain.name} /odd/one /odd/two /from-image/\n"
        "RUN rm -r /odd/merged /usr/bin/tee && echo new >>/odd/one && chown 1:2 /odd/large "
        "&& ln /odd/zero /odd/zero-too && chmod 700 /odd/sticky\n",
    )
    destination = f"{registry.host}/odd/built-{way.runsc}-{way.provided}:1"
    built = way.person.submit(context, destination=destination)
    image = published(registry, built)
    assert image.layers[:-1] == layers_of(plain.image)
    start = built.result.starts_from
    assert start is not None
    assert (start.image, start.digest, start.layers) == (plain.name, plain.digest, 4)
    assert image.timeless == first.setdefault(way.runsc, image.timeless)


@pytest.mark.parametrize(
    ("compression", "docker"),
    [
        ("gzip", True),
        pytest.param("zstd", False, marks=pytest.mark.slow),
        pytest.param("", False, marks=pytest.mark.slow),
        pytest.param("", True, marks=pytest.mark.slow),
    ],
)
def test_no_layer_of_the_base_is_uploaded_whatever_it_is_packed_with(
    compression: str, docker: bool, way: Way, place: Path, registry: "RealRegistry"
) -> None:
    image = make_image(tars=[toolbox_tar(), LOWER], compression=compression, docker=docker)
    name = f"{registry.host}/packed/{compression or 'not'}-{'docker' if docker else 'oci'}:1"
    push(registry.settings, name, image)
    context = write_context(place / "context", f"FROM {name}\nRUN echo 1 >/made\n")
    built = way.person.submit(context, destination=name.replace(":1", "-built:1"))
    sent = [
        row["sent_bytes"]
        for row in ledger_of(way.person, built)
        if row.get("method") in {"PATCH", "PUT", "POST"}
    ]
    assert sum(sent) < min(layer["size"] for layer in manifest_of(image)["layers"]), sent
    assert published(registry, built).layers[:-1] == layers_of(image)
    assert built.result.starts_from is not None
    assert built.result.starts_from.digest == image.root.digest
    assert built.result.provided == {name: way.provided}


# -- what an image is called, and where --------------------------------------------------------


def word(text: str) -> bytes:
    """A layer that says ``text``."""
    return tar_of(("word", f"{text}\n".encode()))


@pytest.fixture(scope="module")
def index(registry: "RealRegistry") -> Base:
    """An image for two platforms, each with a word of its own."""
    blobs = MemoryBlobs()
    entries = []
    for architecture in ("arm64", "amd64"):
        root = make_image(
            tars=[toolbox_tar(), word(architecture)],
            platform=("linux", architecture, None),
            blobs=blobs,
        ).root
        entries.append(
            {
                "mediaType": root.media_type,
                "digest": str(root.digest),
                "size": root.size,
                "platform": {"os": "linux", "architecture": architecture},
            }
        )
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    image = StagedImage(Descriptor(OCI_INDEX, blobs.add(data), len(data)), blobs)
    return Base(push(registry.settings, f"{registry.host}/odd/index:1", image), image)


def test_an_index_by_all_its_names(unpacked: Way, index: Base, place: Path) -> None:
    repository = index.name.removesuffix(":1")
    entry_digest = manifest_of(index.image)["manifests"][1]["digest"]
    names = [index.name, f"{repository}@{index.digest}", f"{repository}@{entry_digest}",
             f"{index.name}@{index.digest}"]  # fmt: skip
    stages = "".join(f"FROM {name} AS s{number}\n" for number, name in enumerate(names))
    copies = "".join(f"COPY --from=s{number} /word /{number}\n" for number in range(len(names)))
    copies += f"COPY --from={repository}@{index.digest} /word /from-image\n"
    context = write_context(
        place / "context",
        f"{stages}FROM {index.name}\n{copies}RUN cat /[0-3] /from-image\n",
    )
    built = unpacked.person.submit(context)
    assert built.log.count("\namd64") == len(names) + 1
    assert built.result.provided == dict.fromkeys(names, unpacked.provided)
    assert not [row for row in ledger_of(unpacked.person, built) if _pulls(row, "odd/index")]


def _pulls(row: Mapping[str, Any], repository: str) -> bool:
    return row.get("method") == "GET" and repository in row["path"] and "/blobs/" in row["path"]


def test_another_platform_is_pulled_by_the_build(
    unpacked: Way, index: Base, tools_base: str, place: Path
) -> None:
    context = write_context(
        place / "context",
        f"FROM --platform=linux/arm64 {index.name} AS other\n"
        f"FROM {tools_base}\nCOPY --from=other /word /\nRUN cat /word\n",
    )
    built = unpacked.person.submit(context)
    assert "\narm64\n" in built.log
    assert built.result.provided == {index.name: "pulled", tools_base: unpacked.provided}


def test_two_names_of_one_digest_are_one_image(
    unpacked: Way, registry: "RealRegistry", place: Path
) -> None:
    image = make_image(tars=[toolbox_tar(), word("twice")])
    names = [push(registry.settings, f"{registry.host}/{name}:1", image) for name in ("a/x", "b/x")]
    context = write_context(
        place / "context",
        f"FROM {names[0]} AS one\nFROM {names[1]}\nCOPY --from=one /word /one\n"
        "RUN cat /one /word\n",
    )
    built = unpacked.person.submit(context)
    assert "twice\ntwice\n" in built.log
    assert built.result.provided == dict.fromkeys(names, unpacked.provided)
    found = [each for each in store_of(unpacked.person).all() if each.name in names]
    assert len(found) == 1


def store_of(person: Person) -> UnpackedStore:
    return UnpackedStore(person.home.unpacked)


@pytest.mark.slow
def test_the_seventeenth_image_is_pulled(
    unpacked: Way, registry: "RealRegistry", place: Path, tools_base: str
) -> None:
    names = [
        push(registry.settings, f"{registry.host}/many/{number}:1", make_image(tars=[word(number)]))
        for number in map(str, range(16))
    ]
    copies = "".join(f"COPY --from={name} /word /w{n}\n" for n, name in enumerate(names))
    context = write_context(place / "context", f"FROM {tools_base}\n{copies}RUN cat /w*\n")
    built = unpacked.person.submit(context)
    assert sorted(built.log.split("RUN cat /w*\n")[1].split()[:16], key=int) == [
        str(number) for number in range(16)
    ]
    ways = [built.result.provided[name] for name in (tools_base, *names)]
    assert ways == [unpacked.provided] * 16 + [Provided.PULLED]


def test_a_target_begins_with_its_own_base(
    unpacked: Way, plain: Base, index: Base, place: Path
) -> None:
    context = write_context(
        place / "context",
        f"FROM {plain.name} AS one\nFROM one AS two\nRUN echo two\n"
        f"FROM {index.name} AS three\nRUN echo three\n",
    )
    built = unpacked.person.submit(context, target="two")
    assert "echo three" not in built.log
    assert built.result.starts_from is not None
    assert built.result.starts_from.image == plain.name


def test_what_only_shows_while_building_is_pulled(
    unpacked: Way, plain: Base, index: Base, place: Path
) -> None:
    context = write_context(
        place / "context",
        f"FROM {plain.name}\nARG X=/mnt,from={index.name}\n"
        "RUN --mount=type=bind,target=$X cat /mnt/word\n",
    )
    built = unpacked.person.submit(context)
    assert "\namd64\n" in built.log
    assert built.result.provided == {plain.name: unpacked.provided}
    assert built.result.base_images[index.name] == str(index.digest)


def test_a_device_is_there_though_a_mount_would_lose_it(
    unpacked: Way, registry: "RealRegistry", place: Path
) -> None:
    name = f"{registry.host}/odd/device:1"
    push(registry.settings, name, make_image(tars=[toolbox_tar(), DEVICES]))
    look = "perl -e 'printf qq(%x %x\\n), map { (lstat)[6] } @ARGV' /odd/null /odd/disk"
    context = write_context(place / "context", f"FROM {name}\nRUN {look}\n")
    built = unpacked.person.submit(context)
    assert "\n103 12c70\n" in built.log
    assert built.result.provided == {name: Provided.COPIED}


def test_what_has_capabilities_is_pulled_which_alone_keeps_them(
    unpacked: Way, registry: "RealRegistry", place: Path
) -> None:
    name = f"{registry.host}/odd/capable:1"
    push(registry.settings, name, make_image(tars=[toolbox_tar(), CAPABLE]))
    context = write_context(
        place / "context",
        f"FROM {name}\nCOPY list.pl /tmp/\nRUN perl /tmp/list.pl /odd\n",
        **{"list.pl": LISTING},
    )
    built = unpacked.person.submit(context)
    assert built.result.provided == {name: Provided.PULLED}
    assert [warning for warning in built.result.warnings if "capabilities" in warning]
    kept = any("security.capability=01000002" in line for line in listed(built))
    assert kept == (unpacked.runsc == "current")  # the packaged kernel keeps none


def test_scratch_needs_nothing(unpacked: Way, place: Path) -> None:
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    built = unpacked.person.submit(context)
    assert built.result.provided == {}
    assert built.result.starts_from is None
    assert built.result.warnings == ()
