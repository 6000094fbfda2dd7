"""What the engine is asked for, as plain data."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import Isolation, Limits
from sandbox.docker import containers
from sandbox.docker.containers import Container
from sandbox.model import FILES_LIMIT, SandboxSpec

CONTAINER = Container(
    image="untrusted-runner/builder:5",
    runtime="runsc",
    guest="/state/sandboxes/b/guest",
    network="none",
    labels={containers.LABEL: "state", containers.NAME_LABEL: "b"},
    apparmor=True,
)
LIMITS = Limits(memory_bytes=3 << 20, cpu_millis=1500, pids=77, disk_bytes=4096)
MARK = "from-the-plan"


def rendered(spec: SandboxSpec, **changed: Any) -> dict[str, Any]:
    return containers.sandbox(spec, replace(CONTAINER, **changed))


def host(spec: SandboxSpec, **changed: Any) -> dict[str, Any]:
    """The part about limits and what of the host is there."""
    found: dict[str, Any] = rendered(spec, **changed)["HostConfig"]
    return found


def leaves(value: Any) -> set[str]:
    """Every text and number in ``value``, names included."""
    if isinstance(value, dict):
        return set().union(*(leaves(each) for pair in value.items() for each in pair))
    if isinstance(value, list):
        return set().union(*map(leaves, value))
    return {str(value)}


# -- what gets in ----------------------------------------------------------------------------------


def test_the_command_line_is_ours_and_what_to_build_is_in_a_file(spec: SandboxSpec) -> None:
    config = rendered(spec)
    assert config["Entrypoint"] + config["Cmd"] == ["/run/runner/init", "/run/runner/plan"]
    assert config["Image"] == "untrusted-runner/builder:5"
    assert config["HostConfig"]["Runtime"] == "runsc"
    assert config["Labels"] == dict(CONTAINER.labels)


def test_of_the_plan_only_environment_uid_capabilities_and_writable_paths_get_in(
    spec: SandboxSpec,
) -> None:
    marked = replace(
        spec,
        plan=replace(
            spec.plan,
            commands=((MARK, f"--{MARK}"),),
            files={MARK: MARK.encode()},
            claim=f"/{MARK}",
            output=f"/{MARK}",
        ),
    )
    assert rendered(marked) == rendered(spec)
    assert MARK not in json.dumps(rendered(marked))


_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(
    environment=st.dictionaries(_texts, _texts, max_size=4),
    uid=st.integers(0, 2**31),
    capabilities=st.lists(_texts, max_size=4).map(tuple),
    writable=st.lists(_texts, max_size=4, unique=True).map(lambda n: tuple(f"/{x}" for x in n)),
)
def test_whatever_the_plan_has_it_stays_in_its_own_four_places(
    spec: SandboxSpec,
    environment: dict[str, str],
    uid: int,
    capabilities: tuple[str, ...],
    writable: tuple[str, ...],
) -> None:
    changed = replace(
        spec.plan,
        environment=environment,
        uid=uid,
        capabilities=capabilities,
        writable=writable,
    )
    config, plain = rendered(replace(spec, plan=changed)), rendered(spec)
    assert config.pop("Env") == [f"{name}={value}" for name, value in environment.items()]
    assert config.pop("User") == f"{uid}:{uid}"
    assert config["HostConfig"].pop("CapAdd") == list(capabilities)
    assert set(config["HostConfig"].pop("Tmpfs")) == set(writable)
    for name in ("Env", "User"):
        del plain[name]
    for name in ("CapAdd", "Tmpfs"):
        del plain["HostConfig"][name]
    assert config == plain


def test_nothing_of_the_host_is_there_but_our_own_files_read_only(spec: SandboxSpec) -> None:
    (mount,) = host(spec)["Mounts"]
    assert mount == {
        "Type": "volume",
        "Source": CONTAINER.guest,
        "Target": "/run/runner",
        "ReadOnly": True,
        "VolumeOptions": {"NoCopy": True},
    }
    assert not leaves(rendered(spec)) & {str(spec.root), *map(str, spec.inputs.values())}
    assert not host(spec).keys() & {
        "Binds", "Devices", "DeviceRequests", "VolumesFrom", "PidMode", "UTSMode", "UsernsMode",
        "PortBindings", "PublishAllPorts", "ExtraHosts", "Links", "GroupAdd", "Sysctls",
        "StorageOpt", "CgroupParent",
    }  # fmt: skip


def test_the_hosts_own_kernel_keeps_them_read_only() -> None:
    made = containers.volume("/state/sandboxes/b/guest", {"a": "b"})
    options = made["driver_opts"]
    assert (options["type"], options["device"]) == ("none", "/state/sandboxes/b/guest")
    assert set(options["o"].split(",")) == {"bind", "ro", "nosuid", "nodev"}
    assert (made["driver"], made["labels"]) == ("local", {"a": "b"})


def test_an_input_is_handed_in_later_and_not_mounted(spec: SandboxSpec) -> None:
    assert rendered(replace(spec, inputs={"context.tar": spec.root})) == rendered(spec)


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", Isolation)
def test_every_hard_limit_is_there_whatever_the_isolation(
    spec: SandboxSpec, isolation: Isolation
) -> None:
    bounded = host(replace(spec, isolation=isolation, limits=LIMITS))
    assert (bounded["Memory"], bounded["MemorySwap"]) == (3 << 20, 3 << 20)
    assert bounded["CpuQuota"] / bounded["CpuPeriod"] == 1.5
    assert bounded["PidsLimit"] == 77
    assert all("size=4096" in options.split(",") for options in bounded["Tmpfs"].values())
    assert set(bounded["Tmpfs"]) == set(spec.plan.writable)
    assert bounded["LogConfig"] == {"Type": "none"}


@pytest.mark.parametrize("isolation", Isolation)
def test_it_is_confined_whatever_the_isolation(spec: SandboxSpec, isolation: Isolation) -> None:
    confined = host(replace(spec, isolation=isolation))
    assert confined["CapDrop"] == ["ALL"]
    assert confined["SecurityOpt"][0] == "no-new-privileges"
    assert not any("seccomp" in option for option in confined["SecurityOpt"])
    assert confined["Privileged"] is False
    assert confined["ReadonlyRootfs"] is True
    assert confined["RestartPolicy"] == {"Name": "no"}
    assert (confined["IpcMode"], confined["CgroupnsMode"]) == ("private", "private")
    assert confined["Dns"] == ["127.0.0.1"]


@given(limits=st.builds(
    Limits,
    memory_bytes=st.integers(1, 1 << 50),
    cpu_millis=st.integers(1, 1_000_000),
    pids=st.integers(1, 1 << 22),
    disk_bytes=st.integers(1, 1 << 50),
))  # fmt: skip
def test_no_limit_is_larger_than_what_was_decided(spec: SandboxSpec, limits: Limits) -> None:
    bounded = host(replace(spec, limits=limits))
    assert bounded["Memory"] == bounded["MemorySwap"] == limits.memory_bytes
    assert bounded["PidsLimit"] == limits.pids
    assert 0 < bounded["CpuQuota"] * 1000 <= limits.cpu_millis * bounded["CpuPeriod"]


@pytest.mark.parametrize(
    ("isolation", "expected"),
    [
        (Isolation.CONTAINER, {}),
        (Isolation.GVISOR, {"nofile": FILES_LIMIT, "nproc": FILES_LIMIT}),
        (Isolation.KATA, {"nofile": FILES_LIMIT, "nproc": 77}),
    ],
)
def test_ulimits_are_set_where_a_kernel_of_its_own_keeps_them(
    spec: SandboxSpec, isolation: Isolation, expected: dict[str, int]
) -> None:
    found = host(replace(spec, isolation=isolation, limits=LIMITS))["Ulimits"]
    assert {each["Name"]: each["Hard"] for each in found} == expected
    assert all(each["Soft"] == each["Hard"] for each in found)


@pytest.mark.parametrize("isolation", Isolation)
@pytest.mark.parametrize("apparmor", [True, False])
def test_only_a_container_that_apparmor_would_stop_from_mounting_goes_without(
    spec: SandboxSpec, isolation: Isolation, apparmor: bool
) -> None:
    options = host(replace(spec, isolation=isolation), apparmor=apparmor)["SecurityOpt"]
    excused = isolation is Isolation.CONTAINER and apparmor
    assert ("apparmor=unconfined" in options) is excused
    assert len(options) == 1 + excused


@pytest.mark.parametrize(
    ("path", "mode"), [("/tmp", "1777"), ("/var/tmp", "1777"), ("/run", "0755"), ("/tmpx", "0755")]
)
def test_everybody_may_write_where_everybody_expects_to(
    spec: SandboxSpec, path: str, mode: str
) -> None:
    writable = replace(spec, plan=replace(spec.plan, writable=(path,)), limits=LIMITS)
    assert host(writable)["Tmpfs"] == {path: f"exec,nosuid,nodev,size=4096,mode={mode}"}


# -- how it begins and ends ------------------------------------------------------------------------


def test_it_ends_with_whoever_started_it_and_is_not_started_again(spec: SandboxSpec) -> None:
    config = rendered(spec)
    assert (config["OpenStdin"], config["StdinOnce"], config["AttachStdin"]) == (True, True, True)
    assert config["Tty"] is False  # both kinds of output in frames
    assert config["StopSignal"] == "SIGKILL"
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    assert config["HostConfig"]["AutoRemove"] is False


def test_it_can_be_sent(spec: SandboxSpec) -> None:
    config = rendered(spec)
    assert json.loads(json.dumps(config)) == config


# -- the network of two ----------------------------------------------------------------------------


def test_the_network_leads_nowhere_and_the_host_has_no_address_in_it() -> None:
    asked = containers.network("bridge0", {"a": "b"})
    assert (asked["driver"], asked["internal"], asked["enable_ipv6"]) == ("bridge", True, False)
    options = asked["options"]
    assert options["com.docker.network.bridge.inhibit_ipv4"] == "true"
    assert options["com.docker.network.bridge.name"] == containers.bridge("bridge0")
    assert int(options["com.docker.network.driver.mtu"]) < 1280, "or its bridge has IPv6"
    assert options["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert asked["labels"] == {"a": "b"}
    assert not asked.keys() & {"ipam", "attachable", "ingress"}


def test_the_relay_has_no_capability_and_nothing_but_the_sandboxes_sockets() -> None:
    relay = containers.relay(replace(CONTAINER, runtime="runc", network="of-two"))
    bounded = relay["HostConfig"]
    assert "CapAdd" not in bounded
    assert bounded["CapDrop"] == ["ALL"]
    assert bounded["SecurityOpt"] == ["no-new-privileges"]
    assert (bounded["Runtime"], bounded["NetworkMode"]) == ("runc", "of-two")
    assert [mount["Target"] for mount in bounded["Mounts"]] == ["/run/runner"]
    assert "Tmpfs" not in bounded
    assert bounded["ReadonlyRootfs"] is True
    assert 0 < bounded["Memory"] == bounded["MemorySwap"]
    assert bounded["PidsLimit"] == 256
    assert relay["Env"] == []
    assert relay["Cmd"] == [
        "relay",
        "5000", "/run/runner/door/gateway.sock",
        "5001", "/run/runner/door/outlet.sock",
    ]  # fmt: skip
