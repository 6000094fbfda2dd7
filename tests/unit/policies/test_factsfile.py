"""Facts survive being written: whoever reads them back decides the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.buildah import Buildah
from policies import loader
from policies.engine import decide
from policies.errors import PolicyInvalid
from policies.facts import (
    BaseFacts,
    BuilderFacts,
    BuildFacts,
    ContextFacts,
    DockerfileFacts,
    HostFacts,
    Identity,
    RequestFacts,
    SourceFacts,
    TimeFacts,
    Unknown,
)
from policies.factsfile import ASSUMED, MOST_BYTES, dump, over, parse, read
from policies.model import Denial, Isolation, plain
from policies.reference import Digest, ImageReference
from policies.vocabulary import FACTS, values

OPEN = loader.parse(
    b"""
apiVersion: runner/v1alpha1
name: open
trusted: [{name: someone, when: identity.name != ''}]
deny:
  - {name: secrets, when: size(dockerfile.secrets) > 1}
  - {name: triggers, when: "base.onbuild.exists(i, i.glob('*RUN*'))"}
  - {name: sunday, when: time.weekday == 7}
rules:
  - name: many
    when: "context.bytes > 3 || dockerfile.onbuild || 'a' in dockerfile.mounts"
    then: {priority: 7}
default:
  backends: ["**"]
  builders: ["**"]
  capabilities: ["C*"]
  network: egress
  base_images: ["**"]
  destinations: ["**"]
  frontends: ["a*"]
""",
    "open",
)
NARROW = loader.parse(
    b"""
apiVersion: runner/v1alpha1
name: narrow
default:
  backends: ["**"]
  builders: ["**"]
  capabilities: ["**"]
  base_images: ["a.b/**"]
  destinations: ["**"]
  frontends: ["**"]
