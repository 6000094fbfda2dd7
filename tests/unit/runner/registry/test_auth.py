import base64
import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ConfigInvalid, RegistryRefused
from runner.registry import auth
from runner.registry.auth import Anonymous, DockerConfig, Login, Secret


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".docker").mkdir()
    (tmp_path / "run" / "containers").mkdir(parents=True)
    (tmp_path / ".config" / "containers").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    return tmp_path


@pytest.fixture
def environ(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "PATH": f"{home / 'bin'}:/usr/bin:/bin",
    }


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def helper(home: Path, script: str, name: str = "test") -> None:
    program = home / "bin" / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)


def test_a_secret_shows_in_no_text() -> None:
    login = Login("me", Secret("hunter2"))
    texts = (f"{login}", f"{login!r}", f"{login.password}", "%s" % login.password, str([login]))  # noqa: UP031 - the old way too
    assert all("hunter2" not in text for text in texts)
    assert "hunter2" not in repr(login.basic())
    assert login.basic().reveal() == "Basic " + encoded("me", "hunter2")


def test_secrets_compare_by_value() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1


def test_anonymous_has_no_login() -> None:
    assert Anonymous().for_host("docker.io", "library/debian") is None


@pytest.mark.parametrize(
    ("key", "host", "repository", "found"),
    [
        ("registry.example.com", "registry.example.com", "", True),
        ("https://registry.example.com", "registry.example.com", "a", True),
        ("https://registry.example.com/v1/", "registry.example.com", "a", True),
        ("https://registry.example.com/v2/", "registry.example.com", "a", True),
        ("localhost:5000", "localhost:5000", "a", True),
        ("localhost:5000", "localhost:5001", "a", False),
        ("localhost:5000", "localhost", "a", False),
        ("example.com", "registry.example.com", "", False),
        ("registry.example.com.evil.org", "registry.example.com", "", False),
        ("https://index.docker.io/v1/", "docker.io", "library/debian", True),
        ("docker.io", "docker.io", "library/debian", True),
        ("registry-1.docker.io", "docker.io", "library/debian", True),
        ("docker.io/acme", "docker.io", "acme/app", True),
        ("docker.io/acme", "docker.io", "acme2/app", False),
        ("registry.example.com/acme/app", "registry.example.com", "acme/app", True),
        ("registry.example.com/acme/app", "registry.example.com", "acme", False),
    ],
)
def test_a_login_is_found_under_the_names_that_clients_write(
    key: str, host: str, repository: str, found: bool, environ: dict[str, str]
) -> None:
    write(
        Path(environ["HOME"], ".docker", "config.json"),
        {"auths": {key: {"auth": encoded("me", "p:w")}}},
    )
    expected = Login("me", Secret("p:w")) if found else None
    assert DockerConfig(environ).for_host(host, repository) == expected


def test_the_most_specific_name_wins(home: Path, environ: dict[str, str]) -> None:
    names = ("r.example", "r.example/acme", "r.example/acme/app")
    auths = {name: {"auth": encoded(name, "x")} for name in names}
    write(home / "run" / "containers" / "auth.json", {"auths": auths})
    users = [
        login.user if (login := DockerConfig(environ).for_host("r.example", repository)) else None
        for repository in ("acme/app", "acme/other", "other", "")
    ]
    assert users == ["r.example/acme/app", "r.example/acme", "r.example", "r.example"]


def test_files_are_looked_at_in_order(home: Path, environ: dict[str, str]) -> None:
    places = [
        home / ".docker" / "config.json",
        home / "run" / "containers" / "auth.json",
        home / ".config" / "containers" / "auth.json",
    ]
    for number, place in reversed(list(enumerate(places))):
        write(place, {"auths": {"r.example": {"username": f"u{number}", "password": "x"}}})
        login = DockerConfig(environ).for_host("r.example")
        assert login is not None
        assert login.user == f"u{number}"
    write(home / "config.json", {"auths": {"r.example": {"auth": encoded("own", "x")}}})
    login = DockerConfig({**environ, "DOCKER_CONFIG": str(home)}).for_host("r.example")
    assert login is not None
    assert login.user == "own"


def test_no_files_is_no_login(tmp_path: Path) -> None:
    assert DockerConfig({"HOME": str(tmp_path)}).for_host("r.example") is None
    assert DockerConfig({}).for_host("r.example") is None


