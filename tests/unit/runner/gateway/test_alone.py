"""The endpoint standing alone, asked over loopback: what the specification wants of a registry."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.reference import Digest
from runner.gateway import alone
from runner.gateway.http import Server
from runner.gateway.listen import tcp
from runner.registry.image import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from runner.settings import Settings
from tests.support.doors import Client, basic
from tests.support.gateway import Answer

ONE, TWO = "/v2/team/one", "/v2/team/two"
DATA = b"some bytes"
DIGEST = Digest.of(DATA)
EMPTY = "application/vnd.oci.empty.v1+json"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Client]:
    listener = tcp("127.0.0.1", 0)
    errors: list[Exception] = []
    served = alone.Registry(tmp_path, ("team/one", "team/two"), Settings())
    server = Server(listener, served.answer, peer_uid=None, failed=errors.append)
    yield Client(listener.getsockname())
    server.close()
    served.close()
    assert errors == []


def sha512(data: bytes) -> Digest:
    return Digest(f"sha512:{hashlib.sha512(data).hexdigest()}")


def push(registry: Client, data: bytes = DATA, place: str = ONE) -> Digest:
    digest = Digest.of(data)
    assert registry.ask("POST", f"{place}/blobs/uploads/?digest={digest}", data).status == 201
    return digest


def put(registry: Client, name: str, data: bytes, kind: str = OCI_MANIFEST) -> Answer:
    return registry.ask("PUT", f"{ONE}/manifests/{name}", data, {"Content-Type": kind})


def manifest(registry: Client, **members: Any) -> bytes:
    config = push(registry, b"{}")
    described = {"mediaType": OCI_CONFIG, "digest": config, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": []}
    return json.dumps({**document, **members}).encode()


# -- blobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "part"),
    [("bytes=2-4", DATA[2:5]), ("bytes=7-", DATA[7:]), ("bytes=-3", DATA[-3:]),
     ("bytes=5-5000", DATA[5:])],
)  # fmt: skip
def test_a_part_of_a_blob(header: str, part: bytes, registry: Client) -> None:
    push(registry)
    answer = registry.ask("GET", f"{ONE}/blobs/{DIGEST}", headers={"Range": header})
    start = DATA.index(part)
    assert (answer.status, answer.body) == (206, part)
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{len(DATA)}"
    assert answer.headers["Docker-Content-Digest"] == DIGEST


def test_several_parts_at_once_are_refused(registry: Client) -> None:
    push(registry)
    answer = registry.ask("GET", f"{ONE}/blobs/{DIGEST}", headers={"Range": "bytes=0-1,3-4"})
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(DATA)}")
    assert registry.ask("HEAD", f"{ONE}/blobs/{DIGEST}", headers={"Range": "bytes=9-1"}).status == (
        200
    )


@pytest.mark.parametrize(
    ("query", "patched"), [("", b""), ("?digest-algorithm=sha512", DATA), ("", DATA), ("", None)]
)
def test_a_blob_has_the_digest_that_was_asked_for(
    query: str, patched: bytes | None, registry: Client
) -> None:
    digest = sha512(DATA)
    if patched is None:
        answer = registry.ask("POST", f"{ONE}/blobs/uploads/?digest={digest}", DATA)
    else:
        location = registry.ask("POST", f"{ONE}/blobs/uploads/{query}").headers["Location"]
        assert registry.ask("PATCH", location, patched).status == 202
        answer = registry.ask("PUT", f"{location}?digest={digest}", DATA[len(patched) :])
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (201, digest)
    assert registry.ask("GET", answer.headers["Location"]).body == DATA
    assert registry.ask("GET", f"{ONE}/blobs/{DIGEST}").status == 404
    assert registry.ask("DELETE", f"{ONE}/blobs/{digest}").status == 202


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "SHA256", "sha384", "", "../sha256"])
def test_no_other_algorithm_is_computed(algorithm: str, registry: Client) -> None:
    target = f"{ONE}/blobs/uploads/?digest-algorithm={algorithm}"
    assert registry.ask("POST", target).code == "DIGEST_INVALID"


def test_a_repository_sees_its_own_blobs(registry: Client) -> None:
    push(registry, place=TWO)
    assert registry.ask("HEAD", f"{ONE}/blobs/{DIGEST}").status == 404
    assert registry.ask("GET", "/v2/team/three/blobs/" + DIGEST).code == "NAME_UNKNOWN"


@pytest.mark.parametrize("source", ["&from=team/two", ""])
def test_a_blob_is_mounted_and_outlives_its_source(source: str, registry: Client) -> None:
    push(registry, place=TWO)
    answer = registry.ask("POST", f"{ONE}/blobs/uploads/?mount={DIGEST}{source}")
    assert (answer.status, answer.headers["Location"]) == (201, f"{ONE}/blobs/{DIGEST}")
    assert registry.ask("DELETE", f"{TWO}/blobs/{DIGEST}").status == 202
    assert registry.ask("GET", f"{ONE}/blobs/{DIGEST}").body == DATA


def test_what_is_not_there_cannot_be_mounted(registry: Client) -> None:
    push(registry, place=ONE)
    answer = registry.ask("POST", f"{ONE}/blobs/uploads/?mount={DIGEST}&from=team/two")
    assert answer.status == 202
    assert registry.ask("GET", answer.headers["Location"]).status == 204


def test_a_blob_that_was_removed_is_gone(registry: Client) -> None:
    push(registry)
    assert registry.ask("DELETE", f"{ONE}/blobs/{DIGEST}").status == 202
    assert registry.ask("GET", f"{ONE}/blobs/{DIGEST}").status == 404
    assert registry.ask("DELETE", f"{ONE}/blobs/{DIGEST}").code == "BLOB_UNKNOWN"
    push(registry)
    assert registry.ask("GET", f"{ONE}/blobs/{DIGEST}").body == DATA


# -- manifests -----------------------------------------------------------------------------------


def test_tags_are_listed_in_pages(registry: Client) -> None:
    data = manifest(registry)
    for tag in ("b", "a", "C", "d"):
        assert put(registry, tag, data).status == 201
    listed = registry.ask("GET", f"{ONE}/tags/list")
    assert json.loads(listed.body) == {"name": "team/one", "tags": ["C", "a", "b", "d"]}
    found, target = [], f"{ONE}/tags/list?n=3"
    while target:
        answer = registry.ask("GET", target)
        found += json.loads(answer.body)["tags"]
        target = answer.headers.get("Link", "").partition(">")[0].removeprefix("<")
    assert found == ["C", "a", "b", "d"]
    assert json.loads(registry.ask("GET", f"{TWO}/tags/list").body)["tags"] == []
    assert registry.ask("HEAD", f"{ONE}/tags/list").body == b""


def test_a_manifest_under_several_tags_and_another_algorithm(registry: Client) -> None:
    data = manifest(registry)
    digest = sha512(data)
    answer = put(registry, f"{digest}?tag=one&tag=two", data)
    assert (answer.status, answer.headers["OCI-Tag"]) == (201, "one, two")
    for name in ("one", "two", digest):
        got = registry.ask("GET", f"{ONE}/manifests/{name}")
        assert (got.body, got.headers["Docker-Content-Digest"]) == (data, digest)
    assert put(registry, Digest("sha512:" + "0" * 128), data).code == "DIGEST_INVALID"


def test_removing_a_tag_leaves_the_manifest_and_removing_that_takes_its_tags(
    registry: Client,
) -> None:
    data = manifest(registry)
    for tag in ("one", "two"):
        put(registry, tag, data)
    assert registry.ask("DELETE", f"{ONE}/manifests/one").status == 202
    assert registry.ask("GET", f"{ONE}/manifests/one").status == 404
    assert registry.ask("GET", f"{ONE}/manifests/two").body == data
    assert registry.ask("DELETE", f"{ONE}/blobs/{Digest.of(data)}").status == 404
    assert registry.ask("DELETE", f"{ONE}/manifests/{Digest.of(data)}").status == 202
    for name in ("two", Digest.of(data)):
        assert registry.ask("GET", f"{ONE}/manifests/{name}").status == 404
        assert registry.ask("DELETE", f"{ONE}/manifests/{name}").code == "MANIFEST_UNKNOWN"


def test_who_cannot_read_a_manifest_does_not_get_it(registry: Client) -> None:
    put(registry, "one", manifest(registry))
    for accept, status in ((OCI_INDEX, 404), (OCI_MANIFEST, 200), ("*/*", 200)):
        headers = {"Accept": accept}
        assert registry.ask("GET", f"{ONE}/manifests/one", headers=headers).status == status


def referrers(registry: Client, subject: Digest, query: str = "") -> list[dict[str, Any]]:
    answer = registry.ask("GET", f"{ONE}/referrers/{subject}{query}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
    if query:
        assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    index = json.loads(answer.body)
    assert (index["schemaVersion"], index["mediaType"]) == (2, OCI_INDEX)
    listed: list[dict[str, Any]] = index["manifests"]
    return listed


def test_a_manifest_about_another_one_is_listed_there(registry: Client) -> None:
    subject = DIGEST  # which need not exist
    about = {"subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 10}}
    notes = {"org.example.note": "x"}
    stated = manifest(registry, **about, artifactType="a/b", annotations=notes)
    implied = manifest(registry, **about)
    index = json.dumps({"schemaVersion": 2, "manifests": [], **about}).encode()
    for data, kind in ((stated, OCI_MANIFEST), (implied, OCI_MANIFEST), (index, OCI_INDEX)):
        answer = put(registry, Digest.of(data), data, kind)
        assert (answer.status, answer.headers["OCI-Subject"]) == (201, subject)
    listed = {entry["digest"]: entry for entry in referrers(registry, subject)}
    assert listed == {
        Digest.of(stated): {
            "mediaType": OCI_MANIFEST, "digest": Digest.of(stated), "size": len(stated),
            "artifactType": "a/b", "annotations": notes,
        },
        Digest.of(implied): {
            "mediaType": OCI_MANIFEST, "digest": Digest.of(implied), "size": len(implied),
            "artifactType": OCI_CONFIG,
        },
        Digest.of(index): {
            "mediaType": OCI_INDEX, "digest": Digest.of(index), "size": len(index),
        },
    }  # fmt: skip
    (only,) = referrers(registry, subject, "?artifactType=a/b")
    assert only["digest"] == Digest.of(stated)
    registry.ask("DELETE", f"{ONE}/manifests/{Digest.of(stated)}")
    assert len(referrers(registry, subject)) == 2
    assert referrers(registry, Digest.of(b"nothing")) == []
    assert registry.ask("GET", f"{ONE}/referrers/sha256:x").code == "DIGEST_INVALID"


def test_whatever_the_image_specification_allows_is_taken(registry: Client) -> None:
    layer = {"mediaType": "a/b", "digest": push(registry), "size": len(DATA), "data": "eA=="}
    elsewhere = {
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "digest": Digest.of(b"elsewhere"), "size": 9, "urls": ["https://elsewhere.example/"],
    }  # fmt: skip
    config = {"mediaType": EMPTY, "digest": push(registry, b"{}"), "size": 2}
    data = manifest(registry, config=config, layers=[layer, elsewhere], other={"x": [1]})
    assert put(registry, "one", data).status == 201
    assert put(registry, "two", data, f"{OCI_MANIFEST}; charset=utf-8").status == 201
    described = {"mediaType": OCI_MANIFEST, "digest": Digest.of(data), "size": len(data)}
    index = {"schemaVersion": 2, "manifests": [described]}
    inner = json.dumps(index).encode()
    assert put(registry, Digest.of(inner), inner, OCI_INDEX).status == 201
    nested = {"mediaType": OCI_INDEX, "digest": Digest.of(inner), "size": len(inner)}
    assert put(
        registry, "nested", json.dumps({**index, "manifests": [nested]}).encode(), OCI_INDEX
    ).status == (201)


@pytest.mark.parametrize(
    "members",
    [{"manifests": []}, {"fsLayers": []}, {"schemaVersion": 1}, {"mediaType": OCI_INDEX},
     {"layers": {}}, {"config": []}, {"annotations": {"a": 1}, "subject": {"digest": DIGEST}},
     {"subject": {"digest": "sha256:x"}}, {"layers": [{"mediaType": "a/b", "digest": "x"}]}],
)  # fmt: skip
def test_what_it_forbids_is_not(members: dict[str, Any], registry: Client) -> None:
    assert put(registry, "one", manifest(registry, **members)).code == "MANIFEST_INVALID"


def test_a_manifest_of_what_is_not_there_is_refused(registry: Client) -> None:
    layer = {"mediaType": "a/b", "digest": DIGEST, "size": len(DATA)}
    assert put(registry, "one", manifest(registry, layers=[layer])).code == "MANIFEST_BLOB_UNKNOWN"
    push(registry, place=TWO)
    assert put(registry, "one", manifest(registry, layers=[layer])).code == "MANIFEST_BLOB_UNKNOWN"


# -- who may -------------------------------------------------------------------------------------


def test_with_a_login_nobody_else_may_do_anything(tmp_path: Path) -> None:
    served = alone.Registry(tmp_path, ("team/one",), Settings())
    handler = alone.behind("me:secret", served.answer)
    listener = tcp("127.0.0.1", 0)
    server = Server(listener, handler, peer_uid=None, failed=lambda _: None)
    try:
        client = Client(listener.getsockname())
        for login in ("me:", "me:secre", "me:secrets", "you:secret", ""):
            answer = client.ask("GET", "/v2/", headers=basic(login))
            assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
        assert client.ask("GET", "/v2/", headers=basic("me:secret")).status == 200
        lower = {"Authorization": basic("me:secret")["Authorization"].replace("Basic", "basic")}
        assert client.ask("GET", "/v2/", headers=lower).status == 200
        big = b" " * (4 << 20)  # said although the body was on its way
        assert client.ask("PUT", f"{ONE}/manifests/x", big).status == 401
    finally:
        server.close()