""",
    "narrow",
)
POLICIES = [OPEN, NARROW, *map(loader.shipped, loader.LIBRARY)]

# What names of hostile files have: no text, no XML, no YAML, and two halves in JSON.
texts = st.text(max_size=6) | st.text(st.sampled_from("aCR\udcff\x7f\0\x1b😀é/"), max_size=6)
lists = st.lists(texts, max_size=3).map(tuple)
sets = st.frozensets(texts, max_size=3)
images = st.sampled_from(
    ["debian", "a.b/c:1", f"a.b:5000/c/d:1@{Digest.of(b'')}", "localhost/x"]
).map(ImageReference.parse)
some_images = st.lists(images, max_size=2).map(tuple)
counts = st.integers(0, 1 << 40)
maybe = st.none() | st.booleans()
spoilable = sorted({*DockerfileFacts.__dataclass_fields__} - {"unknown", "stages"})
unknowns = st.builds(Unknown, st.frozensets(st.sampled_from(spoilable), max_size=3), texts)


def as_readers_make_them(facts: DockerfileFacts) -> DockerfileFacts:
    """A frontend that cannot be told is none."""
    spoiled = any("frontend" in unknown.facts for unknown in facts.unknown)
    return replace(facts, frontend=None) if spoiled else facts


every_facts = st.builds(
    BuildFacts,
    identity=st.builds(Identity, kind=texts, name=texts),
    tenant=st.none() | st.sampled_from(["", "acme", "a-1"]),
    source=st.builds(
        SourceFacts, kind=texts, url=st.none() | texts, ref=st.none() | texts,
        pull_request=maybe, fork=maybe, signed=maybe,
    ),
    dockerfile=st.builds(
        DockerfileFacts, frontend=st.none() | texts.filter(bool), images=some_images,
        remote_adds=lists, mounts=sets, networks=sets, secrets=sets, build_args=sets,
        securities=st.sampled_from([frozenset(), frozenset({"insecure"})]),
        docker_only=st.sampled_from([frozenset(), frozenset({"ONBUILD"})]),
        unknown=st.lists(unknowns, max_size=2).map(tuple),
    ).map(as_readers_make_them),
    base=st.just(BaseFacts()) | st.builds(BaseFacts, resolved=st.just(True), onbuild=lists),
    context=st.builds(ContextFacts, bytes=counts, entries=counts, links_leaving=st.none() | lists),
    destinations=some_images,
    builder=st.builds(
        BuilderFacts, name=texts, digest=st.none() | st.just(Digest.of(b"")), uid=counts,
        capabilities=st.sampled_from([(), ("CHOWN",), ("SYS_ADMIN",)]), frontends=st.booleans(),
    ),
    request=st.builds(
        RequestFacts, untrusted=st.booleans(), backend=texts, platform=texts, target=texts,
        build_args=lists, wall_seconds=st.none() | st.integers(1, 1 << 40),
        memory_bytes=st.none() | st.integers(1, 1 << 40),
        cpu_millis=st.none() | st.integers(1, 1 << 40),
    ),
    host=st.builds(
        HostFacts, isolations=st.frozensets(st.sampled_from(Isolation)), egress=st.booleans(),
        provenance=st.booleans(), rootless=st.booleans(),
    ),
    time=st.none() | st.datetimes(timezones=st.timezones()).map(TimeFacts.at),
)  # fmt: skip


@given(every_facts)
def test_what_is_read_back_is_decided_the_same(facts: BuildFacts) -> None:
    again = parse(json.loads(json.dumps(dump(facts))))
    assert values(again) == values(facts)
    for policy in POLICIES:
        assert decide([policy], again) == decide([policy], facts)


@given(every_facts)
def test_what_was_written_twice_is_the_same(facts: BuildFacts) -> None:
    assert dump(parse(dump(facts))) == dump(facts)


@pytest.mark.parametrize(
    ("known", "spoiled", "rule"),
    [
        (DockerfileFacts(images=(ImageReference.parse("debian"),)), "images", "base_images"),
        (DockerfileFacts(securities=frozenset({"insecure"})), "securities", "security"),
    ],
)
def test_what_is_known_to_be_denied_still_is_where_more_is_unknown(
    known: DockerfileFacts, spoiled: str, rule: str
) -> None:
    dockerfile = replace(known, unknown=(Unknown(frozenset({spoiled}), "and more"),))
    again = parse(dump(replace(parse(ASSUMED), dockerfile=dockerfile)))
    denial = decide([NARROW], again)
    assert isinstance(denial, Denial)
    assert denial.rule == rule


def test_a_document_has_every_name_of_the_vocabulary() -> None:
    document = dump(replace(BuildFacts(), base=BaseFacts(resolved=True)))
    names = {
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in document.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    for_the_engine = {"builder.uid", "builder.capabilities", "builder.frontends"}
    for_the_engine |= {"host.egress", "host.provenance", "host.rootless"}
    assert names == {*FACTS, *for_the_engine} - {"identity.authenticated"}


def test_what_is_left_out_has_its_default() -> None:
    assert parse({}) == BuildFacts()
    assert parse({"source": {}, "dockerfile": {}, "base": {}, "time": {}}) == BuildFacts()


def test_null_spoils_what_the_dockerfile_says_and_keeps_what_is_known() -> None:
    found = parse({"dockerfile": {"images": ["debian", None], "onbuild": None, "mounts": None}})
    assert [str(image) for image in found.dockerfile.images] == ["docker.io/library/debian"]
    (unknown,) = found.dockerfile.unknown
    assert unknown.facts == {"images", "docker_only", "mounts"}
    known = values(found)
    assert not {"dockerfile.images", "dockerfile.onbuild", "dockerfile.mounts"} & known.keys()
    assert known["dockerfile.secrets"] == ()


def test_sentences_about_the_unknown_are_kept() -> None:
    found = parse({"dockerfile": {"images": None, "unknown": ["line 1", "line 2"]}}).dockerfile
    assert [unknown.sentence for unknown in found.unknown] == ["line 1", "line 2"]
    assert [sorted(unknown.facts) for unknown in found.unknown] == [["images"], []]


@pytest.mark.parametrize("onbuild", [None, [], ["RUN x"]])
def test_base_images_are_resolved_where_their_triggers_are_stated(
    onbuild: list[str] | None,
) -> None:
    expected = BaseFacts(resolved=True, onbuild=None if onbuild is None else tuple(onbuild))
    assert parse({"base": {"onbuild": onbuild}}).base == expected


def test_a_request_that_asks_for_nothing_may_have_it_all() -> None:
    found = parse({"request": {"wall_seconds": 0, "memory_bytes": 5}}).request
    assert (found.wall_seconds, found.memory_bytes, found.cpu_millis) == (None, 5, None)


def test_the_weekday_follows_from_the_date() -> None:
    moment = TimeFacts(date="2024-02-29", hour=3, weekday=4)
    assert parse({"time": {"date": "2024-02-29", "hour": 3}}).time == moment
    assert parse({"time": {"date": "2024-02-29", "hour": 3, "weekday": 4}}).time == moment


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "facts"),
        ({"sauce": {}}, "facts.sauce: "),
        ({"source": None}, "facts.source: "),
        ({"source": {"frok": True}}, "facts.source.frok: "),
        ({"source": {"fork": "yes"}}, "facts.source.fork: "),
        ({"identity": {"authenticated": True}}, "facts.identity.authenticated: "),
        ({"identity": {"name": None}}, "facts.identity.name: "),
        ({"dockerfile": {"images": "debian"}}, "facts.dockerfile.images: "),
        ({"dockerfile": {"images": ["A B"]}}, "facts.dockerfile.images.0: not an image"),
        ({"dockerfile": {"images": [{"host": "a"}]}}, "facts.dockerfile.images.0: not an image"),
        ({"dockerfile": {"mounts": [1]}}, "facts.dockerfile.mounts.0: "),
        ({"dockerfile": {"stages": []}}, "facts.dockerfile.stages: "),
        ({"destinations": [None]}, "facts.destinations.0: "),
        ({"context": {"bytes": None}}, "facts.context.bytes: "),
        ({"context": {"bytes": -1}}, "facts.context.bytes: "),
        ({"context": {"bytes": True}}, "facts.context.bytes: "),
        ({"builder": {"digest": "sha256:0"}}, "facts.builder.digest: not a digest"),
        ({"host": {"isolations": ["runc"]}}, "facts.host.isolations.0: one of container"),
        ({"time": {"hour": 24}}, "facts.time.hour: "),
        ({"time": {"hour": 3}}, "date and hour"),
        ({"time": {"weekday": 3}}, "date and hour"),
        ({"time": {"date": "2024-02-30", "hour": 3}}, "facts.time.date: "),
        ({"time": {"date": "20240229", "hour": 3}}, "facts.time.date: YYYY-MM-DD"),
        ({"time": {"date": "2024-02-29", "hour": 3, "weekday": 5}}, "is weekday 4"),
    ],
)
def test_what_means_nothing_is_refused_with_its_path(document: object, says: str) -> None:
    with pytest.raises(PolicyInvalid) as caught:
        parse(document)
    assert caught.value.message.startswith("facts")
    assert says in caught.value.message


def test_a_fact_stands_over_the_one_below_and_leaves_its_neighbours() -> None:
    base = {"source": {"fork": True, "ref": "x"}, "tenant": "a"}
    assert over(base, {"source": {"fork": None}, "time": {"hour": 1}}) == {
        "source": {"fork": None, "ref": "x"}, "tenant": "a", "time": {"hour": 1},
    }  # fmt: skip
    assert over(base, {"source": None})["source"] is None
    assert base["source"] == {"fork": True, "ref": "x"}


def test_what_people_need_not_write_is_the_local_backend_with_buildah() -> None:
    assumed = parse(ASSUMED)
    assert assumed.host.isolations == {Isolation.GVISOR}
    assert set(assumed.builder.capabilities) == set(Buildah().capabilities)
    assert assumed.builder.name == Buildah().name


# -- files ---------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "facts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_of_a_person_is_yaml(tmp_path: Path) -> None:
    record = read(written(tmp_path, "source: {fork: true}\ntime: {date: 2024-02-29, hour: 3}"))
    assert record.facts.source.fork is True
    assert record.facts.time == TimeFacts(date="2024-02-29", hour=3, weekday=4)
    assert record.facts.host.isolations == {Isolation.GVISOR}
    assert record.decision is None


@given(every_facts)
def test_what_a_build_records_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, facts: BuildFacts
) -> None:
    decision = plain(decide([OPEN], facts))
    text = json.dumps({"facts": dump(facts), "decision": decision}, indent=1)
    record = read(written(tmp_path_factory.mktemp("x"), text))
    assert values(record.facts) == values(facts)
    assert record.decision == json.loads(json.dumps(decision))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "facts: "),
        ("sauce: 1", "facts.sauce: "),
        ("source: {fork: true, fork: false}", "duplicate key"),
        ('{"source": {"fork": true, "fork": false}}', "duplicate key"),
        ('{"context": {"bytes": NaN}}', "facts.context.bytes: "),
        ('{"facts": {}}', "decision: "),
        ('{"facts": {}, "decision": 3}', "decision: "),
        ('{"facts": {"sauce": 1}, "decision": {}}', "facts.sauce: "),
        ("time: {hour: 3}", "date and hour"),
        ("[" * 5000, "recursion"),
        (b"\xff", "utf-8"),
        (b"#" * (loader.MOST_BYTES + 1), "no JSON, and longer"),
        (b" " * (MOST_BYTES + 1), "longer"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_file_that_means_nothing_is_named(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PolicyInvalid) as caught:
        read(path)
    assert caught.value.message.startswith(str(path))
    assert says in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid, match="none: No such file"):
        read(tmp_path / "none")


@pytest.mark.parametrize("name", ["*", "**", "a/b", "A", "{tenant}", "a" * 64])
def test_a_tenant_that_could_be_a_pattern_is_refused(name: str) -> None:
    with pytest.raises(PolicyInvalid, match="tenant: a label"):
        parse({"tenant": name})
