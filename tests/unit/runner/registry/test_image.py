"""Documents are read strictly. ``test_verify`` has the rules on whole images."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.registry.image import (
    CONFIG_BYTES,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_document,
    parse_index,
    parse_manifest,
)
from runner.registry.strictjson import DEPTH, VALUES, parse
from tests.support.images import make_image, make_index


def manifest_bytes(**options: Any) -> bytes:
    staged = make_image(**options)
    return staged.blobs.open(staged.root.digest).read()


def index_bytes(**options: Any) -> bytes:
    staged = make_index(("linux", "amd64", None), ("linux", "arm64", "v8"), **options)
    return staged.blobs.open(staged.root.digest).read()


def config_bytes(**changes: Any) -> bytes:
    config = {
        "architecture": "arm64",
        "os": "linux",
        "variant": "v8",
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(b"a"))]},
    }
    return json.dumps(config | changes).encode()


def test_a_manifest_gives_its_descriptors_in_order() -> None:
    data = manifest_bytes()
    manifest = parse_document(data, OCI_MANIFEST)
    assert isinstance(manifest, Manifest)
    assert [str(d.digest) for d in (manifest.config, *manifest.layers)] == [
        d["digest"] for d in (json.loads(data)["config"], *json.loads(data)["layers"])
    ]
    assert manifest.subject is None


def test_an_index_gives_its_entries_with_their_platforms() -> None:
    index = parse_document(index_bytes(), OCI_INDEX)
    assert isinstance(index, Index)
    assert [entry.platform for entry in index.manifests] == [
        Platform("linux", "amd64"),
        Platform("linux", "arm64", "v8"),
    ]


def test_an_entry_needs_no_platform() -> None:
    data = index_bytes(edit_index=lambda d: d["manifests"][0].pop("platform"))
    assert parse_index(data, OCI_INDEX).manifests[0].platform is None


def test_attestations_in_an_index_of_others_are_told_apart() -> None:
    unknown = {"os": "unknown", "architecture": "unknown"}
    data = index_bytes(edit_index=lambda d: d["manifests"][1].update(platform=unknown))
    entries = parse_index(data, OCI_INDEX).manifests
    assert [entry.is_attestation for entry in entries] == [False, True]


def test_a_subject_is_shown() -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"a")), "size": 1}
    data = manifest_bytes(edit_manifest=lambda d: d.update(subject=subject))
    found = parse_manifest(data, OCI_MANIFEST).subject
    assert found is not None
    assert found.digest == Digest.of(b"a")


def test_a_configuration_gives_its_platform_and_diff_ids() -> None:
    config = parse_config(config_bytes())
    assert str(config.platform) == "linux/arm64/v8"
    assert config.diff_ids == (Digest.of(b"a"),)
    assert parse_config(config_bytes(variant="")).variant is None
    assert parse_config(config_bytes(variant=None)).variant is None


@pytest.mark.parametrize("media_type", ["", "application/json", "\x1b[2J"])
def test_other_documents_are_not_read(media_type: str) -> None:
    with pytest.raises(VerificationFailed, match="media-type") as caught:
        parse_document(manifest_bytes(), media_type)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("docker", [False, True])
def test_only_oci_documents_may_leave_out_their_media_type(docker: bool) -> None:
    manifest = manifest_bytes(docker=docker, edit_manifest=lambda d: d.pop("mediaType"))
    index = index_bytes(docker=docker, edit_index=lambda d: d.pop("mediaType"))
    if not docker:
        parse_manifest(manifest, OCI_MANIFEST)
        parse_index(index, OCI_INDEX)
        return
    with pytest.raises(VerificationFailed, match="media-type"):
        parse_manifest(manifest, DOCKER_MANIFEST)
    with pytest.raises(VerificationFailed, match="media-type"):
        parse_index(index, DOCKER_LIST)


@pytest.mark.parametrize(
    ("stated", "other", "agree"),
    [
        (("linux", "arm", "v7"), ("linux", "arm", "v7"), True),
        (("linux", "arm", "v7"), ("linux", "arm", None), True),
        (("linux", "arm", None), ("linux", "arm", "v6"), True),
        (("linux", "arm", "v7"), ("linux", "arm", "v6"), False),
        (("linux", "arm", None), ("linux", "arm64", None), False),
        (("linux", "arm", None), ("windows", "arm", None), False),
    ],
)
def test_platforms_agree_but_for_a_missing_variant(
    stated: tuple[str, str, str | None], other: tuple[str, str, str | None], agree: bool
) -> None:
    assert Platform(*stated).agrees_with(Platform(*other)) is agree


NOT_JSON = [
    b"",
    b"{",
    b"{}{}",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xff"}',
    "{}".encode("utf-16"),
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1) + b"}",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a": [' + b"[]," * VALUES + b"0]}",
    b'{"a": "\n"}',
    b'{"a": 01}',
    b"{'a': 1}",
]


@pytest.mark.parametrize("data", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_bounded_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed) as caught:
        parse(data, most_bytes=CONFIG_BYTES)
    assert caught.value.rule == "json"
    assert caught.value.message.isprintable()


def test_json_may_be_as_deep_as_the_bound() -> None:
    parse(b'{"a": ' + b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1) + b"}", most_bytes=1000)


@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'"a"'])
def test_a_document_is_an_object(data: bytes) -> None:
    with pytest.raises(VerificationFailed, match="schema"):
        parse(data, most_bytes=100)


def test_a_document_over_its_size_is_not_even_decoded() -> None:
    with pytest.raises(VerificationFailed, match="document-size"):
        parse(b"\xff" * 101, most_bytes=100)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "\\u0061": 2}}',
        '{"b": [{"a": 1, "a": 1}]}',
    ],
)
def test_equal_keys_are_refused_at_any_depth(text: str) -> None:
    with pytest.raises(VerificationFailed, match="duplicate-key"):
        parse(text.encode(), most_bytes=100)


@pytest.mark.parametrize("key", ["Layers", "LAYERS", "layer\u017f", "MediaType"])
def test_keys_that_go_takes_for_a_known_one_are_refused(key: str) -> None:
    data = manifest_bytes(edit_manifest=lambda d: d.update({key: []}))
    with pytest.raises(VerificationFailed, match="duplicate-key"):
        parse_manifest(data, OCI_MANIFEST)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [], {}])
def test_integers_are_integers(value: object) -> None:
    data = manifest_bytes(edit_manifest=lambda d: d["config"].update(size=value))
    with pytest.raises(VerificationFailed, match="schema"):
        parse_manifest(data, OCI_MANIFEST)


@pytest.mark.parametrize("value", ["", "Linux", "../etc", "a b", "\x1b[0m", "x" * 65, 1, None])
def test_platforms_are_lower_case_words(value: object) -> None:
    with pytest.raises(VerificationFailed, match="schema"):
        parse_config(config_bytes(os=value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@given(
    name=st.sampled_from(["config", "layers", "mediaType", "subject", "manifests"]),
    value=json_values,
)
def test_any_value_anywhere_gives_a_manifest_or_verification_failed(name: str, value: Any) -> None:
    data = manifest_bytes(edit_manifest=lambda d: d.update({name: value}))
    try:
        parse_manifest(data, OCI_MANIFEST)
    except VerificationFailed as error:
        assert error.message.isprintable()  # noqa: PT017 - both ends are right


@given(value=json_values)
def test_unknown_members_are_left_alone(value: Any) -> None:
    data = json.dumps({**json.loads(manifest_bytes()), "org.example": value})
    if "NaN" not in data and "Infinity" not in data:
        parse_manifest(data.encode(), OCI_MANIFEST)
