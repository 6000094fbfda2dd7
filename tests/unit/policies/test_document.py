import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import document
from policies.document import parse, read, shipped
from policies.errors import PolicyInvalid
from policies.model import Isolation, Limits, Network
from policies.reference import Digest

HEAD = "apiVersion: runner/v1alpha1\nname: x\n"
SOUND = HEAD + "default: {isolation: kata, limits: {pids: 7}}\n"


def test_a_policy_is_read_with_the_digest_of_its_bytes() -> None:
    policy = parse(SOUND.encode(), "here")
    assert (policy.digest, policy.source) == (Digest.of(SOUND.encode()), "here")
    assert policy.document.default.isolation is Isolation.KATA
    assert policy.document.floor is Isolation.GVISOR
    assert policy.document.default.network is Network.REGISTRIES
    assert policy.document.default.limits.over(Limits()) == Limits(pids=7)


def test_every_limit_can_be_stated() -> None:
    fields = set(document.LimitsDocument.model_fields)
    assert fields == set(Limits.__dataclass_fields__)


def test_the_shipped_policy_is_safe_for_hostile_code() -> None:
    policy = shipped("default").document
    assert policy.floor is Isolation.GVISOR
    assert policy.default.isolation is Isolation.GVISOR
    assert policy.default.pull_credentials == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "document"),
        ("[]", "document"),
        ("3", "document"),
        ("default: {}", "apiVersion"),
        (SOUND.replace("v1alpha1", "v9"), "apiVersion"),
        (SOUND.replace("name: x", "name: X"), "name"),
        (SOUND.replace("name: x", 'name: "x\\n"'), "name"),
        (SOUND.replace("name: x", "name: 1"), "name"),
        (SOUND.replace("name: x", "name: 2026-13-45"), "month"),
        (SOUND.replace("name: x", "name: 0x_"), "here"),
        (SOUND.replace("kata", "runc"), "container, gvisor, kata"),
        (SOUND.replace("kata", "3"), "container, gvisor, kata"),
        (SOUND + "floor: none", "floor"),
        (SOUND + "extra: 1", "extra"),
        (SOUND + "floor: kata\nfloor: kata", "duplicate key"),
        (SOUND + "3: kata", "no text"),
        (SOUND + "? [a]\n: b", "no text"),
        (SOUND.replace("pids: 7", "pids: 0"), "pids"),
        (SOUND.replace("pids: 7", "pids: -1"), "pids"),
        (SOUND.replace("pids: 7", "pids: true"), "pids"),
        (SOUND.replace("pids: 7", 'pids: "7"'), "pids"),
        (SOUND.replace("pids: 7", "pids: 7.5"), "pids"),
        (SOUND.replace("pids: 7", "pid: 7"), "pid"),
        (SOUND.replace("pids: 7", "pids: 7, pids: 8"), "duplicate key"),
        (HEAD + "default: {network: internet}", "none, registries"),
        (HEAD + "default: {base_images: debian}", "base_images"),
        (HEAD + "default: {base_images: [1]}", "base_images"),
        (HEAD + 'default: {base_images: [""]}', "base_images"),
        (HEAD + f"default: {{base_images: [{'x' * 1025}]}}", "base_images"),
        (HEAD + f"default: {{base_images: [{'x,' * 10_001}]}}", "base_images"),
        (HEAD + "default: &a {}\n", None),
        (HEAD + "default: &a {}\nfloor: *a", "aliases"),
        (HEAD + "a: &a [x]\nb: *a", "aliases"),
        (HEAD + "default: !!map [a]", "tags"),
        (HEAD + "default: !!timestamp x", "tags"),
        (HEAD + "default: !!bool x", "tags"),
        (HEAD + "default: !!python/object/apply:os.getcwd []", "tags"),
        (HEAD + "default: {", "here"),
        (HEAD + "---\ndefault: {}", "here"),
        ("[" * 5000, "recursion"),
        ("#" * (document.MOST_BYTES + 1), "longer"),
    ],
)
def test_what_means_nothing_is_refused(text: str, says: str | None) -> None:
    if says is None:
        parse(text.encode(), "here")
        return
    with pytest.raises(PolicyInvalid) as caught:
        parse(text.encode(), "here")
    assert caught.value.message.startswith("here: ")
    assert says in caught.value.message


@given(st.binary(max_size=64) | st.text(alphabet="a1-:[]{}!&*?|>#% \n\t'\",.~_x", max_size=64))
def test_any_bytes_are_a_policy_or_invalid(data: bytes | str) -> None:
    with pytest.raises(PolicyInvalid):
        parse(data.encode() if isinstance(data, str) else data, "here")


def test_a_file_names_itself_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with pytest.raises(PolicyInvalid, match="No such file"):
        read(path)
    path.write_text(SOUND)
    assert read(path).source == str(path)
    with path.open("ab") as file:
        os.ftruncate(file.fileno(), document.MOST_BYTES + 100)
    with pytest.raises(PolicyInvalid, match=str(path)):
        read(path)
    with pytest.raises(PolicyInvalid, match="directory"):
        read(tmp_path)
