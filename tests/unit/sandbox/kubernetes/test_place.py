"""Where a sandbox is, here and in a cluster."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import doors
from sandbox.errors import ClusterUnreachable, SandboxFailed
from sandbox.kubernetes import manifests
from sandbox.kubernetes import place as places
from sandbox.kubernetes.cluster import Cluster
from tests.support.cluster import Answer, Fault, PlayedCluster, Recording, kubeconfig

LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1123, as Kubernetes takes it."""
JOBS = "/apis/batch/v1/namespaces/builds/jobs"


@pytest.fixture
def played() -> Iterator[PlayedCluster]:
    with PlayedCluster(Recording("", ())).playing() as found:
        yield found


@pytest.fixture
def cluster(played: PlayedCluster, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as found:
        yield found


def reserve(cluster: Cluster, home: Path, name: str = "b") -> places.KubernetesPlace:
    return places.reserve(
        home / "sandboxes", name, cluster=cluster, namespace="builds", doors_at=home / "doors"
    )


# -- names -----------------------------------------------------------------------------------------


@given(st.text())
def test_every_name_becomes_one_that_a_cluster_takes(name: str) -> None:
    assert LABEL.fullmatch(places.title(name))


@given(st.from_regex(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", fullmatch=True))
def test_the_names_of_builds_stay_as_they_are(name: str) -> None:
    assert places.title(name) == f"ur-{name}"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("", "ur"),
        ("---", "ur"),
        ("A.b_C", "ur-a-b-c"),
        ("x" * 100, "ur-" + "x" * 60),
        ("x" * 59 + "-y", "ur-" + "x" * 59),
        ("é", "ur"),
        ("a/../b", "ur-a-b"),
    ],
)
def test_names_are_made_fit(name: str, title: str) -> None:
    assert places.title(name) == title


def test_a_state_directory_is_told_by_a_label_of_its_own(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("a", "b")]
    for home in homes:
        home.mkdir()
    one, other = (places.of_state(home / "sandboxes") for home in homes)
    assert one != other
    assert LABEL.fullmatch(one)
    assert places.of_state(tmp_path / "b" / ".." / "a" / "sandboxes") == one
    # Elsewhere there may be another one at the very same path.
    (tmp_path / "a" / "cluster-state").unlink()
    assert places.of_state(homes[0] / "sandboxes") != one
    assert [path.name for path in homes[0].iterdir()] == ["cluster-state"]


# -- places ----------------------------------------------------------------------------------------


def test_a_place_has_a_door_whose_key_opens_it(cluster: Cluster, tmp_path: Path) -> None:
    place = reserve(cluster, tmp_path)
    assert place.labels == manifests.labels(places.of_state(tmp_path / "sandboxes"), "ur-b")
    link = tmp_path / "doors" / doors.hidden(place.key.secret)
    assert link.resolve() == place.door
    assert place.key.secret not in str(link)
    place.release()
    assert not link.is_symlink()
    assert not place.directory.exists()


def test_a_place_is_released_once(played: PlayedCluster, cluster: Cluster, tmp_path: Path) -> None:
    place = reserve(cluster, tmp_path)
    place.release()
    count = len(played.asked)
    place.release()
    assert len(played.asked) == count


def test_there_is_one_place_of_a_name(cluster: Cluster, tmp_path: Path) -> None:
    place = reserve(cluster, tmp_path)
    with pytest.raises(SandboxFailed):
        reserve(cluster, tmp_path)
    place.release()


def test_a_place_that_cannot_be_made_is_told(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "doors").write_text("a file")
    with pytest.raises(SandboxFailed, match="no place for the sandbox"):
        reserve(cluster, tmp_path)


def test_a_pod_that_is_over_is_not_waited_for(
    played: PlayedCluster, cluster: Cluster, tmp_path: Path
) -> None:
    place = reserve(cluster, tmp_path)
    place.announce()
    place.is_over = True
    place.release()
    assert not any(each.what.startswith("GET") for each in played.asked)
    assert [each.what.split()[0] for each in played.asked] == ["DELETE", "DELETE"]


def test_a_key_opens_nothing_any_more_even_where_the_cluster_is_gone(
    played: PlayedCluster, cluster: Cluster, tmp_path: Path
) -> None:
    place = reserve(cluster, tmp_path)
    place.announce()
    played.goes_down()
    with pytest.raises(ClusterUnreachable):
        place.release()
    assert list((tmp_path / "doors").iterdir()) == []
    assert place.directory.exists()  # for gc


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"namespace": "x"}'])
def test_a_note_that_is_none_stays_for_somebody_to_look_at(
    cluster: Cluster, tmp_path: Path, text: str
) -> None:
    (tmp_path / places.CLUSTER).write_text(text)
    with pytest.raises(SandboxFailed, match="cannot be read"):
        places.clean(tmp_path, lambda: cluster)
    assert tmp_path.exists()


