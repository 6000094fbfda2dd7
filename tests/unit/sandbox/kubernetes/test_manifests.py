"""What a cluster is asked for. Golden files: ``python -m tests.support.golden`` writes them."""

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # has none
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.buildah import APART_CAPABILITIES
from builder.model import RUNNER
from policies.model import Limits
from sandbox.kubernetes import manifests
from sandbox.kubernetes.manifests import Pool, Toleration
from tests.support import golden
from tests.support.golden import CASES, SPEC

SUPPORTED = [f"1.{minor}" for minor in range(28, 37)]
BASELINE = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral",
                      "persistentVolumeClaim", "projected", "secret"}  # fmt: skip


def pod_of(name: str) -> dict[str, Any]:
    job = golden.rendered(*CASES[name])["job"]
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def container_of(name: str) -> dict[str, Any]:
    (container,) = pod_of(name)["containers"]
    found: dict[str, Any] = container
    return found


# -- the whole of it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "text"), list(golden.written()), ids=list(CASES))
def test_a_cluster_is_asked_for_what_the_golden_file_says(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "python -m tests.support.golden"


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in golden.DIRECTORY.iterdir()} == set(CASES)


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("name", CASES)
def test_every_supported_api_knows_every_member(name: str, version: str) -> None:
    for document in golden.rendered(*CASES[name]).values():
        kubernetes_validate.validate(document, version, strict=True)


# -- Pod Security (kubernetes.io, "Pod Security Standards") ----------------------------------------


def _each(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Security contexts: the pod's own, and those of its containers."""
    return [pod["securityContext"], *(each["securityContext"] for each in pod["containers"])]


def offends_baseline(pod: dict[str, Any]) -> Iterator[str]:
    """Each control of ``baseline`` that a pod does not keep."""
    context, containers = pod["securityContext"], pod["containers"]
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    if any(each["securityContext"].get("privileged") for each in containers):
        yield "privileged"
    added = {one for each in containers for one in _capabilities(each).get("add", ())}
    if added - BASELINE:
        yield f"capabilities {sorted(added - BASELINE)}"
    if any("hostPath" in each for each in pod["volumes"]):
        yield "hostPath"
    if any("hostPort" in port for each in containers for port in each.get("ports", ())):
        yield "hostPort"
    if any(each.get("procMount", "Default") != "Default" for each in _each(pod)):
        yield "procMount"
    if any(_profile(each) == "Unconfined" for each in _each(pod)):
        yield "seccomp"
    if context.get("sysctls") or any("windowsOptions" in each for each in _each(pod)):
        yield "sysctls, windows"
    if any({"seLinuxOptions", "appArmorProfile"} & each.keys() for each in _each(pod)):
        yield "SELinux, AppArmor"


def offends_restricted(pod: dict[str, Any]) -> Iterator[str]:
    """Likewise of ``restricted``, without those of ``baseline``."""
    context, containers = pod["securityContext"], pod["containers"]
    if not all(set(each) - {"name"} <= RESTRICTED_VOLUMES for each in pod["volumes"]):
        yield "volumes"
    if any(each["securityContext"].get("allowPrivilegeEscalation", True) for each in containers):
        yield "allowPrivilegeEscalation"
    if not context.get("runAsNonRoot"):
        yield "runAsNonRoot"
    if any(each.get("runAsUser") == 0 for each in _each(pod)):
        yield "runAsUser"
    if _profile(context) not in {"RuntimeDefault", "Localhost"}:
        yield "seccomp"
    if any("ALL" not in _capabilities(each).get("drop", ()) for each in containers):
        yield "drop ALL"
    if any(set(_capabilities(each).get("add", ())) - {"NET_BIND_SERVICE"} for each in containers):
        yield "capabilities"


def _capabilities(container: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = container["securityContext"].get("capabilities", {})
    return found


def _profile(context: dict[str, Any]) -> str | None:
    found: str | None = context.get("seccompProfile", {}).get("type")
    return found


OF_ROOT = ["runAsNonRoot", "runAsUser", "capabilities"]


@pytest.mark.parametrize(
    ("name", "restricted"),
    [
        ("gvisor", OF_ROOT),
        ("gvisor-apart", OF_ROOT),
        ("gvisor-uid-1000", []),
        ("kata-every-option", OF_ROOT),
        ("container", OF_ROOT),
    ],
)
def test_a_pod_keeps_baseline_and_restricted_where_it_is_not_root(
    name: str, restricted: list[str]
) -> None:
    assert list(offends_baseline(pod_of(name))) == []
    assert list(offends_restricted(pod_of(name))) == restricted


def test_buildah_itself_keeps_baseline() -> None:
    plan = replace(SPEC.plan, capabilities=APART_CAPABILITIES, apart=True)
    job = manifests.job(replace(SPEC, plan=plan), CASES["gvisor"][1])
    assert list(offends_baseline(job["spec"]["template"]["spec"])) == []


# -- single claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_pod_is_given_no_identity_of_the_cluster(name: str) -> None:
    pod = pod_of(name)
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("name", CASES)
def test_a_pod_runs_once_or_not_at_all(name: str) -> None:
    job = golden.rendered(*CASES[name])["job"]["spec"]
    once = {"completions": 1, "parallelism": 1, "backoffLimit": 0, "podReplacementPolicy": "Failed"}
    assert {each: job[each] for each in once} == once
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_job_outlasts_the_wait_for_a_node_and_the_build() -> None:
    job = golden.rendered(*CASES["kata-every-option"])["job"]["spec"]
    assert job["activeDeadlineSeconds"] > 60 + 600


@pytest.mark.parametrize("name", CASES)
def test_requests_are_limits(name: str) -> None:
    resources = container_of(name)["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["memory"] == str(2 << 30)
    assert resources["limits"]["cpu"] == "1500m"


def test_every_writable_path_has_a_volume_with_the_limit_and_nothing_else_is_written() -> None:
    pod, container = pod_of("gvisor"), container_of("gvisor")
    sizes = {each["name"]: each["emptyDir"]["sizeLimit"] for each in pod["volumes"]
             if "emptyDir" in each}  # fmt: skip
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts) == {"/tmp", "/run", "/var/lib/builder", RUNNER, manifests.SESSION}
    assert {sizes[name] for path, name in mounts.items() if path != manifests.SESSION} == {
        str(1 << 30)
    }
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_plan_apart_makes_its_writable_file_systems_itself() -> None:
    paths = {each["mountPath"] for each in container_of("gvisor-apart")["volumeMounts"]}
    assert paths == {RUNNER, manifests.SESSION}


def test_only_the_pool_decides_about_nodes() -> None:
    absent = {"nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets"}
    assert not absent & pod_of("gvisor").keys()
    pod = pod_of("kata-every-option")
    assert absent <= pod.keys()
    assert pod["tolerations"] == [
        {"key": "example.com/builds", "operator": "Equal", "value": "only", "effect": "NoSchedule"},
        {"key": "example.com/kata", "operator": "Exists", "effect": "NoExecute"},
        {"key": "example.com/any", "operator": "Exists"},
    ]


def test_a_queue_is_a_label_of_the_job_alone() -> None:
    job = golden.rendered(*CASES["kata-every-option"])["job"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ci"
    assert "kueue.x-k8s.io/queue-name" not in job["spec"]["template"]["metadata"]["labels"]


def test_a_pod_of_no_class_asks_for_none() -> None:
    assert "runtimeClassName" not in pod_of("container")


def test_a_secret_goes_with_its_job_and_holds_the_files() -> None:
    secret = golden.rendered(*CASES["gvisor"])["secret"]
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", golden.NAME, golden.OWNER)
    assert base64.b64decode(secret["data"]["certificate.pem"]) == b"PEM\n"
    assert secret["immutable"] is True


def test_a_selector_is_the_same_whatever_the_order() -> None:
    assert manifests.selector({"b": "2", "a": "1"}) == "a=1,b=2"
    assert manifests.selector({}) == ""


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=20)  # a schema takes a while
@given(
    environment=st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True), st.text(max_size=20)
    )
)
def test_values_of_the_environment_are_in_the_secret_alone(environment: dict[str, str]) -> None:
    spec = replace(SPEC, plan=replace(SPEC.plan, environment=environment))
    found = golden.rendered(spec, CASES["gvisor"][1])
    for document in found.values():
        kubernetes_validate.validate(document, "1.36", strict=True)
    data, pod = found["secret"]["data"], found["job"]["spec"]["template"]["spec"]
    given_values: dict[str, str] = {}
    for variable in pod["containers"][0]["env"]:
        source = variable["valueFrom"]["secretKeyRef"]
        assert source["name"] == found["secret"]["metadata"]["name"]
        assert re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", source["key"])
        given_values[variable["name"]] = base64.b64decode(data[source["key"]]).decode()
    assert given_values == environment
    (session,) = (each["secret"] for each in pod["volumes"] if each["name"] == "session")
    assert {each["path"] for each in session["items"]} == {"plan", "key", "certificate.pem"}


