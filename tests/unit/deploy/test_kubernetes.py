"""``deploy/kubernetes``: the chart and what stands plain beside it say the same, and enough."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped] # it has no types
import kubernetes_validate  # type: ignore[import-untyped] # nor has this
import pytest
import yaml

from tests.support.hosts import REPOSITORY

KUBERNETES = REPOSITORY / "deploy/kubernetes"
CHART, PLAIN = KUBERNETES / "chart", KUBERNETES / "plain"
FLAVOURS = ("cilium", "calico")
FILES = sorted(path.name for path in PLAIN.glob("*.yaml") if path.name != "kustomization.yaml")
VERSIONS = [f"1.{minor}" for minor in range(28, 37)]
"""Of Kubernetes, whose published schemas these are checked against."""
SINCE = {"ValidatingAdmissionPolicy": 30, "ValidatingAdmissionPolicyBinding": 30}
"""Minor version that has it first. The chart refuses to be rendered for an older one with it."""
BASELINE = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
"""What Pod Security's level allows to add."""

Document = dict[str, Any]


@cache
def read(path: Path) -> list[Document]:
    return list(filter(None, yaml.safe_load_all(path.read_text(encoding="utf-8"))))


def plain() -> Iterator[Document]:
    for name in FILES:
        yield from read(PLAIN / name)


