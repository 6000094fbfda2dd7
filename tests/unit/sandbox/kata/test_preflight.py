"""The Kata preflight against hosts made of files, with real processes, and against this host."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandbox.errors import IsolationUnavailable
from sandbox.kata import host as kata_host
from sandbox.kata import preflight as kata
from sandbox.kata.host import ThisHost
from sandbox.kata.preflight import NOT_ENFORCED, SHIM, Shim, find_shim, preflight, require_version
from sandbox.rows import Row, Verdict

GOLANG = (
    'Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: {}, commit: c'
)
RUST = "Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: {}, commit: c"
CONFIG = "etc/kata-containers/configuration.toml"
QEMU = """
[hypervisor.qemu]
path = "/opt/kata/bin/qemu"
kernel = "/opt/kata/vmlinux"
image = "/opt/kata/kata.img"
firmware = ""
shared_fs = "virtio-fs"
virtio_fs_daemon = "/opt/kata/virtiofsd"
enable_annotations = ["enable_iommu"]
default_memory = 512
[agent.kata]
debug_console_enabled = false
[runtime]
internetworking_model = "tcfilter"
sandbox_cgroup_only = true
"""
FLAGS = "processor\t: 0\nflags\t\t: fpu {}\n"
RUN_SHARED = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda rw\n"
    "25 22 0:5 / /run rw,nosuid shared:5 - tmpfs tmpfs rw\n"
)


@dataclass(frozen=True)
class MadeUp(ThisHost):
    """A host of files whose KVM answers as told."""

    kvm: list[OSError] = field(default_factory=list)

    def create_vm(self, device: Path) -> None:
        for error in self.kvm:
            raise error

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def shim(self, script: str, directory: str = "usr/bin") -> Path:
        file = self.write(f"{directory}/{SHIM}", f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    def device(self, name: str) -> None:
        path = self.root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/null")  # any character device will do

    def process(
        self, pid: int, name: str, environ: bytes, exe: str = "/usr/bin/containerd"
    ) -> None:
        self.write(f"proc/{pid}/comm", name + "\n")
        self.write(f"proc/{pid}/environ", environ)
        self.write(f"proc/{pid}/status", f"Name:\t{name}\nUid:\t{os.geteuid()}\t0\t0\t0\n")
        (self.root / f"proc/{pid}/exe").symlink_to(exe)
        (self.root / f"proc/{pid}/root").symlink_to(self.root)


@pytest.fixture
def host(tmp_path: Path) -> MadeUp:
    """One on which every row is ok."""
    made = MadeUp(tmp_path)
    made.write("proc/cpuinfo", FLAGS.format("vmx"))
    made.write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    1048576 kB\n")
    made.write("proc/self/mountinfo", RUN_SHARED)
    made.write("sys/module/kvm_intel/refcnt", "0")
    for name in ("vhost-vsock", "vhost-net", "net/tun"):
        made.device(name)
    made.shim(f"echo '{GOLANG.format('3.31.0')}'")
    made.write(CONFIG, QEMU)
    for name in ("bin/qemu", "vmlinux", "kata.img", "virtiofsd"):
        made.write(f"opt/kata/{name}", "")
    return made


def look(host: MadeUp, name: str) -> Row:
    (row,) = [row for row in preflight(host) if row.name == f"kata {name}"]
    return row


def settings(host: MadeUp) -> list[Row]:
    return [row for row in preflight(host) if row.name == "kata setting"]


def test_a_host_that_has_everything_has_rows_without_advice(host: MadeUp) -> None:
    rows = list(preflight(host))
    assert {row.verdict for row in rows} == {Verdict.OK}
    assert [row.name.removeprefix("kata ") for row in rows] == [
        *("kvm", "cpu", "kvm module", "vhost-vsock", "vhost-net", "tun"),
        *("shim", "version", "config", "files", "setting", "mounts", "memory"),
    ]


def test_an_empty_host_has_a_row_with_advice_for_all_that_is_missing(tmp_path: Path) -> None:
    rows = list(preflight(MadeUp(tmp_path, [FileNotFoundError(errno.ENOENT, "No such file")])))
    assert len(rows) == 10
    assert all(row.mend for row in rows)
    assert not any(row.verdict is Verdict.OK for row in rows)


@pytest.mark.parametrize(
    ("error", "verdict", "says"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), Verdict.FAIL, "No such file"),
        (OSError(errno.EBUSY, "Device or resource busy"), Verdict.FAIL, "busy"),
        (PermissionError(errno.EACCES, "Permission denied"), Verdict.WARN, "nothing was tried"),
    ],
)
def test_kvm_must_make_a_machine(host: MadeUp, error: OSError, verdict: Verdict, says: str) -> None:
    row = look(MadeUp(host.root, [error]), "kvm")
    assert (row.verdict, says in row.detail, bool(row.mend)) == (verdict, True, True)


def test_a_made_machine_is_not_said_to_boot(host: MadeUp) -> None:
    assert "whether a guest boots" in look(host, "kvm").detail


@pytest.mark.parametrize(
    ("shown", "verdict", "says"),
    [
        (FLAGS.format("svm"), Verdict.OK, "svm"),
        (FLAGS.format("vmx hypervisor"), Verdict.WARN, "nested"),
        (FLAGS.format("sse"), Verdict.FAIL, "firmware"),
        (FLAGS.format("hypervisor"), Verdict.FAIL, "in this virtual machine"),
        ("Features : fp asimd\n", Verdict.WARN, "x86"),
    ],
)
def test_the_processor_says_whether_it_can_and_whether_it_is_nested(
    host: MadeUp, shown: str, verdict: Verdict, says: str
) -> None:
    host.write("proc/cpuinfo", shown)
    row = look(host, "cpu")
    assert (row.verdict, says in row.detail) == (verdict, True)


@pytest.mark.parametrize(
    ("modules", "verdict", "says"),
    [
        (["kvm_amd", "kvm_pvm"], Verdict.OK, "kvm_amd"),
        (["kvm_pvm"], Verdict.WARN, "no stock kernel boots"),
        ([], Verdict.WARN, "neither"),
    ],
)
def test_kvm_without_a_stock_module_is_warned_about(
    host: MadeUp, modules: list[str], verdict: Verdict, says: str
) -> None:
    (host.root / "sys/module/kvm_intel").rename(host.root / "unloaded")
    for name in modules:
        (host.root / "sys/module" / name).mkdir()
    row = look(host, "kvm module")
    assert (row.verdict, says in row.detail) == (verdict, True)


@pytest.mark.parametrize("name", ["vhost-vsock", "vhost-net", "net/tun"])
def test_a_missing_device_is_told_with_its_module(host: MadeUp, name: str) -> None:
    (host.root / "dev" / name).unlink()
    row = look(host, name.rpartition("/")[2])
    assert row.verdict is Verdict.FAIL
    assert "No such file" in row.detail
    assert row.mend.startswith("modprobe ")


def test_a_file_in_the_place_of_a_device_is_none(host: MadeUp) -> None:
    (host.root / "dev/net/tun").unlink()
    host.write("dev/net/tun", "")
    assert "no character device" in look(host, "tun").detail


def test_devices_that_the_configuration_does_without_may_be_missing(host: MadeUp) -> None:
    for name in ("vhost-vsock", "vhost-net"):
        (host.root / "dev" / name).unlink()
    host.write(CONFIG, QEMU.replace(".qemu]", ".clh]\ndisable_vhost_net = true"))
    assert "not needed by clh" in look(host, "vhost-vsock").detail
    assert "disable_vhost_net is true" in look(host, "vhost-net").detail


def test_without_a_containerd_the_default_path_is_said_to_be_looked_at(host: MadeUp) -> None:
    assert "the default PATH, as no containerd runs" in look(host, "shim").detail


def test_the_path_of_the_running_containerd_counts_and_not_the_default(host: MadeUp) -> None:
    (host.root / "usr/bin" / SHIM).unlink()
    expected = host.shim(f"echo '{GOLANG.format('4.1.0')}'", "opt/kata/bin")
    host.process(7, "containerd", b"A=b\0PATH=relative:/usr/bin:/opt/kata/bin\0")
    assert find_shim(host) == Shim(expected, (4, 1, 0), "4.1.0")
    assert "the PATH of containerd (process 7)" in look(host, "shim").detail


def test_a_shim_that_only_the_default_path_has_is_not_found(host: MadeUp) -> None:
    host.process(7, "containerd", b"PATH=/sbin\0", exe="/opt/bin/containerd")
    with pytest.raises(IsolationUnavailable, match=r"process 7\): /sbin:/opt/bin$") as caught:
        find_shim(host)
    assert "3.31.0" in caught.value.advice


def test_the_shim_may_lie_beside_containerd(host: MadeUp) -> None:
    host.process(7, "containerd", b"", exe="/usr/bin/containerd")
    assert find_shim(host).path == host.root / "usr/bin" / SHIM


def test_dockerd_stands_for_the_containerd_that_it_would_start(host: MadeUp) -> None:
    host.process(8, "dockerd", b"PATH=/usr/bin\0")
    assert "dockerd (process 8)" in look(host, "shim").detail
    host.process(19, "containerd", b"PATH=/usr/bin\0")
    assert "containerd (process 19)" in look(host, "shim").detail


def test_every_containerd_is_looked_at(host: MadeUp) -> None:
    host.process(7, "containerd", b"PATH=/nowhere\0", exe="/nowhere/containerd")
    host.process(10, "containerd", b"PATH=/usr/bin\0")
    assert "process 10" in look(host, "shim").detail


def test_what_another_user_calls_containerd_leads_to_no_program_of_theirs(host: MadeUp) -> None:
    host.shim("echo started", "tmp/planted")
    host.process(7, "containerd", b"PATH=/tmp/planted\0")
    host.write("proc/7/status", f"Uid:\t{os.geteuid() + 1}\t0\t0\t0\n")
    assert "as no containerd runs" in look(host, "shim").detail


def test_what_a_container_calls_containerd_leads_to_no_program_of_its_volumes(
    host: MadeUp,
) -> None:
    host.shim("echo started", "volumes/planted")
    host.process(7, "containerd", b"PATH=/volumes/planted\0")
    (host.root / "proc/7/root").unlink()
    (host.root / "proc/7/root").symlink_to(host.root / "volumes")
    assert "as no containerd runs" in look(host, "shim").detail


def test_a_path_that_cannot_be_read_is_said_so(host: MadeUp) -> None:
    host.process(7, "containerd", b"")
    (host.root / "proc/7/environ").unlink()
    assert "as that of containerd (process 7) cannot be read" in look(host, "shim").detail


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo runc version 3.31.0", "does not say"),
        ("echo Kata version: soon", "does not say"),
        ("printf '\\033[31m\\377'", "does not say"),
        ("exit 3", "exit status 3"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_a_shim_that_does_not_say_its_version_is_refused(
    host: MadeUp, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setattr(kata, "_VERSION_SECONDS", 0.5 if "sleep" in script else 10)
    host.shim(script)
    row = look(host, "shim")
    assert (row.verdict, says in row.detail, "\x1b" in row.detail) == (Verdict.FAIL, True, False)


def test_a_shim_that_cannot_be_started_is_refused(host: MadeUp) -> None:
    (host.root / "usr/bin" / SHIM).write_bytes(b"\x7fELF garbage")
    with pytest.raises(IsolationUnavailable, match="--version failed"):
        find_shim(host)


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("1.12.1", True),
        ("3.30.9", True),
        ("3.31.0-rc0", True),
        ("3.31.0", False),
        ("3.31.1-alpha0", False),
        ("4.1.0", False),
    ],
)
def test_versions_before_the_oldest_need_an_override_that_evidence_shows(
    host: MadeUp, version: str, older: bool
) -> None:
    host.shim(f"echo '{GOLANG.format(version)}'")
    shim = find_shim(host)
    assert (shim.older, shim.shown) == (older, version)
    assert look(host, "version").verdict is (Verdict.FAIL if older else Verdict.OK)
    if not older:
        assert require_version(shim, allow_older=False) == version
        return
    words = f"{version} (older than 3.31.0; allowed by configuration)"
    assert require_version(shim, allow_older=True) == words
    with pytest.raises(IsolationUnavailable, match=r"3\.31\.0 or later"):
        require_version(shim, allow_older=False)
    (row,) = [r for r in preflight(host, allow_older=True) if r.name == "kata version"]
    assert row.verdict is Verdict.WARN
    assert words in row.detail


def test_the_shim_in_rust_has_a_configuration_of_its_own(host: MadeUp) -> None:
    host.shim(f"echo '{RUST.format('4.1.0')}'")
    assert look(host, "config").verdict is Verdict.FAIL
    host.write("opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml", QEMU)
    assert "runtime-rs" in look(host, "config").detail


@pytest.mark.parametrize(
    "path", ["configuration-qemu.toml", "runtimes/qemu/configuration-qemu.toml"]
)
def test_a_configuration_that_no_shim_takes_by_itself_is_warned_about(
    host: MadeUp, path: str
) -> None:
    (host.root / CONFIG).unlink()
    host.write(f"opt/kata/share/defaults/kata-containers/{path}", QEMU)
    row = look(host, "config")
    assert (row.verdict, path in row.detail, "ConfigPath" in row.mend) == (Verdict.WARN, True, True)
    assert look(host, "files").verdict is Verdict.OK


def test_a_configuration_that_the_runtime_names_is_the_one_that_counts(host: MadeUp) -> None:
    host.write("srv/kata.toml", QEMU.replace("kata.img", "gone.img"))
    rows = {row.name: row for row in preflight(host, configuration=Path("/srv/kata.toml"))}
    assert "gone.img" in rows["kata files"].detail
    assert rows["kata config"].verdict is Verdict.OK


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "decode"),
        (b"[hypervisor", "Expected"),
        (b"a = " + b"[" * 5000, "recursion"),
        (b"#" * (300 << 10), "more than 262144 bytes"),
        (b"", "hypervisor: Field required"),
        (b"[hypervisor]", "hypervisor: "),
        (b'[hypervisor.qemu]\ndefault_memory = "much"', "hypervisor.qemu.default_memory: "),
        (b'[hypervisor."\\u001b"]\npath = 1', "\\x1b"),
        (b"[hypervisor]\nqemu = 1", "hypervisor.qemu: "),
    ],
)
def test_an_odd_configuration_gives_a_row(host: MadeUp, content: bytes, says: str) -> None:
    host.write(CONFIG, content)
    rows = list(preflight(host))
    (row,) = [row for row in rows if row.name == "kata config"]
    assert (row.verdict, row.detail.isprintable()) == (Verdict.FAIL, True)
    assert says in row.detail
    assert not any(row.name in {"kata files", "kata setting"} for row in rows)


def test_what_is_no_regular_file_is_not_read(host: MadeUp) -> None:
    (host.root / CONFIG).unlink()
    os.mkfifo(host.root / CONFIG)
    assert "no regular file" in look(host, "config").detail
    (host.root / CONFIG).unlink()
    (host.root / CONFIG).mkdir()
    assert "no regular file" in look(host, "config").detail


@pytest.mark.parametrize("name", ["bin/qemu", "vmlinux", "kata.img", "virtiofsd"])
def test_every_file_that_the_configuration_names_must_be_there(host: MadeUp, name: str) -> None:
    (host.root / "opt/kata" / name).unlink()
    row = look(host, "files")
    assert (row.verdict, f"/opt/kata/{name}" in row.detail) == (Verdict.FAIL, True)


def test_other_images_and_firmware_count_and_an_unused_daemon_does_not(host: MadeUp) -> None:
    (host.root / "opt/kata/virtiofsd").unlink()
    machine = QEMU.replace('shared_fs = "virtio-fs"', 'shared_fs = "none"\npflashes = ["/p"]')
    host.write(CONFIG, machine.replace('firmware = ""', 'firmware = "/f\\u0000"'))
    assert look(host, "files").detail == "no such file: firmware '/f\\x00', pflashes /p"


def test_a_machine_without_an_image_is_warned_about(host: MadeUp) -> None:
    host.write(CONFIG, "[hypervisor.remote]\n")
    assert look(host, "files").verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("sandbox_cgroup_only = true", "", Verdict.WARN),
        ("[runtime]", "[runtime]\ndisable_guest_seccomp = true", Verdict.WARN),
        ("[runtime]", "[runtime]\ndisable_new_netns = true", Verdict.FAIL),
        ('internetworking_model = "tcfilter"', 'internetworking_model = "none"', Verdict.FAIL),
        ("debug_console_enabled = false", "debug_console_enabled = true", Verdict.WARN),
        ('firmware = ""', 'extra_monitor_socket = "qmp"', Verdict.WARN),
        ('["enable_iommu"]', '["enable_iommu", "kernel_params"]', Verdict.WARN),
        ('["enable_iommu"]', '[".*"]', Verdict.WARN),
    ],
)
def test_each_known_trap_has_a_row(host: MadeUp, before: str, after: str, verdict: Verdict) -> None:
    assert before in QEMU
    host.write(CONFIG, QEMU.replace(before, after))
    (row,) = settings(host)
    assert row.verdict is verdict
    assert row.detail.split()[0] in row.mend


def test_a_drop_in_beside_the_linked_file_counts(host: MadeUp) -> None:
    host.write("opt/kata/defaults/configuration.toml", QEMU)
    (host.root / CONFIG).unlink()
    (host.root / CONFIG).symlink_to(host.root / "opt/kata/defaults/configuration.toml")
    host.write(
        "opt/kata/defaults/config.d/10-debug.toml", "[agent.kata]\ndebug_console_enabled=true"
    )
    host.write("opt/kata/defaults/config.d/20-memory.toml", "[hypervisor.qemu]\ndefault_memory=256")
    (row,) = settings(host)
    assert row.detail.startswith("debug_console_enabled")
    assert "384 MiB for a guest" in look(host, "memory").detail


def test_drop_ins_without_end_are_refused(host: MadeUp) -> None:
    for number in range(65):
        host.write(f"etc/kata-containers/config.d/{number}.toml", "")
    assert "more than 64 drop-ins" in look(host, "config").detail


@pytest.mark.parametrize(
    ("mounts", "verdict", "says"),
    [
        (RUN_SHARED.replace(" shared:5", ""), Verdict.FAIL, "/run is not"),
        (RUN_SHARED.replace(" shared:5", " master:5"), Verdict.FAIL, "/run is not"),
        (RUN_SHARED.splitlines()[0], Verdict.FAIL, "/ is not"),
        ("1 0 8:1 / / rw shared:1 - ext4 d rw\n", Verdict.OK, "/ is shared"),
        ("\udcff\n\n1 2", Verdict.FAIL, "/ is not"),
    ],
)
def test_guests_see_their_files_where_run_is_shared(
    host: MadeUp, mounts: str, verdict: Verdict, says: str
) -> None:
    host.write("proc/self/mountinfo", mounts.encode("utf-8", "surrogateescape"))
    row = look(host, "mounts")
    assert (row.verdict, says in row.detail) == (verdict, True)


@pytest.mark.parametrize(
    ("shown", "verdict"),
    [
        ("MemAvailable: 655360 kB\n", Verdict.OK),
        ("MemAvailable: 655359 kB\n", Verdict.FAIL),
        ("MemFree: 655360 kB\n", Verdict.WARN),
    ],
)
def test_there_must_be_memory_for_one_machine(host: MadeUp, shown: str, verdict: Verdict) -> None:
    host.write("proc/meminfo", shown)
    assert look(host, "memory").verdict is verdict


def test_what_kata_does_not_enforce_is_said() -> None:
    assert list(NOT_ENFORCED) == ["pids"]
    assert NOT_ENFORCED["pids"].startswith("not enforced")


def output(argv: Sequence[str], at_most: int = 100, seconds: float = 10) -> bytes:
    return ThisHost().output(argv, at_most, seconds)


def test_of_a_program_that_writes_on_only_the_beginning_is_taken() -> None:
    assert output(["yes"]) == b"y\n" * 50


def test_a_program_gets_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert b"SECRET" not in output(["/usr/bin/env"], 4096)


def test_a_program_that_closed_its_output_and_stays_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        output(
            [sys.executable, "-c", "import os,time; os.close(1); os.close(2); time.sleep(60)"], 9, 1
        )


def test_a_device_that_is_not_kvm_makes_no_machine() -> None:
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        ThisHost().create_vm(Path("/dev/null"))


def test_words_of_others_are_cut_and_escaped() -> None:
    assert kata_host.printable("\x1b[31m") == "'\\x1b[31m'"
    assert kata_host.printable("a" * 401) == "a" * 400 + "..."


def test_this_host_gives_rows_and_raises_nothing() -> None:
    rows = list(preflight(ThisHost()))
    assert len(rows) >= 10
    assert all(row.mend for row in rows if row.verdict is not Verdict.OK)
