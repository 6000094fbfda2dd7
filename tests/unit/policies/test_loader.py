import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import loader
from policies.document import LimitsDocument, PolicyDocument
from policies.errors import PolicyInvalid
from policies.loader import LIBRARY, parse, read, shipped, stated
from policies.model import Isolation, Limits, canonical_json

HEAD = "apiVersion: runner/v1alpha1\nname: x\n"
SOUND = HEAD + "default: {isolation: kata, limits: {pids: 7}}\n"


def test_a_policy_is_known_by_what_it_says_not_by_its_bytes() -> None:
    policy = parse(SOUND.encode(), "here")
    assert policy.source == "here"
    assert policy.document.default is not None
    assert policy.document.default.isolation is Isolation.KATA
    assert parse(f"# remark\n{SOUND}".encode(), "there").digest == policy.digest
    assert parse(SOUND.replace("pids: 7", "pids: 8").encode(), "here").digest != policy.digest


def test_what_is_shown_of_a_policy_is_the_same_policy() -> None:
    policy = shipped("default")
    again = parse(canonical_json(stated(policy.document)), "again")
    assert again.document == policy.document
    assert again.digest == policy.digest


def test_every_limit_can_be_stated() -> None:
    assert set(LimitsDocument.model_fields) == set(Limits.__dataclass_fields__)


def test_the_shipped_default_is_safe_for_hostile_code() -> None:
    policy = shipped("default").document
    assert policy.default is not None
    assert policy.default.isolation is Isolation.GVISOR
    assert policy.default.pull_credentials == ()
    assert policy.default.fallback is None


RULES = (
    HEAD
    + """\
extends: default
deny:
  - name: forks
    when: source.fork
floors:
  - {name: night, when: time.hour > 20, isolation: kata}
rules:
  - name: release
    when: |
      trust == 'trusted' &&
        source.ref.glob('refs/tags/*')
    then: {limits: {pids: 9}}
"""
)


def test_a_policy_adds_to_what_it_extends() -> None:
    base, policy = shipped("default"), parse(RULES.encode(), "here")
    document = policy.document
    assert document.extends is None
    assert document.default == base.document.default
    assert [rule.name for rule in document.floors] == ["gvisor", "night"]
    assert policy.origins["floors/gvisor"][0] == "default"
    assert policy.origins["floors/night"] == ("x", 8)
    whens = [
        *(rule.when for rule in document.deny),
        *(rule.when for rule in document.floors if rule.when is not None),
        *(rule.when for rule in document.rules),
    ]
    assert set(policy.conditions) == set(whens)


def test_a_policy_replaces_the_terms_of_what_it_extends_one_by_one() -> None:
    text = HEAD + "extends: default\ndefault: {base_images: [a.b/c], limits: {pids: 9}}\n"
    default = parse(text.encode(), "here").document.default
    assert default is not None
    assert default.base_images == ("a.b/c",)
    assert default.builders == ("buildah",)
    assert (default.limits.pids, default.limits.wall_seconds) == (9, 3600)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("when: source.fork", "when: source.frok", "here:6:17: deny.0.when: undeclared"),
        ("when: source.fork", "when: 'source.frok'", "here:6:18: deny.0.when: undeclared"),
        ("when: source.fork", "when: tenant", "here:6:11: deny.0.when: not true or false"),
        ("trust == 'trusted' &&", "trust == 5 &&", "here:12:13: rules.0.when: found no"),
        ("refs/tags/*')", "refs/tags/*', 1)", "here:13:24: rules.0.when: undeclared"),
        ("time.hour > 20,", "time.hour + 1 > 20,", "here:8:35: floors.0.when: '+' is not"),
        ("name: forks", "name: Forks", "here:5:11: deny.0.name: "),
        ("pids: 9", "pids: x", "here:14:27: rules.0.then.limits.pids: "),
        ("extends: default", "extends: nobody", "here:3:10: extends one of default"),
        ("name: night", "name: gvisor", "here:8:3: default has a rule gvisor already"),
        ("    then:", "    else:", "here:10:5: rules.0.then: Field required"),
        (
            "rules:", "rules:\n  - {name: release, then: {}}",
            "here:11:11: a second rule release",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_when_the_policy_is_read(old: str, new: str, says: str) -> None:
    assert old in RULES
    parse(RULES.encode(), "here")
    with pytest.raises(PolicyInvalid) as caught:
        parse(RULES.replace(old, new).encode(), "here")
    assert caught.value.message.startswith(says)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ("isolation: gvisor, fallback: gvisor", "stronger"),
        ("isolation: kata, fallback: gvisor", "stronger"),
        ("fallback: weaker", "fallback"),
        ('destinations: ["a.b/{team}/*"]', "no braces but {tenant}"),
        ('destinations: ["a.b/ c"]', "no spaces"),
        ("egress: [{hosts: [a.b], preset: pip}]", "either hosts or a preset"),
        ("egress: [{}]", "either hosts or a preset"),
        ("egress: [{preset: nix}]", "preset"),
        ("egress: [{hosts: ['a.*.b']}]", "host name"),
        ("egress: [{hosts: ['*']}]", "host name"),
        ("egress: [{hosts: [A.b]}]", "host name"),
        ("egress: [{hosts: [a.b], ports: []}]", "ports"),
        ("egress: [{hosts: [a.b], ports: [65536]}]", "ports"),
        ("egress: [{hosts: [a.b], methods: [get]}]", "methods"),
        ("egress: [{hosts: [a.b], private_ranges: [10.0.0.1/8]}]", "host bits"),
        ("priority: 101", "priority"),
        ("cache: all", "none, read, write"),
        ("trust: trusted", "trust"),
    ],
)
def test_terms_without_meaning_are_refused(terms: str, says: str) -> None:
    with pytest.raises(PolicyInvalid) as caught:
        parse(f"{HEAD}default: {{{terms}}}".encode(), "here")
    assert says in caught.value.message


