"""Presets stand for what this host's tools are configured with, and for nothing else."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import EgressRule
from runner.errors import ConfigInvalid
from runner.gateway import presets
from runner.gateway.presets import Surroundings, Target, expand, shipped, target_of, unknown
from runner.settings import EgressSettings, Settings, load

LIBRARY = ("apk", "crates", "go", "maven", "rubygems")


class Machine:
    """A host whose tools are configured as a test says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {"HOME": str(root / "home")}

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def targets(self, preset: str, **stated: Any) -> list[str]:
        where = Surroundings(self.root, self.environ)
        settings = Settings(egress=EgressSettings(presets=stated))
        return [f"{t.host}:{t.port}" for t in presets.targets(preset, settings, where)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# -- apt ---------------------------------------------------------------------------------------


def test_apt_has_the_hosts_of_all_its_sources(machine: Machine) -> None:
    machine.write(
        "etc/apt/sources.list",
        "# deb http://commented.example.com/debian x main\n"
        "deb http://deb.example.com/debian bookworm main\n"
        "deb-src [ arch=amd64 signed-by=/a/b ] https://src.example.com:8443/debian bookworm main\n"
        "deb cdrom:[Disc]/ bookworm main\n"
        "deb file:/srv/debian bookworm main\n",
    )
    machine.write("etc/apt/sources.list.d/a.list", "deb\thttps://a.example.com/ x/\n")
    machine.write(
        "etc/apt/sources.list.d/b.sources",
        "Types: deb\nURIs: https://one.example.com/debian\n  http://two.example.com/debian\n"
        "# a comment within\n http://three.example.com/\nSuites: x\n\n"
        "Types: deb\nuris:https://four.example.com/\nEnabled: yes\n \n"
        "Types: deb\nURIs: https://off.example.com/\nEnabled: no\n",
    )
    machine.write("etc/apt/sources.list.d/c.list.bak", "deb https://bak.example.com/ x/\n")
    assert machine.targets("apt") == [
        "a.example.com:443",
        "deb.example.com:80",
        "four.example.com:443",
        "one.example.com:443",
        "src.example.com:8443",
        "three.example.com:80",
        "two.example.com:80",
    ]


# -- pip ---------------------------------------------------------------------------------------


def test_pip_has_its_indexes_and_its_further_links(machine: Machine) -> None:
    machine.write(
        "etc/pip.conf",
        "[global]\nindex-url = https://pip.example.com/simple\n"
        "extra_index_url =\n    https://one.example.com/simple\n    https://two.example.com:8443/s\n"
        "timeout = 60\n[install]\nfind-links = /srv/wheels http://links.example.com/\n",
    )
    assert machine.targets("pip") == [
        "links.example.com:80", "one.example.com:443", "pip.example.com:443",
        "two.example.com:8443",
    ]  # fmt: skip


def test_pips_users_file_overrides_the_systems_and_the_environment_both(machine: Machine) -> None:
    machine.write("etc/xdg/pip/pip.conf", "[global]\nindex-url = https://xdg.example.com/\n")
    assert machine.targets("pip") == ["xdg.example.com:443"]
    machine.write("etc/pip.conf", "[global]\nindex-url = https://system.example.com/\n")
    assert machine.targets("pip") == ["system.example.com:443"]
    machine.write("home/.pip/pip.conf", "[global]\nindex-url = https://old.example.com/\n")
    assert machine.targets("pip") == ["old.example.com:443"]
    machine.write("home/.config/pip/pip.conf", "[global]\nindex-url = https://own.example.com/\n")
    assert machine.targets("pip") == ["own.example.com:443"]
    config = machine.write("config/pip/pip.conf", "[global]\nindex-url = https://c.example.com/\n")
    machine.environ["XDG_CONFIG_HOME"] = str(config.parents[1])
    assert machine.targets("pip") == ["c.example.com:443"]
    machine.environ["PIP_INDEX_URL"] = "https://environ.example.com/"
    machine.environ["PIP_EXTRA_INDEX_URL"] = "https://more.example.com/ https://last.example.com/"
    assert machine.targets("pip") == [
        "environ.example.com:443", "last.example.com:443", "more.example.com:443",
    ]  # fmt: skip


def test_pips_own_file_comes_first_and_devnull_means_no_file(machine: Machine) -> None:
    own = machine.write("own.conf", "[global]\nindex-url = https://own.example.com/\n")
    machine.environ["PIP_CONFIG_FILE"] = str(own)
    assert machine.targets("pip") == ["own.example.com:443"]
    machine.write("etc/pip.conf", "[global]\nindex-url = https://system.example.com/\n")
    assert machine.targets("pip") == ["system.example.com:443"]
    machine.environ["PIP_CONFIG_FILE"] = "/dev/null"
    assert machine.targets("pip") == []


# -- npm ---------------------------------------------------------------------------------------


def test_npm_has_its_registry_and_those_of_scopes(machine: Machine) -> None:
    machine.write(
        "etc/npmrc",
        "registry=https://system.example.com/\n@ours:registry = http://ours.example.com:4873\n",
    )
    machine.write(
        "home/.npmrc",
        "; registry=https://commented.example.com/\nregistry = 'https://npm.example.com/'\n"
        "//npm.example.com/:_authToken=secret\n",
    )
    assert machine.targets("npm") == ["npm.example.com:443", "ours.example.com:4873"]


@pytest.mark.parametrize("name", ["npm_config_registry", "NPM_CONFIG_REGISTRY"])
def test_npms_environment_wins(machine: Machine, name: str) -> None:
    machine.write("home/.npmrc", "registry=https://file.example.com/\n")
    machine.environ[name] = "https://environ.example.com/"
    assert machine.targets("npm") == ["environ.example.com:443"]


def test_npms_files_may_be_elsewhere(machine: Machine) -> None:
    user = machine.write("user", "registry=https://user.example.com/\n")
    system = machine.write("system", "@a:registry=https://system.example.com/\n")
    machine.write("etc/npmrc", "@b:registry=https://not-asked.example.com/\n")
    machine.environ |= {"npm_config_userconfig": str(user), "npm_config_globalconfig": str(system)}
    assert machine.targets("npm") == ["system.example.com:443", "user.example.com:443"]


# -- what may come out -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["apt", "pip", "npm"])
def test_no_host_is_known_where_none_is_configured(machine: Machine, preset: str) -> None:
    assert machine.targets(preset) == []


def test_users_and_passwords_are_left_behind(machine: Machine) -> None:
    url = "https://me:p%40ss@mirror.example.com/x"
    machine.write("etc/apt/sources.list", f"deb {url} x main\n")
    machine.write("etc/pip.conf", f"[global]\nindex-url = {url}\n")
    machine.write("etc/npmrc", f"registry={url}\n")
    for preset in ("apt", "pip", "npm"):
        assert machine.targets(preset) == ["mirror.example.com:443"]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("HTTPS://Mirror.Example.COM./x", Target("mirror.example.com", 443)),
        ("http://127.0.0.1:8080", Target("127.0.0.1", 8080)),
        ("http://*.example.com/", None),
        ("https://exa_mple.com/", None),
        ("https://b\u00fccher.example.com/", None),
        ("https://[::1]/", None),
        ("https://[x/", None),
        ("https://mirror.example.com:99999/", None),
        ("https://mirror.example.com:x/", None),
        ("https://${HOST}/", None),
        ("https:///x", None),
        ("ftp://mirror.example.com/", None),
        ("mirror+http://mirror.example.com/list", None),
        ("/srv/wheels", None),
        ("", None),
    ],
)
def test_a_target_is_a_host_that_a_policy_could_name(url: str, found: Target | None) -> None:
    assert target_of(url) == found


