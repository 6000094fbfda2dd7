"""Layers decompressed as a stream: all of it, or an error."""

import gzip

import pytest
import zstandard

from runner.errors import VerificationFailed
from runner.inflate import inflated


def packed(compression: str, data: bytes) -> bytes:
    return gzip.compress(data) if compression == "gzip" else zstandard.compress(data)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_every_member_of_a_stream_is_read(compression: str) -> None:
    stream = packed(compression, b"one") + packed(compression, b"two")
    pieces = (stream[i : i + 5] for i in range(0, len(stream), 5))
    assert b"".join(inflated(pieces, compression)) == b"onetwo"


def test_what_is_not_compressed_stays_as_it_is() -> None:
    assert list(inflated(iter([b"one", b"two"]), "")) == [b"one", b"two"]


def test_a_stream_that_is_cut_short_is_an_error() -> None:
    with pytest.raises(VerificationFailed, match="layer-stream"):
        list(inflated(iter([packed("gzip", b"one")[:-1]]), "gzip"))
