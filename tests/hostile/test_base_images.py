"""Base images of an attacker's: each ends in its own error or is harmless, and leaves nothing.

Threats 5, 15 and 25. Whether a layer is sound is checked before any sandbox; what passes is
unpacked in one, and what its tools refuse ends the build.
"""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.reference import Digest
from runner.errors import BaseImageInvalid, ImageNotFound, RunnerError
from runner.stores.unpacked import UnpackedStore
from sandbox.model import Provided
from tests.support.hosts import Built, Person, write_context
from tests.support.images import entry, make_image, make_index, tar_of
from tests.support.push import layers_of, push
from tests.support.toolbox import toolbox_tar

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
Member = tarfile.TarInfo | tuple[str, bytes]
Attack = Callable[..., Built]


def store_files(person: Person) -> list[str]:
    """All that the store of unpacked images has."""
    found = (path for path in person.home.unpacked.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(person.home.unpacked)) for path in found)


@pytest.fixture
def attack(
    newcomer: Person, registry: "RealRegistry", place: Path, request: pytest.FixtureRequest
) -> Attack:
    """Builds from an image of these parts, and looks at what is left."""

    def build(
        run: str = "true",
        policies: tuple[Path, ...] = (),
        prepare: Callable[[str], object] = lambda _: None,
        **parts: Any,
    ) -> Built:
        name = f"{registry.host}/hostile/{Digest.of(str(request.node.name).encode()).hex}:1"
        image = parts.pop("image", None) or make_image(**parts)
        push(registry.settings, name, image)
        prepare(name)
        context = write_context(place / "context", f"FROM {name}\nRUN {run}\n")
        try:
            built = newcomer.submit(context, policies=policies)
        except RunnerError:
            assert [name for name in store_files(newcomer) if name != "evicting"] == []
            raise
        finally:
            newcomer.assert_nothing_left()
        assert set(built.result.provided.values()) <= {Provided.COPIED}
        assert len(UnpackedStore(newcomer.home.unpacked).all()) == len(built.result.provided)
        return built

    return build


# -- refused before any sandbox ------------------------------------------------------------------


def sparse() -> tarfile.TarInfo:
    info = entry("sparse")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return info


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ([("../x", b"")], "entry-escape"),
        ([("a/../../x", b"")], "entry-escape"),
        ([("/etc/passwd", b"")], "entry-escape"),
        ([entry("x", HARD, "../etc/passwd")], "hard-link-escape"),
        ([entry("x", HARD, "/etc/passwd")], "hard-link-escape"),
        ([("a/.wh.", b"")], "entry-escape"),
        ([("a/.wh..", b"")], "entry-escape"),
        ([("a/.wh...", b"")], "entry-escape"),
        ([(".wh.../x", b"")], "entry-escape"),
        ([sparse()], "tar-sparse"),
        ([("d/" * 2100 + "x", b"")], "entry-path-length"),
    ],
)
def test_row_5_what_no_sandbox_is_asked_about(
    members: list[Member], rule: str, attack: Attack
) -> None:
    with pytest.raises(BaseImageInvalid) as caught:
        attack(tars=[toolbox_tar(), tar_of(*members)])
    assert caught.value.rule == rule


def policy(directory: Path, **limits: int) -> Path:
    document = {"apiVersion": "runner/v1alpha1", "name": "t", "default": {"limits": limits}}
    path = directory / "policy.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("limits", "tar", "rule"),
    [
        ({"layer_entries": 50}, tar_of(*(entry(str(n)) for n in range(51))), "entry-count"),
        ({"layer_bytes": 1 << 20}, tar_of(("huge", bytes(2 << 20))), "layer-bytes"),
        ({}, tar_of(("bomb", bytes(257 << 20))), "layer-inflation"),
    ],
)
def test_row_15_more_than_is_allowed(
    limits: dict[str, int], tar: bytes, rule: str, attack: Attack, place: Path
) -> None:
    with pytest.raises(BaseImageInvalid) as caught:
        attack(tars=[tar], policies=(policy(place, **limits),))
    assert caught.value.rule == rule


def _other_diff_id(config: dict[str, Any]) -> None:
    config["rootfs"]["diff_ids"][0] = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"edit_config": _other_diff_id}, "diff-id"),
        ({"edit_config": lambda c: c["rootfs"]["diff_ids"].pop()}, "diff-id-count"),
        ({"spoil_layer": lambda data: data[:-9]}, "layer-stream"),
        ({"spoil_layer": lambda data: data + b"trailing"}, "layer-stream"),
        ({"compression": "", "spoil_layer": lambda data: data + b"trailing"}, "tar-trailing"),
        ({"compression": "zstd", "spoil_layer": lambda data: data[:-1]}, "layer-stream"),
        ({"spoil_layer": lambda data: b"BZh9" + data}, "layer-stream"),
    ],
)
def test_row_13_layers_that_are_not_what_they_are_said_to_be(
    parts: Any, rule: str, attack: Attack
) -> None:
    with pytest.raises(BaseImageInvalid) as caught:
        attack(**parts)
    assert caught.value.rule == rule


