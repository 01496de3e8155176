"""The token ranks, shipped inside the package: `encoding(name)` is tiktoken's Encoding, built without network,
environment or temporary files.

Loading costs about 0.2 s and 50 MiB for o200k_base, so it happens once per process and only for encodings in use.
Must not: hand out tokens from a damaged file (the packed file's hash is checked first), or download anything.
Where the files come from: NOTICE in this folder; how they are made: `pack.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from pathlib import Path
from typing import Final

import tiktoken

from metering.ranks.pack import unpack

__all__ = ["CL100K", "NAMES", "O200K", "RanksDamaged", "encoding"]

O200K: Final = "o200k_base"
CL100K: Final = "cl100k_base"
NAMES: Final = (O200K, CL100K)

PACKED_SHA256: Final = {
    O200K: "e5f3da497f38e373fb0b4874acc21ea357bbd23e5296e18ab9c219fac32797a8",
    CL100K: "6483311229dcad08cf0e1ae1354ed33b49bd52c90e010a3015a0882758e7a74a",
}
"""SHA-256 of the packed files here; `pack.py` prints these lines."""

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERNS: Final = {
    O200K: "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SUFFIX,
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SUFFIX,
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    CL100K: "|".join(
        (
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?+\p{L}++",
            r"\p{N}{1,3}+",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
            r"\s++$",
            r"\s*[\r\n]",
            r"\s+(?!\S)",
            r"\s",
        )
    ),
}
"""The pre-split patterns of tiktoken's `openai_public.py` (0.14), alternative by alternative."""

_SPECIAL: Final = {
    O200K: {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    CL100K: {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
}

_FOLDER = Path(__file__).parent
_loaded: dict[str, tiktoken.Encoding] = {}
_loading = threading.Lock()


class RanksDamaged(Exception):
    """A rank file of the package is missing or is not the one that was shipped."""


class _Shipped(tiktoken.Encoding):
    """An Encoding without tiktoken's Python copy of the ranks (20 MiB for o200k_base), which only pickling reads:
    pickled, it goes by name instead."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return encoding, (self.name,)


def encoding(name: str) -> tiktoken.Encoding:
    """The encoding `o200k_base` or `cl100k_base`, built at the first call (thread-safe), cached for the process.

    Raises RanksDamaged when the packed file is missing or altered, ValueError for another name.
    """
    known = _loaded.get(name)
    if known is not None:
        return known
    if name not in PACKED_SHA256:
        raise ValueError(f"no ranks are shipped for the encoding '{name}': use one of {', '.join(NAMES)}")
    with _loading:
        if name not in _loaded:
            _loaded[name] = _build(name, _FOLDER)
        return _loaded[name]


def tokens(name: str, folder: Path = _FOLDER) -> list[bytes]:
    """The tokens of one packed file in the order of their ranks. Raises RanksDamaged."""
    path = folder / f"{name}.xz"
    fix = "Reinstall Tollgate, or make the file again with `python -m metering.ranks.pack SRC OUT`."
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise RanksDamaged(f"{path}: cannot be read: {error.strerror}. {fix}") from None
    found = hashlib.sha256(blob).hexdigest()
    if found != PACKED_SHA256[name]:
        raise RanksDamaged(f"{path}: its sha256 is {found}, not {PACKED_SHA256[name]}. {fix}")
    return unpack(blob)


def _build(name: str, folder: Path) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens(name, folder))}
    built = _Shipped(name, pat_str=_PATTERNS[name], mergeable_ranks=ranks, special_tokens=_SPECIAL[name])
    built._mergeable_ranks = {}
    del ranks
    _give_back_memory()
    return built


def _give_back_memory() -> None:
    """Return freed pages to the system. Building leaves glibc's heap with 25 MiB that nothing will use again;
    other C libraries do this themselves and lack the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
