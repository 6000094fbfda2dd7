from pathlib import Path

import pytest

from sandbox import runsc
from sandbox.errors import IsolationUnavailable
from sandbox.runsc import Runsc


def fake(directory: Path, script: str) -> str:
    path = directory / "runsc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("release-20240729.0", 20240729),
        ("release-20260810.0", 20260810),
        ("0.0~20240729.0-5~bpo12+1", 20240729),
    ],
)
def test_a_usable_release_is_found(tmp_path: Path, version: str, release: int) -> None:
    name = fake(tmp_path, f"echo runsc version {version}; echo spec: 1.1.0")
    assert runsc.find(name) == Runsc(Path(name), version, release)


def test_images_are_mounted_from_the_release_on_that_can() -> None:
    assert not Runsc(Path("r"), "v", 20260125).mounts_erofs
    assert Runsc(Path("r"), "v", 20260126).mounts_erofs


def test_a_name_is_looked_for_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fake(tmp_path, "echo runsc version release-20240729.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runsc.find("runsc").path == Path(name)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo runsc version release-20240728.9", "20240729 or newer"),
        ("echo runc version release-20240729.0", "does not say"),
        ("echo runsc version unknown", "does not say"),
        ("echo runsc version 120240729", "does not say"),
        ("echo; echo runsc version release-20240729.0", "does not say"),
        ("printf '\\377\\033[31m'", "does not say"),
        ("exit 3", "failed"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_what_will_not_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setattr(runsc, "_VERSION_SECONDS", 1 if "sleep" in script else 10)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(IsolationUnavailable, match=says) as caught:
        runsc.find(fake(tmp_path, script))
    assert caught.value.advice
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("name", ["absent", "/nonexistent/runsc", ""])
def test_absence_is_told_with_what_mends_it(name: str) -> None:
    with pytest.raises(IsolationUnavailable, match="not on PATH") as caught:
        runsc.find(name)
    assert "Install runsc" in caught.value.advice


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = Path(fake(tmp_path, ""))
    path.write_bytes(b"\x7fELF garbage")
    with pytest.raises(IsolationUnavailable, match="failed"):
        runsc.find(str(path))


def test_nothing_of_our_environment_reaches_runsc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    name = fake(tmp_path, 'echo "runsc version release-20240729.0$SECRET"')
    assert runsc.find(name).version == "release-20240729.0"


def test_the_command_closes_every_door_but_the_socket(tmp_path: Path) -> None:
    words = runsc.command(Runsc(Path("/bin/runsc"), "v", 1), tmp_path, "run", "id")
    assert words[0] == "/bin/runsc"
    assert words[-2:] == ["run", "id"]
    assert {"--rootless", "--network=none", "--host-uds=open", "--overlay2=none"} <= set(words)
    assert not any("platform" in word for word in words)


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ({"max_user_namespaces": "0"}, True),
        ({"unprivileged_userns_clone": "0"}, True),
        ({"apparmor_restrict_unprivileged_userns": "1"}, True),
        ({"max_user_namespaces": "1000", "unprivileged_userns_clone": "1"}, False),
        ({}, False),
    ],
)
def test_a_host_without_user_namespaces_says_which_setting_it_is(
    monkeypatch: pytest.MonkeyPatch, value: dict[str, str], refused: bool
) -> None:
    def read_text(path: Path) -> str:
        if path.name not in value:
            raise FileNotFoundError(path)
        return value[path.name] + "\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    answer = runsc.user_namespaces_refused()
    assert (answer is not None) is refused
    assert answer is None or next(iter(value)) in answer