def one(kind: str, name: str) -> Document:
    (found,) = (
        each for each in plain() if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return found


VALUES = read(CHART / "values.yaml")[0]
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


# -- the API's own schemas -------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_what_the_api_takes(version: str) -> None:
    for document in plain():
        if int(version[2:]) >= SINCE.get(document["kind"], 0):
            kubernetes_validate.validate(document, version, strict=True)


def test_a_word_that_the_api_does_not_know_is_noticed() -> None:
    document = json.loads(json.dumps(one("StatefulSet", "runner-gateway")))
    document["spec"]["template"]["spec"]["containers"][0]["livnessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


# -- the chart and the plain manifests -------------------------------------------------------------


def test_kustomize_has_every_file() -> None:
    (kustomization,) = read(PLAIN / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == FILES


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_flavour_is_a_component(flavour: str) -> None:
    (component,) = read(PLAIN / flavour / "kustomization.yaml")
    assert (component["kind"], component["resources"]) == ("Component", [f"{flavour}.yaml"])
    (policy,) = read(PLAIN / flavour / f"{flavour}.yaml")
    assert policy["metadata"]["namespace"] == VALUES["namespaces"]["builds"]


@pytest.mark.parametrize("name", FILES)
def test_what_a_template_says_in_any_case_stands_plain_in_that_order(name: str) -> None:
    """The words that no value and no condition touches; `plain/render` makes the files anew."""
    text = (PLAIN / name).read_text(encoding="utf-8")
    template = _always((CHART / "templates" / name).read_text(encoding="utf-8"))
    written, kinds = iter(text.splitlines()), re.findall(r"(?m)^kind: (\w+)", text)
    documents = re.split(r"(?m)^---$", template)
    # Helm sorts documents by their kind; where they are in its order, so are the lines.
    for document in sorted(documents, key=lambda text: _rank(text, kinds)):
        for line in filter(str.strip, document.splitlines()):
            assert any(line == other for other in written), line


def _always(template: str) -> str:
    """Lines without an action, outside of every block but the one around the whole file."""
    whole = template.startswith(("{{- if", "{{- range"))
    kept, depth = [], -1 if whole else 0
    for line in template.splitlines():
        words = re.findall(r"{{-?\s*(if|with|range|end)\b", line)
        depth += len(words) - 2 * words.count("end")
        if depth <= 0 and not re.search(r"{{|}}", line):
            kept.append(line)
    return "\n".join(kept)


def _rank(document: str, kinds: list[str]) -> int:
    found = re.search(r"(?m)^kind: (\w+)", document)
    return kinds.index(found[1]) if found is not None and found[1] in kinds else len(kinds)


@pytest.mark.parametrize("flavour", ["kubernetes", *FLAVOURS])
def test_helm_makes_of_the_chart_what_stands_plain(flavour: str) -> None:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not on PATH, which shows whether plain/ is the chart: helm.sh/docs")
    chosen = f"networkPolicies.flavour={flavour}"
    argv = [helm, "template", "runner", str(CHART), "--set", chosen]
    done = subprocess.run(argv, capture_output=True, check=True, text=True, timeout=60)
    wanted = list(plain())
    if flavour != "kubernetes":
        wanted += read(PLAIN / flavour / f"{flavour}.yaml")
    made = filter(None, yaml.safe_load_all(done.stdout))
    assert sorted(map(json.dumps, made)) == sorted(map(json.dumps, wanted))


def test_what_the_values_say_stands_plain() -> None:
    builds = VALUES["builds"]
    assert one("ResourceQuota", "builds")["spec"]["hard"] == builds["quota"]
    (limits,) = one("LimitRange", "builds")["spec"]["limits"]
    assert (limits["max"], limits["default"]) == (
        builds["limits"]["max"],
        builds["limits"]["default"],
    )
    for name, value in VALUES["runtimeClasses"].items():
        shown = one("RuntimeClass", name)
        assert (shown["handler"], shown["overhead"]["podFixed"]) == (
            value["handler"], value["overhead"],
        )  # fmt: skip
    namespaces = {
        each["metadata"]["name"]: each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for each in plain()
        if each["kind"] == "Namespace"
    }
    assert namespaces == {"runner-builds": builds["podSecurity"], "runner-system": "restricted"}


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((KUBERNETES / "examples").iterdir()), ids=lambda p: p.stem)
def test_an_example_says_what_the_schema_knows(path: Path) -> None:
    jsonschema.validate(read(path)[0], SCHEMA)


def test_the_schema_knows_every_default() -> None:
    jsonschema.validate(VALUES, SCHEMA)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"podSecurity": "restricted"}, "podSecurity"),
        ({"builds": {"podSecurity": "privileged"}}, "privileged"),
        ({"admission": {"capabilities": ["SYS_ADMIN"]}}, "SYS_ADMIN"),
        (
            {"admission": {"annotations": ["io.katacontainers.config.hypervisor."]}},
            "katacontainers",
        ),
        ({"gateway": {"image": "runner"}}, "runner"),
        ({"gateway": {"clusterIP": "runner-gateway"}}, "runner-gateway"),
        ({"namespaces": {"builds": "a\nb: c"}}, "does not match"),
        ({"runtimeClasses": {"runc": {"handler": "runc"}}}, "runc"),
        ({"networkPolicies": {"flavour": "none"}}, "none"),
        ({"builds": {"forbidden": ["metadata.google.internal:80"]}}, "metadata"),
    ],
    ids=str,
)
def test_the_schema_refuses(values: Document, complaint: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        jsonschema.validate(values, SCHEMA)


# -- what the manifests have to say ----------------------------------------------------------------

RIGHTS = {
    ("Role", "runner-builds", "runner"): {
        ("batch", "jobs"): {"create", "get", "list", "delete"},
        ("", "secrets"): {"create", "delete"},
        ("", "pods"): {"list", "watch"},
        ("", "events"): {"list"},
    },
    ("Role", "default", "runner-system-runner"): {("", "services", "kubernetes"): {"get"}},
    ("ClusterRole", "", "runner-system-runner"): {
        ("", "nodes"): {"get"},
        ("node.k8s.io", "runtimeclasses"): {"get"},
    },
    ("Role", "runner-builds", "runner-doctor"): {
        ("", "namespaces"): {"get"},
        ("", "resourcequotas"): {"list"},
        ("networking.k8s.io", "networkpolicies"): {"list"},
    },
    ("ClusterRole", "", "runner-system-runner-doctor"): {
        ("admissionregistration.k8s.io", "validatingadmissionpolicies", "runner-builds"): {"get"},
    },
}


def test_the_roles_have_these_verbs_and_no_other() -> None:
    roles = [each for each in plain() if each["kind"] in {"Role", "ClusterRole"}]
    assert {_id(each): dict(_rights(each)) for each in roles} == RIGHTS


def test_each_role_is_runners_alone() -> None:
    bindings = [each for each in plain() if each["kind"].endswith("RoleBinding")]
    runner = {"kind": "ServiceAccount", "name": "runner", "namespace": "runner-system"}
    assert all(each["subjects"] == [runner] for each in bindings)
    bound = {
        (each["roleRef"]["kind"], each["metadata"].get("namespace", ""), each["roleRef"]["name"])
        for each in bindings
    }
    assert bound == set(RIGHTS)


def _id(role: Document) -> tuple[str, str, str]:
    metadata = role["metadata"]
    return role["kind"], metadata.get("namespace", ""), metadata["name"]


def _rights(role: Document) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    for rule in role["rules"]:
        (group,), (resource,) = rule["apiGroups"], rule["resources"]
        yield (group, resource, *rule.get("resourceNames", ())), set(rule["verbs"])


def test_pods_of_builds_reach_the_gateway_and_nothing_else() -> None:
    gateway = one("Service", "runner-gateway")["spec"]
    builds = [
        each["spec"]
        for each in plain()
        if each["kind"] == "NetworkPolicy" and each["metadata"]["namespace"] == "runner-builds"
    ]
    assert [each["podSelector"] for each in builds] == [{}, {}]
    assert {kind for each in builds for kind in each["policyTypes"]} == {"Ingress", "Egress"}
    assert [each for each in builds if "ingress" in each] == []
    (rule,) = (rule for each in builds for rule in each.get("egress", ()))
    (to,), (port,) = rule["to"], rule["ports"]
    assert to["podSelector"]["matchLabels"] == gateway["selector"]
    assert to["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "runner-system"
    }
    assert port == {"protocol": "TCP", "port": gateway["ports"][0]["targetPort"]}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_flavour_allows_the_same(flavour: str) -> None:
    (policy,) = read(PLAIN / flavour / f"{flavour}.yaml")
    egress = json.dumps(policy["spec"]["egress"])
    assert {"8443", "runner-gateway", "runner-system"} <= set(re.findall(r"[\w-]+", egress))
    assert "Deny" in json.dumps(policy["spec"])


def test_the_policy_is_enforced_where_builds_are_and_nothing_gets_by() -> None:
    policy = one("ValidatingAdmissionPolicy", "runner-builds")["spec"]
    binding = one("ValidatingAdmissionPolicyBinding", "runner-builds")["spec"]
    assert policy["failurePolicy"] == "Fail"
    (rule,) = policy["matchConstraints"]["resourceRules"]
    assert rule["operations"] == ["CREATE", "UPDATE"]
    assert rule["resources"] == ["pods", "pods/ephemeralcontainers"]
    assert (binding["policyName"], binding["validationActions"]) == ("runner-builds", ["Deny"])
    selected = binding["matchResources"]["namespaceSelector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": "runner-builds"}
    assert all("message" in each or "messageExpression" in each for each in policy["validations"])


def test_the_policy_allows_what_the_values_say() -> None:
    policy = json.dumps(one("ValidatingAdmissionPolicy", "runner-builds")["spec"]["validations"])
    assert set(VALUES["admission"]["capabilities"]) == BASELINE
    names = [value["name"] for value in VALUES["runtimeClasses"].values()]
    for allowed in (sorted(VALUES["admission"]["capabilities"]), names):
        assert json.dumps(json.dumps(allowed, separators=(",", ":")))[1:-1] in policy


def test_the_gateway_is_one_pod_that_may_do_nothing() -> None:
    gateway = one("StatefulSet", "runner-gateway")["spec"]
    pod = gateway["template"]["spec"]
    assert (gateway["replicas"], gateway["podManagementPolicy"]) == (1, "Parallel")
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_gateways_configuration_lacks_its_address_alone() -> None:
    text = one("ConfigMap", "runner-config")["data"]["config.toml"]
    configuration = tomllib.loads(text)["kubernetes"]
    assert configuration.pop("gateway") == "GATEWAY_ADDRESS:8443"
    assert configuration == {
        "namespace": "runner-builds", "gvisor": "gvisor", "kata": "kata", "container": "",
        "pending_seconds": 600,
    }  # fmt: skip
    (first,) = one("StatefulSet", "runner-gateway")["spec"]["template"]["spec"]["initContainers"]
    # Service links call the Service of that name so.
    assert "${RUNNER_GATEWAY_SERVICE_HOST:?" in first["command"][-1]
    assert one("Service", "runner-gateway")["metadata"]["namespace"] == "runner-system"


@pytest.mark.parametrize("name", ["containerd-2.toml", "containerd-1.7.toml"])
def test_containerd_knows_the_handlers(name: str) -> None:
    configuration = tomllib.loads((KUBERNETES / "containerd" / name).read_text(encoding="utf-8"))
    (plugin,) = configuration["plugins"].values()
    runtimes = plugin["containerd"]["runtimes"]
    assert set(runtimes) == {each["handler"] for each in VALUES["runtimeClasses"].values()}
    assert not any("pod_annotations" in runtime for runtime in runtimes.values())