@given(st.text() | st.text(alphabet="htps:/@[]*.a1#?\\ \n\t=", max_size=60))
def test_whatever_stands_in_a_configuration_is_no_wildcard(text: str) -> None:
    for url in (text, *presets.apt_list(text), *presets.apt_sources(text)):
        found = target_of(url)
        assert found is None or re.fullmatch(r"[a-z0-9.-]+", found.host)
    presets.pip_config(text)
    presets.npmrc(text)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe", b"[global\n", b"index-url = https://x.example.com", b"x" * ((1 << 20) + 1)],
)
def test_a_file_that_makes_no_sense_is_left_out(machine: Machine, data: bytes) -> None:
    for name in ("etc/pip.conf", "etc/npmrc", "etc/apt/sources.list"):
        machine.write(name, data)
    assert [machine.targets(preset) for preset in ("apt", "pip", "npm")] == [[], [], []]


def test_a_preset_has_so_many_targets_at_most(machine: Machine) -> None:
    machine.write("etc/apt/sources.list", "".join(f"deb http://m{n}.x/ a\n" for n in range(999)))
    assert len(machine.targets("apt")) == presets.MOST_TARGETS


def test_the_working_directory_is_not_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("project/.npmrc", "registry=https://project.example.com/\n")
    monkeypatch.chdir(machine.root / "project")
    assert machine.targets("npm") == []


