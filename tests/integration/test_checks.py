"""``runner doctor`` and ``runner verify``, in this process."""

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runner.cli import main
from tests.support.hosts import Person

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]


@pytest.fixture(autouse=True)
def _as(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(person.directory / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(person.directory / "state"))
    monkeypatch.setenv("RUNNER_CONFIG", str(person.config))
    monkeypatch.setenv("DOCKER_CONFIG", str(person.directory))


@pytest.fixture
def image(tools_base: str) -> str:
    """A sound image by digest."""
    shown = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}", f"docker://{tools_base}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return f"{tools_base.rpartition(':')[0]}@{shown}"


def test_a_host_that_can_build_passes(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {row["verdict"] for row in rows.values()} <= {"ok", "warn"}
    assert "gvisor" in rows["sandbox"]["detail"]
    person.assert_nothing_left()


def test_each_failed_row_names_its_mend(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = place / "data"
    empty.mkdir(mode=0o755)
    monkeypatch.setenv("XDG_DATA_HOME", str(empty))
    config = place / "config.toml"
    config.write_text('[local]\nrunsc = "/nonexistent/runsc"\n')
    monkeypatch.setenv("RUNNER_CONFIG", str(config))
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    failed = [line for line in out.splitlines() if line.startswith("fail")]
    assert [line.split()[1] for line in failed] == ["runsc", "sandbox", "builder"]
    assert out.count("->") >= len(failed)
    assert "check-failed" in err


def test_a_sound_image_passes(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", image, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["digest"] == image.partition("@")[2]
    assert found["platforms"] == ["linux/amd64"]


@pytest.mark.parametrize(
    ("change", "arguments", "status", "code"),
    [
        (lambda name: name.partition("@")[0] + ":1", [], 2, "usage"),
        (lambda name: name.partition("@")[0] + "@sha256:12", [], 2, "invalid-reference"),
        (lambda name: name[:-8] + "00000000", [], 6, "image-not-found"),
        (lambda name: name, ["--platform", "linux/arm64"], 5, "verification-failed"),
    ],
    ids=["no digest", "half a digest", "another digest", "another platform"],
)
def test_what_is_no_such_image_has_its_own_end(
    change: object, arguments: list[str], status: int, code: str, image: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert callable(change)
    assert main(["verify", change(image), *arguments]) == status
    assert code in capsys.readouterr().err


def test_a_layer_that_rotted_in_the_registry_is_found(
    tools_base: str, image: str, registry: "RealRegistry", capsys: pytest.CaptureFixture[str]
) -> None:
    copy = f"{registry.host}/rotten/toolbox"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false",
         "--dest-tls-verify=false", f"docker://{tools_base}", f"docker://{copy}:1"],
        check=True,
    )  # fmt: skip
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{copy}:1"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    layer = json.loads(raw)["layers"][0]["digest"].partition(":")[2]
    (blob,) = registry.storage.rglob(f"blobs/sha256/*/{layer}/data")
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert main(["verify", f"{copy}@{image.partition('@')[2]}"]) == 5
    finally:
        blob.write_bytes(data)
    assert "verification-failed" in capsys.readouterr().err
