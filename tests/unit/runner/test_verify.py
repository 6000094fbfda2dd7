"""Every rule has an image that breaks it alone; sound images pass, whatever made them."""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from policies.model import Limits
from policies.reference import Digest
from runner import hashed, inflate, layercheck, verify
from runner.errors import VerificationFailed
from runner.registry.image import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.verify import CheckedLayer, ImageVerifier, StagedImage, VerifiedImage
from tests.support.images import (
    HELLO_TAR,
    MORE_TAR,
    MemoryBlobs,
    entry,
    make_image,
    make_index,
    packed,
    tar_of,
)

AMD64 = ("linux", "amd64", None)
ARM64 = ("linux", "arm64", "v8")
OTHER = str(Digest.of(b"other"))


def check(
    staged: StagedImage,
    *,
    limits: Limits | None = None,
    platform: str | None = "linux/amd64",
    claimed: Digest | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifiedImage:
    return verify.verify(
        staged, limits=limits or Limits(), platform=platform, claimed=claimed, progress=progress
    )


def broken_rule(staged: StagedImage, **options: Any) -> str:
    with pytest.raises(VerificationFailed) as caught:
        check(staged, **options)
    return caught.value.rule


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_a_sound_image_passes(compression: str, docker: bool) -> None:
    staged = make_image(compression=compression, docker=docker)
    image = check(staged, claimed=staged.root.digest)
    assert image.root == staged.root
    assert image.source is staged.blobs
    assert image.platforms == ("linux/amd64",)
    assert list(image.documents) == list(image.media_types) == [staged.root.digest]
    manifest = json.loads(image.documents[staged.root.digest])
    assert [str(d.digest) for d in image.blobs_needed] == [
        d["digest"] for d in (manifest["config"], *manifest["layers"])
    ]


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_needs_shared_layers_once(docker: bool) -> None:
    image = check(make_index(AMD64, ARM64, docker=docker), platform="linux/arm64")
    assert image.platforms == ("linux/amd64", "linux/arm64/v8")
    assert len(image.documents) == 3
    assert len(image.blobs_needed) == 4  # two configurations, two layers
    assert len({d.digest for d in image.blobs_needed}) == 4


def test_a_layer_that_an_image_has_twice_is_read_once() -> None:
    staged = make_image(tars=(HELLO_TAR, HELLO_TAR))
    read: list[int] = []
    image = check(staged, progress=read.append)
    assert len(image.blobs_needed) == 2
    assert sum(read) == staged.root.size + sum(d.size for d in image.blobs_needed)


def test_an_image_without_layers_passes() -> None:
    assert len(check(make_image(tars=())).blobs_needed) == 1


@pytest.mark.parametrize(
    ("found", "asked", "agrees"),
    [
        (AMD64, "linux/amd64", True),
        (AMD64, "linux/amd64/v1", True),
        (AMD64, "linux/amd64/v3", False),
        (AMD64, "linux/arm64", False),
        (AMD64, "windows/amd64", False),
        (AMD64, "amd64", False),
        (AMD64, "\x1b[2J", False),
        (ARM64, "linux/arm64", True),
        (ARM64, "linux/arm64/v8", True),
        (("linux", "arm64", None), "linux/arm64/v8", True),
        (("linux", "arm", "v6"), "linux/arm/v7", False),
        (("linux", "riscv64", None), "linux/riscv64", True),
    ],
)
def test_the_platform_is_the_one_asked_for(
    found: tuple[str, str, str | None], asked: str, agrees: bool
) -> None:
    staged = make_image(platform=found)
    if agrees:
        check(staged, platform=asked)
    else:
        assert broken_rule(staged, platform=asked) == "platform"


def _without(staged: StagedImage, position: int) -> StagedImage:
    """The image without its blob at ``position``: configuration first, then layers."""
    blobs = check(staged).blobs_needed
    left = dict(staged.blobs.blobs)  # type: ignore[attr-defined]  # ours are all MemoryBlobs
    del left[blobs[position].digest]
    return StagedImage(staged.root, MemoryBlobs(left))


def _swapped(staged: StagedImage, position: int, change: Callable[[bytes], bytes]) -> StagedImage:
    """The image with other bytes than its digests say."""
    digest = check(staged).blobs_needed[position].digest
    blobs = dict(staged.blobs.blobs)  # type: ignore[attr-defined]  # ours are all MemoryBlobs
    blobs[digest] = change(blobs[digest])
    return StagedImage(staged.root, MemoryBlobs(blobs))


def _flipped(data: bytes) -> bytes:
    """One bit changed where a configuration has text, a gzip stream its sum, and the tar a file."""
    position = 1030 if len(data) > 5000 else -1
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def _member(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


def _layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["layers"][0].update(changes)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["manifests"][0].update(changes)


def _diff_ids(*digests: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["rootfs"].update(diff_ids=list(digests))


def _of_tar(tar: bytes) -> StagedImage:
    return make_image(tars=(tar,))


def _relabelled(kind: bytes) -> bytes:
    """One file whose header says another type, its checksum right."""
    block = tarfile.TarInfo("file").tobuf()
    block = block[:148] + b" " * 8 + kind + block[157:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:] + bytes(1024)


def _conflict() -> StagedImage:
    def one_digest_two_sizes(document: dict[str, Any]) -> None:
        first = document["layers"][0]
        document["layers"][1] = {**first, "size": first["size"] + 1}

    return make_image(edit_manifest=one_digest_two_sizes)


SUBJECT = {"mediaType": OCI_MANIFEST, "digest": OTHER, "size": 3}
BROKEN: list[tuple[str, Callable[[], StagedImage], dict[str, Any]]] = [
    ("blob-missing", lambda: _without(make_image(), 0), {}),
    ("blob-missing", lambda: _without(make_image(), 2), {}),
    ("blob-missing", lambda: StagedImage(make_image().root, MemoryBlobs()), {}),
    ("blob-size", lambda: _swapped(make_image(), 0, lambda data: data + b" "), {}),
    ("blob-size", lambda: _swapped(make_image(), 1, lambda data: data + b" "), {}),
    ("blob-size", lambda: _swapped(make_image(compression=""), 1, lambda data: data[:-512]), {}),
    ("blob-digest", lambda: _swapped(make_image(), 0, _flipped), {}),
    ("blob-digest", lambda: _swapped(make_image(compression=""), 1, _flipped), {}),
    ("claimed-digest", make_image, {"claimed": Digest(OTHER)}),
    ("descriptor-conflict", _conflict, {}),
    (
        "descriptor-conflict",  # a layer that is the configuration too
        lambda: make_image(
            edit_manifest=lambda d: d["layers"][0].update(
                digest=d["config"]["digest"], size=d["config"]["size"]
            )
        ),
        {},
    ),
    ("document-size", lambda: make_image(edit_manifest=_member(filler="a" * (4 << 20))), {}),
    ("document-size", lambda: make_image(edit_config=_member(filler="a" * (8 << 20))), {}),
    ("json", lambda: make_image(spoil_manifest=lambda data: data + b"{}"), {}),
    ("json", lambda: make_image(edit_config=_member(created=float("nan"))), {}),
    ("duplicate-key", lambda: make_image(spoil_manifest=lambda d: d[:-1] + b',"config":{}}'), {}),
    ("duplicate-key", lambda: make_image(edit_config=_member(OS="windows")), {}),
    ("duplicate-key", lambda: make_image(edit_manifest=_member(Layers=[])), {}),
    ("schema", lambda: make_image(edit_manifest=_member(layers={})), {}),
    ("schema", lambda: make_image(edit_manifest=_layer(size=True)), {}),
    ("schema", lambda: make_image(edit_config=_member(rootfs={"type": "tar", "diff_ids": []})), {}),
    ("schema-version", lambda: make_image(edit_manifest=_member(schemaVersion=1)), {}),
    ("digest", lambda: make_image(edit_manifest=_layer(digest="sha256:../../etc")), {}),
    ("digest", lambda: make_image(edit_config=_diff_ids("md5:00", OTHER)), {}),
    ("size", lambda: make_image(edit_manifest=_layer(size=-1)), {}),
    ("size", lambda: make_image(edit_manifest=_layer(size=1 << 62)), {}),
    ("media-type", lambda: make_image(edit_manifest=_member(mediaType=OCI_INDEX)), {}),
    ("media-type", lambda: make_image(edit_manifest=_layer(mediaType=OCI_CONFIG)), {}),
    ("media-type", lambda: replace(make_image(), root=Descriptor("text/x", Digest(OTHER), 1)), {}),
    ("media-type-confusion", lambda: make_image(edit_manifest=_member(manifests=[])), {}),
    ("media-type-confusion", lambda: make_index(AMD64, edit_index=_member(layers=None)), {}),
    ("media-type-confusion", lambda: make_index(AMD64, edit_index=_member(config={})), {}),
    ("foreign-layer", lambda: make_image(edit_manifest=_layer(urls=[])), {}),
    (
        "foreign-layer",
        lambda: make_image(
            edit_manifest=_layer(
                mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            )
        ),
        {},
    ),
    ("embedded-data", lambda: make_image(edit_manifest=_layer(data="e30=")), {}),
    ("subject", lambda: make_image(edit_manifest=_member(subject=SUBJECT)), {}),
    ("subject", lambda: make_index(AMD64, edit_index=_member(subject=SUBJECT)), {}),
    (
        "attestation",
        lambda: make_index(
            AMD64, edit_index=_entry(platform={"os": "unknown", "architecture": "unknown"})
        ),
        {},
    ),
    ("nested-index", lambda: make_index(AMD64, edit_index=_entry(mediaType=OCI_INDEX)), {}),
    ("manifest-count", make_index, {}),
    (
        "manifest-count",
        lambda: make_index(AMD64, edit_index=lambda d: d.update(manifests=d["manifests"] * 65)),
        {},
    ),
    ("layer-count", make_image, {"limits": Limits(layers=1)}),
    ("layer-count", lambda: make_image(edit_manifest=lambda d: d.update(layers=[{}] * 128)), {}),
    ("layer-count", lambda: make_image(edit_config=_diff_ids(*[OTHER] * 128)), {}),
    ("platform", make_image, {"platform": "linux/arm64"}),
    ("platform", lambda: make_index(AMD64, ARM64), {"platform": "linux/s390x"}),
    (
        "platform",
        lambda: make_index(
            AMD64, edit_index=_entry(platform={"os": "linux", "architecture": "arm64"})
        ),
        {},
    ),
    ("diff-id-count", lambda: make_image(edit_config=_diff_ids(OTHER)), {}),
    ("diff-id", lambda: make_image(edit_config=_diff_ids(OTHER, OTHER)), {}),
    (
        "diff-id",
        lambda: make_image(
            tars=(HELLO_TAR, HELLO_TAR), edit_config=_diff_ids(OTHER, str(Digest.of(HELLO_TAR)))
        ),
        {},
    ),
    ("layer-stream", lambda: make_image(spoil_layer=lambda data: data[:-1]), {}),
    ("layer-stream", lambda: make_image(spoil_layer=lambda data: data + b"garbage"), {}),
    ("layer-stream", lambda: make_image(spoil_layer=lambda data: data + b"\0"), {}),
    (
        "layer-stream",
        lambda: make_image(compression="zstd", spoil_layer=lambda data: data + b"garbage"),
        {},
    ),
    ("layer-members", lambda: make_image(spoil_layer=lambda data: data + packed(b"", "gzip")), {}),
    ("layer-bytes", make_image, {"limits": Limits(layer_bytes=10239)}),
    ("layer-inflation", lambda: _of_tar(tar_of(("zeros", bytes(1 << 20)))), {}),
    ("tar-header", lambda: _of_tar(b"x" + HELLO_TAR[1:]), {}),
    ("tar-type", lambda: _of_tar(_relabelled(b"V")), {}),
    ("tar-size", lambda: _of_tar(_sized_link()), {}),
    ("tar-pax", lambda: _of_tar(_global_header(path="elsewhere")), {}),
    ("tar-sparse", lambda: _of_tar(_relabelled(b"S")), {}),
    ("tar-truncated", lambda: _of_tar(MORE_TAR[:2000]), {}),
    ("tar-trailing", lambda: _of_tar(HELLO_TAR + b"x"), {}),
    ("entry-count", make_image, {"limits": Limits(layer_entries=5)}),
    ("entry-path-length", make_image, {"limits": Limits(path_bytes=200)}),
    ("entry-escape", lambda: _of_tar(tar_of(("a/../../b", b""))), {}),
    ("hard-link-escape", lambda: _of_tar(tar_of(entry("a", tarfile.LNKTYPE, "../b"))), {}),
]


def _sized_link() -> bytes:
    info = entry("link", tarfile.SYMTYPE, "target")
    info.size = 512
    return info.tobuf() + bytes(2048)


def _global_header(**records: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers=records) as archive:
        archive.addfile(tarfile.TarInfo("file"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rule", "make", "options"), BROKEN, ids=[f"{n}-{row[0]}" for n, row in enumerate(BROKEN)]
)
def test_an_image_that_breaks_one_rule_is_refused_by_it(
    rule: str,
    make: Callable[[], StagedImage],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    staged = make()
    if rule == "layer-inflation":
        check(staged, **options)  # what is small may be as dense as it likes
        monkeypatch.setattr(layercheck, "FREE_BYTES", 1 << 19)
    if rule == "layer-members":
        check(staged, **options)
        monkeypatch.setattr(inflate, "MEMBERS", 1)
    assert broken_rule(staged, **options) == rule


def test_the_table_has_every_rule_that_the_verifier_lists() -> None:
    lines = re.findall(r"^ {8}([a-z-]+(?:, [a-z-]+)*):", ImageVerifier.__doc__ or "", re.MULTILINE)
    assert {row[0] for row in BROKEN} == {rule for line in lines for rule in line.split(", ")}


def test_no_one_else_makes_a_verified_image() -> None:
    image = check(make_image())
    parts = (image.root, image.documents, image.media_types, image.blobs_needed, image.source)
    with pytest.raises(TypeError, match="only"):
        VerifiedImage(*parts, platforms=image.platforms, special=image.special)
    with pytest.raises(TypeError, match="only"):
        replace(image, root=Descriptor(OCI_MANIFEST, Digest(OTHER), 1), key=None)
    with pytest.raises(TypeError):
        image.documents[image.root.digest] = b"{}"  # type: ignore[index]  # that is the claim


def test_the_verifier_refuses_to_be_driven_out_of_order() -> None:
    staged = make_image()
    image = check(staged)
    config, layer, _ = image.blobs_needed
    data = staged.blobs.open(staged.root.digest).read()
    verifier = ImageVerifier(staged.root, limits=Limits())
    steps: list[Callable[[], object]] = [
        lambda: verifier.config(config, b""),
        lambda: verifier.layer(layer),
        lambda: verifier.verified(staged.blobs),
        lambda: verifier.document(config, b""),
    ]
    for step in steps:
        with pytest.raises(RuntimeError):
            step()
    verifier.document(staged.root, data)
    with pytest.raises(RuntimeError):
        verifier.document(staged.root, data)
    with pytest.raises(RuntimeError):
        verifier.layer(layer)


def test_the_verifier_itself_checks_sizes_whoever_drives_it() -> None:
    staged = make_image(tars=(HELLO_TAR,))
    config, layer = check(staged).blobs_needed
    data = {d.digest: staged.blobs.open(d.digest).read() for d in (staged.root, config, layer)}
    verifier = ImageVerifier(staged.root, limits=Limits())
    with pytest.raises(VerificationFailed, match="blob-size"):
        verifier.document(staged.root, data[staged.root.digest] + b" ")
    verifier.document(staged.root, data[staged.root.digest])
    with pytest.raises(VerificationFailed, match="blob-size"):
        verifier.config(config, data[config.digest][:-1])
    verifier.config(config, data[config.digest])
    with pytest.raises(VerificationFailed, match="blob-size"):
        verifier.layer(layer).feed(data[layer.digest] + b" ")
    short = verifier.layer(layer)
    short.feed(data[layer.digest][:-1])
    with pytest.raises(VerificationFailed, match="blob-size"):
        short.finish()
    assert verifier.layers_wanted == (layer,)


def test_an_index_need_not_say_what_its_images_run_on() -> None:
    staged = make_index(AMD64, edit_index=lambda d: d["manifests"][0].pop("platform"))
    assert check(staged).platforms == ("linux/amd64",)


def test_going_on_after_an_error_leads_nowhere() -> None:
    staged = make_image(tars=())
    verifier = ImageVerifier(staged.root, limits=Limits(), platform="linux/arm64")
    verifier.document(staged.root, staged.blobs.open(staged.root.digest).read())
    (config,) = verifier.configs_wanted
    with pytest.raises(VerificationFailed):
        verifier.config(config, staged.blobs.open(config.digest).read())
    with pytest.raises(VerificationFailed):
        verifier.verified(staged.blobs)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
@pytest.mark.parametrize("piece", [1, 7, 511, 512, 513, 100_000])
def test_chunk_boundaries_never_matter(compression: str, piece: int) -> None:
    staged = make_image(compression=compression, tars=(MORE_TAR,))
    verifier = ImageVerifier(staged.root, limits=Limits())
    verifier.document(staged.root, staged.blobs.open(staged.root.digest).read())
    (config,) = verifier.configs_wanted
    verifier.config(config, staged.blobs.open(config.digest).read())
    (layer,) = verifier.layers_wanted
    data = staged.blobs.open(layer.digest).read()
    checked = verifier.layer(layer)
    for start in range(0, len(data), piece):
        assert verifier.layers_wanted
        checked.feed(data[start : start + piece])
    checked.finish()
    assert verifier.verified(staged.blobs).root == staged.root


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_layer_of_several_members_passes(compression: str) -> None:
    halves = HELLO_TAR[:3000], HELLO_TAR[3000:]
    blob = b"".join(packed(half, compression) for half in halves)
    check(make_image(tars=(HELLO_TAR,), compression=compression, spoil_layer=lambda _: blob))


def test_a_skippable_frame_is_no_garbage() -> None:
    frame = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"toc"
    check(make_image(compression="zstd", spoil_layer=lambda data: data + frame))


def test_a_bomb_is_stopped_before_it_was_unpacked() -> None:
    bomb = gzip.compress(bytes(64 << 20), mtime=0)
    read: list[int] = []
    staged = make_image(
        tars=(HELLO_TAR,), spoil_layer=lambda _: packed(HELLO_TAR, "gzip") + bomb * 200
    )
    assert (
        broken_rule(staged, limits=Limits(layer_bytes=20 << 20), progress=read.append)
        == "layer-bytes"
    )
    assert sum(read) < 3 << 20


def test_progress_can_cancel() -> None:
    class Stop(Exception):
        pass

    def stop(_: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        check(make_image(), progress=stop)


def test_an_image_by_sha512_passes() -> None:
    import hashlib

    blobs = MemoryBlobs()

    def by_sha512(document: dict[str, Any]) -> None:
        for item in (document["config"], *document["layers"]):
            data = blobs.blobs[Digest(item["digest"])]
            item["digest"] = "sha512:" + hashlib.sha512(data).hexdigest()
            blobs.blobs[Digest(item["digest"])] = data

    make_image(blobs=blobs)
    check(make_image(blobs=blobs, edit_manifest=by_sha512))


def test_hashed_chunks_notice_a_blob_that_changed() -> None:
    staged = make_image()
    (_, layer, _) = check(staged).blobs_needed
    assert b"".join(hashed.hashed_chunks(staged.blobs, layer)) == packed(HELLO_TAR, "gzip")
    changed = _swapped(staged, 1, _flipped)
    with pytest.raises(VerificationFailed) as caught:
        list(hashed.hashed_chunks(changed.blobs, layer))
    assert caught.value.rule == "blob-digest"


SOUND = make_image()
SOUND_MANIFEST = SOUND.blobs.open(SOUND.root.digest).read()
INTERESTING = [b'"', b"{", b"}", b"[", b",", b"0", b"-", b"null", b"\\", b"\xff", b"\0", b"urls"]


@given(
    position=st.integers(0, len(SOUND_MANIFEST)),
    length=st.integers(0, 20),
    with_=st.one_of(st.binary(max_size=10), st.sampled_from(INTERESTING)),
)
def test_a_mutated_manifest_is_refused_or_sound(position: int, length: int, with_: bytes) -> None:
    data = SOUND_MANIFEST[:position] + with_ + SOUND_MANIFEST[position + length :]
    blobs = MemoryBlobs(dict(SOUND.blobs.blobs))  # type: ignore[attr-defined]  # MemoryBlobs
    root = Descriptor(OCI_MANIFEST, blobs.add(data), len(data))
    try:
        image = check(StagedImage(root, blobs))
    except VerificationFailed:
        return
    for digest, document in image.documents.items():
        assert Digest.of(document) == digest
    for needed in image.blobs_needed:
        blob = blobs.open(needed.digest).read()
        assert (Digest.of(blob), len(blob)) == (needed.digest, needed.size)


@given(
    data=st.binary(max_size=200),
    position=st.integers(0, 400),
    compression=st.sampled_from(["", "gzip", "zstd"]),
)
def test_a_mutated_layer_is_refused_or_unpacks_to_the_same(
    data: bytes, position: int, compression: str
) -> None:
    def spoil(blob: bytes) -> bytes:
        return blob[:position] + data + blob[position + len(data) :]

    staged = make_image(tars=(HELLO_TAR,), compression=compression, spoil_layer=spoil)
    try:
        image = check(staged)
    except VerificationFailed:
        return
    # Headers of streams hold times, names and window sizes that do not change what comes out.
    blob = staged.blobs.open(image.blobs_needed[1].digest).read()
    assert _unpacked(blob, compression) == HELLO_TAR


def _unpacked(blob: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.decompress(blob)
    if compression == "zstd":
        stream = zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True)
        return stream.read()
    return blob


# -- layers that were checked before ---------------------------------------------------------------


def vouched_for(staged: StagedImage) -> list[CheckedLayer]:
    """Every layer of the image, as whoever checked it before would say."""
    documents = check(staged).documents
    (manifest,) = (json.loads(data) for data in documents.values())
    with staged.blobs.open(Digest(manifest["config"]["digest"])) as stream:
        diff_ids = json.load(stream)["rootfs"]["diff_ids"]
    return [
        CheckedLayer(Digest(layer["digest"]), layer["size"], "gzip", Digest(diff_id))
        for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True)
    ]


@dataclass(frozen=True)
class Counted(MemoryBlobs):
    """Notes what was read."""

    opened: list[Digest] = field(default_factory=list)

    def open(self, digest: Digest) -> BinaryIO:
        self.opened.append(digest)
        return super().open(digest)


def read_with(staged: StagedImage, vouched: list[CheckedLayer]) -> list[Digest]:
    assert isinstance(staged.blobs, MemoryBlobs)
    blobs = Counted(staged.blobs.blobs)
    verify.verify(
        replace(staged, blobs=blobs), limits=Limits(), platform=None, claimed=None, vouched=vouched
    )
    return blobs.opened


def test_a_layer_that_was_checked_before_is_not_read_again() -> None:
    staged = make_image(compression="gzip")
    vouched = vouched_for(staged)
    read = read_with(staged, vouched)
    assert not {layer.digest for layer in vouched} & set(read)
    assert len(read) == 2, "the manifest and the configuration"


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 1},
        {"compression": ""},
        {"diff_id": Digest.of(b"another")},
        {"digest": Digest.of(b"another")},
    ],
)
def test_nothing_but_the_very_layer_is_vouched_for(changed: dict[str, Any]) -> None:
    staged = make_image(compression="gzip")
    vouched = vouched_for(staged)
    other = [replace(layer, **changed) for layer in vouched]
    assert {layer.digest for layer in vouched} <= set(read_with(staged, other))


def test_a_layer_that_is_vouched_for_must_be_there() -> None:
    staged = make_image(compression="gzip")
    (layer, *_) = vouched = vouched_for(staged)
    assert isinstance(staged.blobs, MemoryBlobs)
    del staged.blobs.blobs[layer.digest]
    with pytest.raises(VerificationFailed) as caught:
        read_with(staged, vouched)
    assert caught.value.rule == "blob-missing"


def test_the_lowest_layers_are_told_from_others() -> None:
    staged = make_image()
    image = check(staged)
    lowest, upper = (layer.digest for layer in vouched_for(staged))
    assert image.begins_with(())
    assert image.begins_with((lowest,))
    assert image.begins_with((lowest, upper))
    assert not image.begins_with((upper,))
    assert not image.begins_with((lowest, upper, lowest))
