from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Gate, Gates


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    with Gates(tmp_path) as made:
        yield made


@pytest.fixture
def gate(gates: Gates) -> Gate:
    return gates.open()