def test_an_empty_entry_is_no_login(home: Path, environ: dict[str, str]) -> None:
    write(home / ".docker" / "config.json", {"auths": {"r.example": {}}})
    assert DockerConfig(environ).for_host("r.example") is None


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"auths": 7}',
        '{"auths": {"r.example": {"auth": "hunter2!"}}}',
        '{"auths": {"r.example": {"auth": "aHVudGVyMg=="}}}',
        '{"auths": {"r.example": {"auth": "//////8="}}}',
        '{"auths": {"r.example": {"auth": ["hunter2"]}}}',
        '{"credsStore": "../../bin/evil"}',
        '{"credsStore": "a b"}',
        '{"credHelpers": {"r.example": "-x/y"}}',
        " " * ((1 << 20) + 1),
    ],
)
def test_a_broken_file_is_named_without_its_contents(
    text: str, home: Path, environ: dict[str, str]
) -> None:
    path = home / ".docker" / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigInvalid) as caught:
        DockerConfig(environ).for_host("r.example")
    assert str(path) in caught.value.message
    assert "hunter2" not in caught.value.message


def test_an_unreadable_file_is_an_error(home: Path, environ: dict[str, str]) -> None:
    (home / ".docker" / "config.json").mkdir()
    with pytest.raises(ConfigInvalid, match="directory"):
        DockerConfig(environ).for_host("r.example")


@pytest.mark.parametrize(
    ("config", "host", "server"),
    [
        ({"credsStore": "test"}, "r.example", "r.example"),
        ({"credHelpers": {"r.example": "test"}}, "r.example", "r.example"),
        (
            {"credHelpers": {"docker.io": "test"}, "credsStore": "absent"},
            "docker.io",
            "https://index.docker.io/v1/",
        ),
        ({"credsStore": "test", "auths": {"r.example": {}}}, "r.example", "r.example"),
    ],
)
def test_a_helper_is_asked_on_its_standard_input(
    config: Any, host: str, server: str, home: Path, environ: dict[str, str]
) -> None:
    helper(
        home,
        f'[ "$1" = get ] && [ "$(cat)" = "{server}" ] && '
        """echo '{"ServerURL": "x", "Username": "me", "Secret": "hunter2"}'""",
    )
    write(home / ".docker" / "config.json", config)
    assert DockerConfig(environ).for_host(host) == Login("me", Secret("hunter2"))


def test_a_helper_without_this_host_is_no_login(home: Path, environ: dict[str, str]) -> None:
    helper(home, "echo 'credentials not found in native keychain'; exit 1")
    write(home / ".docker" / "config.json", {"credsStore": "test"})
    write(
        home / ".config" / "containers" / "auth.json",
        {"auths": {"r.example": {"auth": encoded("me", "x")}}},
    )
    assert DockerConfig(environ).for_host("r.example") == Login("me", Secret("x"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf 'no\\033[31m keyring'; exit 3", r"status 3 .*no\\x1b\[31m keyring"),
        ("echo nonsense", "no login"),
        ("exec head -c 70000 /dev/zero", "more than"),
        ("""echo '{"Username": "<token>", "Secret": "hunter2"}'""", "identity token"),
    ],
)
def test_a_helper_that_fails_says_so(
    script: str, message: str, home: Path, environ: dict[str, str]
) -> None:
    helper(home, script)
    write(home / ".docker" / "config.json", {"credsStore": "test"})
    with pytest.raises(RegistryRefused, match=message) as caught:
        DockerConfig(environ).for_host("r.example")
    assert "hunter2" not in caught.value.message


def test_a_helper_that_hangs_is_ended(
    home: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_HELPER_SECONDS", 0.1)
    helper(home, "exec sleep 60")
    write(home / ".docker" / "config.json", {"credsStore": "test"})
    with pytest.raises(RegistryRefused, match="status -9"):
        DockerConfig(environ).for_host("r.example")


def test_a_missing_helper_is_named(home: Path, environ: dict[str, str]) -> None:
    write(home / ".docker" / "config.json", {"credsStore": "absent"})
    with pytest.raises(RegistryRefused, match="docker-credential-absent"):
        DockerConfig(environ).for_host("r.example")


def test_an_identity_token_is_refused_clearly(home: Path, environ: dict[str, str]) -> None:
    entry = {"auth": encoded("<token>", ""), "identitytoken": "hunter2"}
    write(home / ".docker" / "config.json", {"auths": {"r.example": entry}})
    with pytest.raises(RegistryRefused, match="identity token") as caught:
        DockerConfig(environ).for_host("r.example")
    assert "hunter2" not in caught.value.message
