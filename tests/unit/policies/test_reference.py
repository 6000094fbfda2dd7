import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from policies.errors import InvalidReference
from policies.reference import Digest, ImageReference

HEX = "a" * 64

hosts = st.from_regex(r"\A[a-z0-9]{1,8}(\.[a-z0-9]{1,8}){1,2}(:[1-9][0-9]{0,4})?\Z")
repositories = st.from_regex(r"\A[a-z0-9]{1,8}([._-][a-z0-9]{1,8})?(/[a-z0-9]{1,8}){0,3}\Z")
tags = st.from_regex(r"\A[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}\Z")
digests = st.binary(max_size=8).map(Digest.of)
references = st.builds(
    ImageReference, hosts, repositories, st.none() | tags, st.none() | digests
)  # fmt: skip


@given(references)
def test_a_reference_reads_back_what_it_writes(reference: ImageReference) -> None:
    assert ImageReference.parse(str(reference)) == reference


def test_a_registry_is_asked_for_a_digest_or_a_tag() -> None:
    digest = Digest.of(b"")
    for text, explicit, pulled in (
        ("a.b/c", "a.b/c:latest", "a.b/c:latest"),
        ("a.b/c:1", "a.b/c:1", "a.b/c:1"),
        (f"a.b/c@{digest}", f"a.b/c@{digest}", f"a.b/c@{digest}"),
        (f"a.b/c:1@{digest}", f"a.b/c:1@{digest}", f"a.b/c@{digest}"),
    ):
        image = ImageReference.parse(text)
        assert (str(image.explicit()), str(image.pulled())) == (explicit, pulled)


@given(st.text(max_size=300))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = ImageReference.parse(text)
    except InvalidReference:
        return
    assert ImageReference.parse(str(reference)) == reference
    assert str(reference).isascii()
    assert not set(str(reference)) & set(" \n\t\0\\\"'$`*?;|&<>(){}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", "docker.io/library/debian"),
        ("debian:12", "docker.io/library/debian:12"),
        ("acme/app", "docker.io/acme/app"),
        ("docker.io/debian", "docker.io/library/debian"),
        ("index.docker.io/debian", "docker.io/library/debian"),
        ("localhost/app", "localhost/app"),
        ("localhost:5000/acme/app:1", "localhost:5000/acme/app:1"),
        ("Registry.Example.COM/app", "registry.example.com/app"),
        ("[::1]:5000/app", "[::1]:5000/app"),
        ("Docker.io/debian", "docker.io/library/debian"),
        (f"a.b/c:1@sha256:{HEX}", f"a.b/c:1@sha256:{HEX}"),
        (f"a.b/c@sha512:{HEX * 2}", f"a.b/c@sha512:{HEX * 2}"),
        (f"a.b/{'c' * 251}", f"a.b/{'c' * 251}"),
        (f"a.b/c:{'T' * 128}", f"a.b/c:{'T' * 128}"),
    ],
)
def test_a_reference_is_written_out_in_full(text: str, expected: str) -> None:
    assert str(ImageReference.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "@", "/", "a.b/", "a.b//c", "a.b/c:", "a.b/c@", "a.b/c:-x", "a.b/c:.x",
        "a.b/c d", "a.b/c\n", "a.b/c:1\n", "a.b/C", "a.b/../c", "a.b/c/", "-a.b/c", "a.b/-c",
        "a.b/c:1:2", "a.b:port/c", "a.b:123456/c", "user@a.b/c", "http://a.b/c", "a.b/c?x",
        "a.b/c%2f", "a.b/__c", "a..b/c", "é.b/c", "a.b/c\u0660", "a.b/c:\u0660",
        f"a.b/{'c' * 252}", f"a.b/c:{'T' * 129}", f"a.b/c@sha256:{HEX[1:]}",
        f"a.b/c@sha256:{HEX}a", f"a.b/c@sha256:{HEX.upper()}", f"a.b/c@md5:{'a' * 32}",
        f"a.b/c@sha256:{HEX}@sha256:{HEX}", "x" * 1025, "FOO/bar", "Foo/bar:1",
        "a.b:0443/c", "a.b:0/c",
    ],
)  # fmt: skip
def test_what_is_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        ImageReference.parse(text)
    assert len(caught.value.message) < 1000
    assert caught.value.advice


def test_by_digest_the_tag_is_gone() -> None:
    digest = Digest.of(b"x")
    reference = ImageReference.parse("a.b/c:1").at(digest)
    assert (reference.name, reference.tag, reference.digest) == ("a.b/c", None, digest)


def test_a_digest_knows_its_parts() -> None:
    digest = Digest.of(b"x")
    assert (digest.algorithm, digest.hex) == ("sha256", hashlib.sha256(b"x").hexdigest())
    assert digest == f"sha256:{digest.hex}"


@pytest.mark.parametrize("text", ["", "sha256:", f"sha256:{HEX}\n", f"SHA256:{HEX}", "x" * 2000])
def test_no_digest_is_malformed(text: str) -> None:
    with pytest.raises(InvalidReference):
        Digest(text)


def test_models_take_digests_and_refuse_what_is_none() -> None:
    class Model(BaseModel):
        digest: Digest

    assert isinstance(Model.model_validate({"digest": f"sha256:{HEX}"}).digest, Digest)
    for wrong in ("sha256:x", 3, None):
        with pytest.raises(ValidationError):
            Model.model_validate({"digest": wrong})
