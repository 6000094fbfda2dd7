"""The reader against the Dockerfiles in ``tests/dockerfiles``."""

import re

import pytest

from builder.errors import DockerfileInvalid, StageUnknown
from tests.dockerfiles.corpus import CASES, Case, shown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reader_says_what_is_expected(case: Case) -> None:
    if case.error is None:
        assert shown(case.read()) == case.facts
    else:
        with pytest.raises((DockerfileInvalid, StageUnknown), match=re.escape(case.error)):
            case.read()


def test_there_are_enough_and_each_says_one_thing() -> None:
    assert len(CASES) > 100
    assert all((case.facts is None) != (case.error is None) for case in CASES)