@settings(max_examples=30)
@given(
    uid=st.integers(0, 2**31 - 1),
    capabilities=st.sets(st.sampled_from(sorted(BASELINE))),
    writable=st.sets(st.sampled_from(["/tmp", "/run", "/var/tmp", RUNNER, "/x"])),
    disk=st.integers(1, 2**50),
    cpu=st.integers(1, 512_000),
)
def test_whatever_is_asked_for_is_a_sound_job_that_keeps_baseline(
    uid: int, capabilities: set[str], writable: set[str], disk: int, cpu: int
) -> None:
    plan = replace(SPEC.plan, uid=uid, capabilities=tuple(capabilities), writable=tuple(writable))
    limits = Limits(disk_bytes=disk, cpu_millis=cpu)
    job = manifests.job(replace(SPEC, plan=plan, limits=limits), CASES["gvisor"][1])
    kubernetes_validate.validate(job, "1.36", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert list(offends_baseline(pod)) == []
    assert pod["securityContext"]["runAsNonRoot"] is (uid != 0)
    mounts = [each["mountPath"] for each in pod["containers"][0]["volumeMounts"]]
    assert len(mounts) == len(set(mounts))
    names = [each["name"] for each in pod["volumes"]]
    assert len(names) == len(set(names)) == len(mounts)


@given(
    st.builds(
        Toleration,
        key=st.sampled_from(["", "a"]),
        value=st.sampled_from(["", "b"]),
        effect=st.sampled_from(["", "NoSchedule"]),
    )
)
def test_a_toleration_says_equal_only_with_a_value(toleration: Toleration) -> None:
    asked = replace(CASES["gvisor"][1], pool=Pool(tolerations=(toleration,)))
    (found,) = manifests.job(SPEC, asked)["spec"]["template"]["spec"]["tolerations"]
    assert (found["operator"] == "Equal") is bool(toleration.value)
    assert "" not in found.values()
