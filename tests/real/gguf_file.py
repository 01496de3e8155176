"""Writes GGUF version 3, the file format llama.cpp loads. Must know nothing about any particular model.

Source: docs/gguf.md of the ggml project. A file is: magic, version, tensor count, metadata count (little endian), the
metadata pairs, one description per tensor, padding to 32 bytes, then the tensors, each padded to 32 bytes. All tensors
here are 32-bit floats.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TENSOR_F32 = 0

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class Tensor:
    """One matrix or vector. `shape` is in GGUF's order, columns first; `data` holds that many floats, row after row."""

    shape: tuple[int, ...]
    data: array[float]

    def __post_init__(self) -> None:
        expected = 1
        for size in self.shape:
            expected *= size
        if self.data.typecode != "f" or len(self.data) != expected:
            raise ValueError(f"a tensor of shape {self.shape} needs {expected} 32-bit floats, got {len(self.data)}")


def encode(metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> bytes:
    """The whole file, equal for equal input. Integers become uint32 (int32 inside arrays), floats float32.

    Raises struct.error for a number out of range and IndexError for an empty array.
    """
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _typed(value)
    body = bytearray()
    for name, tensor in tensors.items():
        head += _string(name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", _TENSOR_F32, len(body))
        body += _little_endian(tensor.data)
        body += bytes(-len(body) % ALIGNMENT)
    head += bytes(-len(head) % ALIGNMENT)
    return bytes(head + body)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    if isinstance(value, bool):  # before int: a bool is one
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return _typed_array(value)


def _typed_array(values: Sequence[int] | Sequence[float] | Sequence[str]) -> bytes:
    first = values[0]
    if isinstance(first, str):
        kind, items = _STRING, b"".join(_string(str(item)) for item in values)
    elif isinstance(first, int):
        kind, items = _INT32, struct.pack(f"<{len(values)}i", *values)
    else:
        kind, items = _FLOAT32, struct.pack(f"<{len(values)}f", *values)
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + items


def _little_endian(data: array[float]) -> bytes:
    if struct.pack("=H", 1) == struct.pack("<H", 1):
        return data.tobytes()
    swapped = array("f", data)
    swapped.byteswap()
    return swapped.tobytes()
