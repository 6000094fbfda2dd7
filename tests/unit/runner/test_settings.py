from pathlib import Path

import pytest
from pydantic import ValidationError

from policies.reference import Digest, ImageReference
from runner import settings
from runner.errors import ConfigInvalid
from runner.settings import BaseImageSettings, RegistrySettings, Settings, load


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "system.toml"
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own.toml"


def test_without_files_there_are_defaults(tmp_path: Path) -> None:
    assert load({"HOME": str(tmp_path)}) == Settings()
    assert load({}) == Settings()
    assert Settings().registry("any") == RegistrySettings(plain_http=False, private_address=False)


@pytest.mark.parametrize("variable", ["HOME", "XDG_CONFIG_HOME"])
def test_the_users_file_is_where_xdg_says(tmp_path: Path, variable: str) -> None:
    directory = tmp_path / (".config" if variable == "HOME" else "") / "runner"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text("cache_bytes = 7")
    assert load({variable: str(tmp_path)}).cache_bytes == 7


def test_nothing_is_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / ".config" / "runner"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text("cache_bytes = 7")
    monkeypatch.chdir(tmp_path)
    assert load({"HOME": ""}) == Settings()


def test_later_files_override_keys_and_add_registries(system: Path, own: Path) -> None:
    system.write_text(
        'cache_bytes = 1\n[registries."a.b"]\nplain_http = true\n[registries."c.d"]\n'
    )
    own.write_text('cache_bytes = 2\n[registries."c.d"]\nmirrors = ["m.n/p"]\n')
    loaded = load({"RUNNER_CONFIG": str(own)})
    assert loaded.cache_bytes == 2
    assert loaded.registry("a.b").plain_http
    assert loaded.registry("c.d").mirrors == ("m.n/p",)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"x = 1", "x"),
        (b"cache_bytes = -1", "cache_bytes"),
        (b"cache_bytes =", "own.toml"),
        (b"cache_bytes = " + b"9" * 5000, "own.toml"),
        (b"\xff", "own.toml"),
        (b"registries = 3", "registries"),
        (b"registries = []", "registries"),
        (b'[registries."a.b"]\nplain = true', "plain"),
        (b"[local]\nfirst_uid = 0", "first_uid"),
        (b"[local]\nuids = 0", "uids"),
        (b"[http]\nattempts = 'x'", "attempts"),
    ],
)
def test_what_is_wrong_is_named(own: Path, data: bytes, says: str) -> None:
    own.write_bytes(data)
    with pytest.raises(ConfigInvalid, match=says):
        load({"RUNNER_CONFIG": str(own)})


def test_the_systems_registries_are_checked_too(system: Path, own: Path) -> None:
    system.write_text("registries = 3")
    own.write_text("")
    with pytest.raises(ConfigInvalid, match="system"):
        load({"RUNNER_CONFIG": str(own)})


def test_a_file_that_was_named_must_exist(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="does not exist"):
        load({"RUNNER_CONFIG": str(own)})
    with pytest.raises(ConfigInvalid, match="directory"):
        load({"RUNNER_CONFIG": str(tmp_path)})


# -- where base images come from -----------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [{"docker.io/library/*": "mirror.example/hub/*"}, {"docker.io/**": "mirror.example/**"},
     {"docker.io/library/debian": "mirror.example/debian"}, {}],
)  # fmt: skip
def test_a_rule_that_rewrites_is_taken(rules: dict[str, str]) -> None:
    assert BaseImageSettings(rewrite=rules).rewrite == rules


@pytest.mark.parametrize(
    ("pattern", "target"),
    [("docker.io/library/*", "mirror.example/**"), ("docker.io/library/*", "mirror.example/x"),
     ("docker.io/library/x", "mirror.example/*"), ("docker.io/*/x", "mirror.example/*/x"),
     ("docker.io/lib*", "mirror.example/lib*"), ("*", "*"), ("debian", "mirror.example/debian"),
     ("docker.io/Library/*", "mirror.example/*"), ("docker.io/library/*", "mirror.example//*"),
     ("docker.io/library/x", "https://mirror.example/x"), ("docker.io/a/b:1", "m.example/b"),
     ("docker.io/a/b", "m.example/b@sha256:" + "0" * 64), ("docker.io/**", "m.example/***")],
)  # fmt: skip
def test_a_rule_that_could_be_read_in_two_ways_is_refused(pattern: str, target: str) -> None:
    with pytest.raises(ValidationError):
        BaseImageSettings(rewrite={pattern: target})


def test_digest_and_tag_come_along() -> None:
    rules = BaseImageSettings(rewrite={"docker.io/library/*": "mirror.example/hub/*"})
    digest = Digest.of(b"x")
    image = ImageReference.parse("debian:12")
    assert str(rules.asked_for(image)) == "mirror.example/hub/debian:12"
    assert str(rules.asked_for(image.at(digest))) == f"mirror.example/hub/debian@{digest}"
    other = ImageReference.parse("docker.io/acme/debian:12")
    assert rules.asked_for(other) is other