def test_row_13_an_unknown_compression(attack: Attack) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+bzip2"

    with pytest.raises(RunnerError) as caught:
        attack(edit_manifest=edit)
    assert caught.value.code == "registry-protocol"
    assert "[media-type]" in caught.value.message


def test_row_13_an_index_without_the_platform(attack: Attack) -> None:
    with pytest.raises(ImageNotFound, match="no image for linux/amd64"):
        attack(image=make_index(("linux", "arm64", None), ("linux", "s390x", None)))


@pytest.mark.slow
def test_row_13_a_configuration_for_another_platform_changes_nothing(attack: Attack) -> None:
    """As under ``docker build``; what is published is for the platform that was asked for."""
    built = attack("echo built", tars=[toolbox_tar()], platform=("linux", "arm64", None))
    assert "\nbuilt\n" in built.log


@pytest.mark.parametrize("which", ["layer", "config"])
def test_row_24_a_manifest_of_which_the_registry_has_not_all(
    which: str, attack: Attack, registry: "RealRegistry"
) -> None:
    image = make_image(tars=[tar_of(("file", which.encode()))])
    document = json.loads(image.blobs.open(image.root.digest).read())
    digest = layers_of(image)[0] if which == "layer" else document["config"]["digest"]

    def lose(name: str) -> None:
        repository = name.partition("/")[2].partition(":")[0]
        kept = registry.storage / "docker/registry/v2/repositories" / repository
        shutil.rmtree(kept / "_layers" / digest.replace(":", "/"))

    with pytest.raises(RunnerError) as caught:
        attack(image=image, prepare=lose)
    assert caught.value.code == "image-not-found"


# -- refused or made harmless in the sandbox -----------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        [entry("x", HARD, "etc/passwd")],  # of the layer below, which no file system can link to
        [entry("x", HARD, "nowhere")],
        [("n" * 256, b"")],
        [entry("a", LINK, "/run/runner/config"), ("a/x", b"own")],
        [entry("a", LINK, "/var/lib/containers/storage"), ("a/overlay-images/x", b"own")],
        [entry("a", LINK, "b"), entry("b", LINK, "a"), ("a/x", b"own")],
        [("x", b"one"), ("x", b"two")],
        [("x", b"one"), entry("x", tarfile.DIRTYPE), ("x/y", b"two")],
        [entry("x", tarfile.DIRTYPE), entry("x", LINK, "/"), ("x/z", b"two")],
        [(".wh.x", b""), (".wh.x", b"")],
        [("x", b"hidden at once"), (".wh.x", b"")],
    ],
)
def test_row_5_what_cannot_be_unpacked_is_the_images_fault(
    members: list[Member], attack: Attack
) -> None:
    with pytest.raises(BaseImageInvalid, match=r"cannot be unpacked: buildah ended with 1"):
        attack(tars=[tar_of(*members)])


def device(name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE) -> tarfile.TarInfo:
    info = entry(name, kind)
    info.devmajor, info.devminor = major, minor
    return info


HARMLESS: list[list[Member]] = [
    [entry("0", LINK, "/etc"), ("etc/kept", b""), ("0/0", b"through a link of its own layer\n")],
    [entry("1", LINK, "/etc")],
    [("1/1", b"through a link of another\n")],
    [entry("2", LINK, "../../../../../../run/runner/config")],
    [("2/2", b"upwards\n")],
    [entry("3", LINK, "/var/lib/containers/storage")],
    [("3/overlay-images/images.json", b"[]")],
    [entry("proc/self/root", LINK, "/")],
    [("proc/self/root/etc/x", b"through /proc\n")],
    [(".wh.5", b""), ("5", b"hidden and there\n")],
    [(".wh.nothing/.wh.at.all", b""), (".wh.nothing", b"")],
    [("8/.wh..wh.plnk/1.2", b"of another file system's\n")],
    [("9/below", b"")],
    [("9/.wh..wh..opq", b""), ("9/above", b"")],
    [device("disk", 8, 0, tarfile.BLKTYPE), device("memory", 1, 1)],
    [device("etc/group", 0, 0)],
    [entry("10", LINK, "/etc/shadow"), entry("11", HARD, "10")],
    [entry("./", LINK, "/")],
    [("d/" * 120 + "x", b"deep\n")],
    [("-rf", b""), ("$(id)\n;`id`", b"")],
]
LOOK = r"""
set -e
cat /etc/0 /1/1 /2/2 /5 /d/d/d/*/*/*/*/../../../../../../../5
test ! -e /etc/group -a ! -e /nothing -a ! -e /9/below -a -e /9/above
test -e /-rf -a -h /11 -a -h /0 -a ! -h /1
! cat /disk /memory
find / -xdev -name x -path "*d/d/x" | grep -c d
"""
LOOKS = """\
through a link of its own layer
through a link of another
upwards
hidden and there
hidden and there
cat: /disk: No such device or address
cat: /memory: No such device or address
1
"""


def test_row_5_what_stays_within_the_image(attack: Attack) -> None:
    tars = [toolbox_tar(), *(tar_of(*members) for members in HARMLESS)]
    steps = "".join(f"{line} && " for line in LOOK.strip().splitlines()[1:])
    built = attack(f"set -e; {steps} true", tars=tars)
    assert LOOKS in built.log