def test_egress_rules_are_read_as_decisions_have_them() -> None:
    text = HEAD + "default: {egress: [{hosts: ['*.a.b', c], ports: [80], methods: [GET]}]}"
    default = parse(text.encode(), "here").document.default
    assert default is not None
    assert default.egress is not None
    rule = default.egress[0].rule()
    assert (rule.hosts, rule.ports, rule.methods) == (("*.a.b", "c"), (80,), ("GET",))


def test_every_policy_of_the_library_can_be_extended() -> None:
    for name in LIBRARY:
        text = HEAD + f"extends: {name}\n"
        assert parse(text.encode(), "here").document.default == shipped(name).document.default


def test_long_files_are_read_in_linear_time() -> None:
    long = (
        HEAD
        + "deny:\n"
        + "".join(f"  - name: r{n}\n    when: |\n      true\n" for n in range(1000))
    )
    lines = len(long.splitlines())
    seen = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal seen
        seen += 1

    sys.setprofile(count)
    try:
        parse(long.encode(), "here")
    finally:
        sys.setprofile(None)
    assert seen < lines * 1000


def test_a_policy_needs_nothing_but_a_name() -> None:
    assert parse(HEAD.encode(), "here").document == PolicyDocument(
        api_version="runner/v1alpha1", name="x"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "document"),
        (HEAD + "deny:\n  - name: a\n    when:\n", "here:5:10: deny.0.when: nothing stands"),
        (HEAD + "default: {base_images: ~}", "default.base_images: nothing stands"),
        (HEAD + "default: {destinations: [a.b/c, null]}", "destinations.1: nothing stands"),
        (HEAD + 'default: {nonroot: "no"}', "nonroot"),
        (HEAD + "default: {rootless: 1}", "rootless"),
        (HEAD + "default: {provenance: 0}", "provenance"),
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
        (SOUND + "floors: none", "floors"),
        (SOUND + "extra: 1", "extra"),
        (SOUND + "deny: []\ndeny: []", "duplicate key"),
        (SOUND + "3: kata", "no text"),
        (SOUND + "? [a]\n: b", "no text"),
        (SOUND.replace("pids: 7", "pids: 0"), "pids"),
        (SOUND.replace("pids: 7", "pids: -1"), "pids"),
        (SOUND.replace("pids: 7", "pids: true"), "pids"),
        (SOUND.replace("pids: 7", 'pids: "7"'), "pids"),
        (SOUND.replace("pids: 7", "pids: 7.5"), "pids"),
        (SOUND.replace("pids: 7", "pid: 7"), "pid"),
        (SOUND.replace("pids: 7", "pids: 7, pids: 8"), "duplicate key"),
        (HEAD + "default: {network: internet}", "none, registries, egress"),
        (HEAD + "default: {base_images: debian}", "base_images"),
        (HEAD + "default: {base_images: [1]}", "base_images"),
        (HEAD + 'default: {base_images: [""]}', "base_images"),
        (HEAD + f"default: {{base_images: [{'x' * 1025}]}}", "base_images"),
        (HEAD + f"default: {{base_images: [{'x,' * 10_001}]}}", "base_images"),
        (HEAD + "default: &a {}\n", None),
        (HEAD + "default: &a {}\nfloors: *a", "aliases"),
        (HEAD + "a: &a [x]\nb: *a", "aliases"),
        (HEAD + "default: !!map [a]", "tags"),
        (HEAD + "default: !!timestamp x", "tags"),
        (HEAD + "default: !!bool x", "tags"),
        (HEAD + "default: !!python/object/apply:os.getcwd []", "tags"),
        (HEAD + "default: {", "here"),
        (HEAD + "---\ndefault: {}", "here"),
        ("[" * 5000, "recursion"),
        ("#" * (loader.MOST_BYTES + 1), "longer"),
    ],
)
def test_what_means_nothing_is_refused(text: str, says: str | None) -> None:
    if says is None:
        parse(text.encode(), "here")
        return
    with pytest.raises(PolicyInvalid) as caught:
        parse(text.encode(), "here")
    assert caught.value.message.startswith("here:")
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
        os.ftruncate(file.fileno(), loader.MOST_BYTES + 100)
    with pytest.raises(PolicyInvalid, match=str(path)):
        read(path)
    with pytest.raises(PolicyInvalid, match="directory"):
        read(tmp_path)
