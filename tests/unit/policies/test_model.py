import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from policies.model import Isolation, Limits, Network, Trust, canonical_json, plain
from policies.reference import Digest, ImageReference


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Isolation.GVISOR, "gvisor"),
        (Network.NONE, "none"),
        (Trust.UNTRUSTED, "untrusted"),
        (ImageReference.parse("a.b/c:1"), "a.b/c:1"),
        (Path("/x"), "/x"),
        (PurePosixPath("y"), "y"),
        ({Isolation.KATA: (1, [2])}, {"kata": [1, [2]]}),
        (frozenset({Isolation.KATA, Isolation.GVISOR}), ["gvisor", "kata"]),
        ({"b", "a"}, ["a", "b"]),
        (Pair(None, Pair(True, 1.5)), {"first": None, "second": {"first": True, "second": 1.5}}),
        (Digest.of(b""), str(Digest.of(b""))),
    ],
)
def test_values_become_plain_json_types(value: Any, expected: Any) -> None:
    assert json.loads(json.dumps(plain(value))) == expected


def test_canonical_json_has_one_form_in_ascii() -> None:
    assert canonical_json({"b": "é\n", "a": (1,)}) == b'{"a":[1],"b":"\\u00e9\\n"}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


def test_isolation_and_network_are_ordered() -> None:
    assert Isolation.CONTAINER < Isolation.GVISOR < Isolation.KATA
    assert Network.NONE < Network.REGISTRIES


def test_tightened_is_the_smaller_of_both() -> None:
    one, other = Limits(pids=1, layers=9), Limits(pids=5, layers=3)
    assert one.tightened(other) == other.tightened(one) == Limits(pids=1, layers=3)
