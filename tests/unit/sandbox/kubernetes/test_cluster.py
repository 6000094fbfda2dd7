"""The API's client at its edges: configuration, TLS, answers that are none."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.errors import (
    AdmissionRefused,
    ClusterForbidden,
    ClusterUnreachable,
    SandboxFailed,
)
from sandbox.kubernetes import cluster as api
from sandbox.kubernetes.cluster import Cluster, Expired, Refused
from sandbox.kubernetes.objects import Job, Pods
from tests.support.cluster import (
    Answer,
    Asked,
    Fault,
    PlayedCluster,
    Recording,
    kubeconfig,
    status_of,
)

JOB = "/apis/batch/v1/namespaces/n/jobs/j"


@pytest.fixture
def played() -> Iterator[PlayedCluster]:
    with PlayedCluster(Recording("", ())).playing() as found:
        yield found


@pytest.fixture
def cluster(played: PlayedCluster, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as found:
        yield found


def always(asked: Asked) -> bool:
    return True


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "- a\n- b\n",
        "a: [",
        "\t:",
        "current-context: it\n",
        "current-context: it\nclusters: []\ncontexts: []\nusers: []\n",
        "clusters: 7\ncontexts: 7\nusers: 7\ncurrent-context: it\n",
    ],
)
def test_a_kubeconfig_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ClusterUnreachable, match="no cluster is configured") as raised:
        Cluster.connect(path, None)
    assert "KUBECONFIG" in raised.value.advice


def test_a_context_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterUnreachable, match="no cluster is configured"):
        Cluster.connect(kubeconfig(tmp_path, "http://127.0.0.1:1"), "another")


def test_outside_a_cluster_and_without_a_file_there_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none")
    )
    with pytest.raises(ClusterUnreachable):
        Cluster.connect(None, None)


def test_a_pod_without_an_identity_has_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    with pytest.raises(ClusterUnreachable):
        Cluster.connect(None, None)


# -- the wire --------------------------------------------------------------------------------------


def test_nobody_who_listens_is_told(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with (
            Cluster.connect(kubeconfig(tmp_path, url), None) as cluster,
            pytest.raises(ClusterUnreachable, match="does not answer"),
        ):
            cluster.get(Job, JOB)


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[str]:
    """An API server whose certificate nobody vouches for."""
    made = tmp_path / "stranger.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=stranger", "-out", made, "-keyout", made],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made)

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    context.wrap_socket(peer, server_side=True).close()
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_api_that_nobody_vouches_for_is_not_spoken_to(tmp_path: Path, stranger: str) -> None:
    with Cluster.connect(kubeconfig(tmp_path, stranger), None) as cluster:
        with pytest.raises(ClusterUnreachable, match=r"certificate|CERTIFICATE"):
            cluster.get(Job, JOB)
        with pytest.raises(ClusterUnreachable):
            cluster.watch("/api/v1/pods", "1", 1)


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(401, b"no"), ClusterForbidden),
        (Answer(403, status_of(403, "Forbidden", 'x is forbidden: User "u"')), ClusterForbidden),
        (Answer(403, b"<html>"), AdmissionRefused),
        (Answer(422, status_of(422, "Invalid", "spec: wrong")), AdmissionRefused),
        (Answer(302, b"", {"Location": "http://192.0.2.1/"}), ClusterUnreachable),
        (Answer(410, status_of(410, "Gone")), Expired),
        (Answer(200, b"nothing"), SandboxFailed),
        (Answer(200, b'{"metadata": []}'), SandboxFailed),
        (Answer(500, b""), ClusterUnreachable),
    ],
)  # fmt: skip
def test_an_answer_is_told_by_what_it_says(
    played: PlayedCluster, cluster: Cluster, answer: Answer, kind: type[Exception]
) -> None:
    played.faults.append(Fault(always, answer, times=1000))
    with pytest.raises(kind):
        cluster.get(Job, JOB)


def test_what_is_not_there_is_none(cluster: Cluster) -> None:
    assert cluster.get(Job, JOB) is None


@pytest.mark.parametrize("code", [404, 409])
def test_what_is_gone_need_not_be_deleted(
    played: PlayedCluster, cluster: Cluster, code: int
) -> None:
    played.faults.append(Fault(always, Answer(code, status_of(code, "NotFound"))))
    cluster.delete(JOB)


def test_a_delete_says_how(played: PlayedCluster, cluster: Cluster) -> None:
    cluster.delete(JOB, propagationPolicy="Foreground")
    (asked,) = played.saw(f"DELETE {JOB}")
    assert asked.body["propagationPolicy"] == "Foreground"


def test_a_query_is_asked_as_it_is(played: PlayedCluster, cluster: Cluster) -> None:
    selector = "a=b,c/d=e"
    cluster.get(Pods, "/api/v1/namespaces/n/pods", labelSelector=selector)
    assert played.asked[0].query == {"labelSelector": selector}


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_request_is_made_again_for_as_long_as_patience_lasts(
    played: PlayedCluster, cluster: Cluster, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PATIENCE_SECONDS", 0.2)
    played.faults.append(Fault(always, Answer(code, b""), times=1000))
    with pytest.raises(ClusterUnreachable, match=str(code)):
        cluster.get(Job, JOB)
    assert 2 < len(played.asked) < 100


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 410, 422])
def test_a_refusal_is_not_asked_for_again(
    played: PlayedCluster, cluster: Cluster, code: int
) -> None:
    played.faults.append(Fault(always, Answer(code, b""), times=1000))
    with pytest.raises((Refused, Expired)):
        cluster._patiently("GET", JOB, {}, None)
    assert len(played.asked) == 1


def test_words_of_whoever_answers_are_short(played: PlayedCluster, cluster: Cluster) -> None:
    played.faults.append(Fault(always, Answer(403, b"x" * 100_000)))
    with pytest.raises(AdmissionRefused) as raised:
        cluster.get(Job, JOB)
    assert len(raised.value.message) < 500
