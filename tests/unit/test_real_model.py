"""The tiny model file of `make test-real`, read back without llama.cpp. Must not need the real server's environment."""

from __future__ import annotations

import struct
from array import array

import pytest

from tests.real import tiny_model
from tests.real.gguf_file import ALIGNMENT, Tensor, encode


def test_the_model_is_the_same_file_every_time() -> None:
    assert tiny_model.build() == tiny_model.build()


def test_the_model_is_small_enough_to_make_on_the_spot() -> None:
    assert len(tiny_model.build()) < 1_000_000


def test_the_file_begins_as_gguf_version_three_says() -> None:
    magic, version, tensors, metadata = struct.unpack_from("<4sIQQ", tiny_model.build())
    assert (magic, version) == (b"GGUF", 3)
    assert tensors == 3 + 9 * tiny_model.LAYERS  # embedding, final norm, output; nine per layer
    assert metadata == 21


def test_values_are_written_with_the_types_llama_cpp_reads() -> None:
    written = encode({"a": 7, "b": 0.5, "c": True, "d": "né", "e": ["x"], "f": [1, 2], "g": [0.5]}, {})
    expected = b"".join(
        [
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 7),
            struct.pack("<Q1sII", 1, b"a", 4, 7),
            struct.pack("<Q1sIf", 1, b"b", 6, 0.5),
            struct.pack("<Q1sI?", 1, b"c", 7, True),
            struct.pack("<Q1sIQ3s", 1, b"d", 8, 3, "né".encode()),
            struct.pack("<Q1sIIQQ1s", 1, b"e", 9, 8, 1, 1, b"x"),
            struct.pack("<Q1sIIQ2i", 1, b"f", 9, 5, 2, 1, 2),
            struct.pack("<Q1sIIQf", 1, b"g", 9, 6, 1, 0.5),
        ]
    )
    assert written == expected + bytes(-len(expected) % ALIGNMENT)


def test_each_tensor_starts_on_the_alignment() -> None:
    first, second = Tensor((3,), array("f", [1.0, 2.0, 3.0])), Tensor((1,), array("f", [4.0]))
    written = encode({}, {"one": first, "two": second})
    assert struct.unpack("<3f", written[-2 * ALIGNMENT : -2 * ALIGNMENT + 12]) == (1.0, 2.0, 3.0)
    assert struct.unpack("<f", written[-ALIGNMENT : -ALIGNMENT + 4]) == (4.0,)


def test_a_tensor_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 6 32-bit floats, got 5"):
        Tensor((2, 3), array("f", [0.0] * 5))