def test_what_no_cluster_was_told_of_is_removed_without_one(tmp_path: Path) -> None:
    def nowhere() -> Cluster:
        raise ClusterUnreachable("nobody is asked")

    (tmp_path / "place").mkdir()
    places.clean(tmp_path / "place", nowhere)
    assert not (tmp_path / "place").exists()


def test_what_another_cluster_has_is_not_taken_for_gone(cluster: Cluster, tmp_path: Path) -> None:
    note = {"api": "https://elsewhere.example", "namespace": "builds"}
    (tmp_path / places.CLUSTER).write_text(json.dumps(note))
    with pytest.raises(SandboxFailed, match=r"of another cluster: https://elsewhere\.example"):
        places.clean(tmp_path, lambda: cluster)


def test_a_cluster_that_refused_has_nothing(
    played: PlayedCluster, cluster: Cluster, tmp_path: Path
) -> None:
    place = reserve(cluster, tmp_path)
    place.announce()
    place.recant()
    place.release()
    assert played.asked == []


# -- what is left ----------------------------------------------------------------------------------


def jobs(*found: dict[str, Any]) -> Answer:
    return Answer(200, {"items": [{"metadata": each} for each in found]})


def test_jobs_without_a_place_are_removed_and_named(
    played: PlayedCluster, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "sandboxes" / "Here").mkdir(parents=True)
    played.faults.append(
        Fault(
            lambda asked: asked.what == f"GET {JOBS}", jobs({"name": "ur-here"}, {"name": "ur-x"})
        )
    )
    sandboxes = tmp_path / "sandboxes"
    assert list(places.sweep(cluster, "builds", sandboxes, ())) == ["job ur-x in builds"]
    assert [each.what for each in played.asked if each.what.startswith("DELETE")] == [
        f"DELETE {JOBS}/ur-x",
        "DELETE /api/v1/namespaces/builds/secrets/ur-x",
    ]
    wanted = {manifests.STATE_LABEL: places.of_state(sandboxes)}
    assert played.asked[0].query == {"labelSelector": manifests.selector(wanted)}


def test_without_places_or_a_namespace_there_is_nothing_to_sweep(
    cluster: Cluster, tmp_path: Path
) -> None:
    assert list(places.sweep(cluster, "builds", tmp_path / "none", ())) == []


def test_only_what_is_old_is_removed_by_age(played: PlayedCluster, cluster: Cluster) -> None:
    found = jobs(
        {"name": "old", "creationTimestamp": "2001-01-01T00:00:00Z"},
        {"name": "new", "creationTimestamp": "2999-01-01T00:00:00Z"},
        {"name": "ageless", "creationTimestamp": None},
    )
    played.faults.append(Fault(lambda asked: asked.what == f"GET {JOBS}", found))
    (said,) = places.sweep_older(cluster, "builds", 60)
    assert said.startswith("job old in builds, of 2001-01-01")


def test_a_note_says_where_it_is_and_no_secret(cluster: Cluster, tmp_path: Path) -> None:
    place = reserve(cluster, tmp_path)
    place.announce()
    note = json.loads((place.directory / places.CLUSTER).read_bytes())
    assert note == {"api": cluster.name, "namespace": "builds"}
    place.release()
