"""The operator's policy always applies: where it cannot be read, nothing is built."""

from pathlib import Path

import pytest

from policies.errors import PolicyInvalid
from runner.cli import tools

STRICT = b"apiVersion: runner/v1alpha1\nname: strict\ndefault: {isolation: kata}\n"


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "etc" / "policy.yaml"
    path.parent.mkdir()
    monkeypatch.setattr(tools, "OPERATOR_POLICY", path)
    return path


def test_the_shipped_policy_applies_where_the_operator_wrote_none(policy: Path) -> None:
    assert [found.document.name for found in tools.policies([])] == ["default"]
    policy.parent.rmdir()
    assert [found.document.name for found in tools.policies([])] == ["default"]


def test_the_operators_policy_comes_before_what_is_given(policy: Path, tmp_path: Path) -> None:
    policy.write_bytes(STRICT)
    given = tmp_path / "given.yaml"
    given.write_bytes(STRICT.replace(b"strict", b"given"))
    assert [found.document.name for found in tools.policies([given])] == ["strict", "given"]


def test_a_policy_that_is_there_and_cannot_be_read_is_not_none(policy: Path) -> None:
    policy.symlink_to(policy.parent / "missing")
    with pytest.raises(PolicyInvalid):
        tools.policies([])
    policy.unlink()
    policy.mkdir()
    with pytest.raises(PolicyInvalid):
        tools.policies([])
