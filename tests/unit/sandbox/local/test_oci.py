import json
from dataclasses import replace

from sandbox.local import oci
from sandbox.model import SandboxSpec


def test_the_root_is_read_only_and_the_only_bind_too(spec: SandboxSpec) -> None:
    config = json.loads(oci.config_json(spec, "/host/guest", {}))
    assert config["root"] == {"path": "/store/root", "readonly": True}
    binds = [mount for mount in config["mounts"] if mount["type"] == "bind"]
    assert binds == [
        {
            "destination": "/run/runner",
            "type": "bind",
            "source": "/host/guest",
            "options": ["bind", "ro", "nosuid", "nodev"],
        }
    ]
    sources = {mount["source"] for mount in config["mounts"]} - {"/host/guest"}
    assert sources == {"proc", "tmpfs", "sysfs", "cgroup"}


def test_every_namespace_is_a_new_one(spec: SandboxSpec) -> None:
    namespaces = oci.config(spec, "/g", {})["linux"]["namespaces"]
    assert {"type": "network"} in namespaces
    assert all(set(namespace) == {"type"} for namespace in namespaces)


def test_every_writable_place_is_bounded(spec: SandboxSpec) -> None:
    mounts = {m["destination"]: m["options"] for m in oci.config(spec, "/g", {})["mounts"]}
    for path, mode in (("/run", "0755"), ("/tmp", "1777"), ("/var/tmp", "1777")):
        assert mounts[path] == ["nosuid", "nodev", "size=4096", f"mode={mode}"]


def test_parents_are_mounted_before_what_lies_in_them(spec: SandboxSpec) -> None:
    order = [mount["destination"] for mount in oci.config(spec, "/g", {})["mounts"]]
    for index, path in enumerate(order):
        assert not any(path.startswith(f"{later}/") for later in order[index + 1 :])


def test_the_first_process_is_ours_and_gains_no_privilege(spec: SandboxSpec) -> None:
    process = oci.config(spec, "/g", {})["process"]
    assert process["args"] == ["/run/runner/init", "/run/runner/plan"]
    assert process["env"] == ["PATH=/bin", "A=b=c"]
    assert process["noNewPrivileges"] is True
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}
    assert all(c == ["CAP_CHOWN", "CAP_SYS_ADMIN"] for c in process["capabilities"].values())
    assert {limit["soft"] for limit in process["rlimits"]} == {1_048_576}


def test_it_runs_as_whom_policy_judged(spec: SandboxSpec) -> None:
    other = replace(spec, plan=replace(spec.plan, uid=1000, capabilities=("CHOWN",)))
    process = oci.config(other, "/g", {})["process"]
    assert process["user"] == {"uid": 1000, "gid": 1000}
    assert process["capabilities"]["bounding"] == ["CAP_CHOWN"]
