"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

from runner.settings import (
    BaseImageSettings,
    DockerSettings,
    EgressSettings,
    HttpLimits,
    KubernetesSettings,
    LocalSettings,
    RegistrySettings,
    Settings,
    TolerationSettings,
)
from tests.support.hosts import REPOSITORY

PAGES = sorted(REPOSITORY.glob("docs/**/*.md"))
_TEST = re.compile(r"`((?:unit|integration|hostile)/[\w/]+\.py)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    missing += [test for test in _TEST.findall(text) if not (REPOSITORY / "tests" / test).exists()]
    assert missing == []


def test_every_setting_is_described() -> None:
    page = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    tables = (
        Settings, RegistrySettings, LocalSettings, DockerSettings, HttpLimits, EgressSettings,
        BaseImageSettings, KubernetesSettings, TolerationSettings,
    )  # fmt: skip
    keys = {key for table in tables for key in table.model_fields}
    assert [key for key in sorted(keys) if f"`{key}`" not in page and f"[{key}" not in page] == []