# -- our settings, and the library -------------------------------------------------------------


def test_our_settings_win(machine: Machine) -> None:
    machine.write("etc/pip.conf", "[global]\nindex-url = https://pip.example.com/simple\n")
    stated = {"pip": ("mirror.example.com:8443", "files.example.com"), "go": ("go.example.com",)}
    assert machine.targets("pip", **stated) == ["files.example.com:443", "mirror.example.com:8443"]
    assert machine.targets("go", **stated) == ["go.example.com:443"]
    assert machine.targets("pip", pip=()) == []


@pytest.mark.parametrize(
    "stated",
    [
        '[egress.presets]\npip = ["*.example.com"]',
        '[egress.presets]\npip = ["*"]',
        '[egress.presets]\npip = ["me:secret@mirror.example.com"]',
        '[egress.presets]\npip = ["https://mirror.example.com"]',
        '[egress.presets]\npip = ["mirror.example.com:0"]',
        '[egress.presets]\npip = ["mirror.example.com:"]',
        '[egress.presets]\npip = ["mirror.example.com:\u0664"]',
        '[egress.presets]\npip = ["Mirror.example.com"]',
        '[egress.presets]\npip = "mirror.example.com"',
        '[egress.presets]\ncpan = ["mirror.example.com"]',
        "egress = 3",
    ],
)
def test_settings_that_name_no_exact_host_are_refused(tmp_path: Path, stated: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(stated, encoding="utf-8")
    with pytest.raises(ConfigInvalid, match="egress"):
        load({"RUNNER_CONFIG": str(config)})


@pytest.mark.parametrize("preset", LIBRARY)
def test_a_shipped_preset_names_hosts_of_its_own_ecosystem_alone(preset: str) -> None:
    found = shipped(preset)
    assert found
    shared = re.compile(r".*(googleapis|amazonaws|github|githubusercontent|cloudfront|fastly)\..*")
    for target in found:
        assert not target.host.startswith("*")
        assert not shared.fullmatch(target.host)
        assert target.port == 443 or preset == "apk"


def test_the_library_names_nothing_for_the_presets_that_a_host_configures() -> None:
    directory = Path(presets.__file__).parents[2] / "policies" / "library" / "egress"
    assert sorted(path.stem for path in directory.iterdir()) == sorted(LIBRARY)


# -- rules -------------------------------------------------------------------------------------

PIP = EgressRule(preset="pip", private_ranges=("10.0.0.0/8",))


def test_a_preset_becomes_a_rule_for_each_port(machine: Machine) -> None:
    machine.write("etc/pip.conf", "[global]\nindex-url = https://a.x/\nfind-links = http://b.x/\n")
    literal = EgressRule(hosts=("files.example.org",))
    found = expand(
        ((literal, PIP), (literal,)), Settings(), Surroundings(machine.root, machine.environ)
    )
    assert found == (
        (literal, replace(PIP, hosts=("b.x",), ports=(80,)), replace(PIP, hosts=("a.x",))),
        (literal,),
    )
    assert unknown(found) == ()


def test_a_preset_that_nothing_is_known_about_allows_nothing(machine: Machine) -> None:
    where = Surroundings(machine.root, machine.environ)
    found = expand(((PIP,),), Settings(), where)
    assert found == ((PIP,),)
    assert found[0][0].hosts == ()
    assert unknown(found) == ("pip",)


def test_a_preset_keeps_the_methods_of_its_rule() -> None:
    found = expand(((EgressRule(preset="apk", methods=("GET",)),),), Settings())
    assert [(rule.ports, rule.methods) for rule in found[0]] == [
        ((80,), ("GET",)),
        ((443,), ("GET",)),
    ]
