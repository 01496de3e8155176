"""A llama model of random weights, half a megabyte, that llama.cpp loads. Must need only the standard library.

It says nothing sensible and is not meant to: it makes a real server stream real tokens. The weights are random from a
fixed seed, so the file is the same everywhere, but for one hidden channel that is held constant: through it the output
layer prefers whole words over raw bytes (which would make invalid UTF-8) and ends a reply after some hundred tokens.
The vocabulary is of the SentencePiece kind, with byte fallback.
"""

from __future__ import annotations

import random
from array import array
from pathlib import Path

from tests.real.gguf_file import Tensor, Value, encode

SEED = 20_261_120
WIDTH, LAYERS, HEADS, FEED_FORWARD = 64, 2, 4, 128
CONTEXT_TOKENS = 4096
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama.cpp's token types
_UNK, _BOS, _EOS = 0, 1, 2
_WORD_LIST = (
    "the of and to in is it you that he was for on are with as his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more write go see number no "
    "way could people my than first water been call who oil its now find long down day did get come made may part "
    "over new sound take only little work know place year live me back give most very after"
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;-'\"()é日本語🙂"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(path: Path) -> Path:
    """Write the model file, whole or not at all, and return its path. Raises OSError."""
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(build())
    partial.replace(path)
    return path


def build() -> bytes:
    """The file's bytes, equal on every call."""
    tokens, kinds = _vocabulary()
    return encode(_metadata(tokens, kinds), _tensors(kinds))


def _vocabulary() -> tuple[list[str], list[int]]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *([_BYTE] * 256)]
    pieces = ["▁", *_CHARACTERS, *(f"▁{word}" for word in _WORD_LIST.split())]
    return tokens + pieces, kinds + [_NORMAL] * len(pieces)


def _metadata(tokens: list[str], kinds: list[int]) -> dict[str, Value]:
    # Longer pieces score higher, so the tokenizer merges letters into words where it can.
    scores = [float(len(token)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "general.architecture": "llama",
        "general.name": "tollgate-tiny-random",
        "general.file_type": 0,
        "llama.context_length": CONTEXT_TOKENS,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": _UNK,
        "tokenizer.ggml.bos_token_id": _BOS,
        "tokenizer.ggml.eos_token_id": _EOS,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _tensors(kinds: list[int]) -> dict[str, Tensor]:
    chance = random.Random(SEED)
    tensors = {"token_embd.weight": _matrix(chance, WIDTH, len(kinds), 0.5)}
    _hold_first_channel(tensors["token_embd.weight"], [4.0] * len(kinds))
    for layer in range(LAYERS):
        tensors |= _layer(chance, f"blk.{layer}.")
    tensors["output_norm.weight"] = _ones()
    tensors["output.weight"] = _matrix(chance, WIDTH, len(kinds), 0.25)
    # The held channel is about +5.5 after the norm, so this biases each logit: words freely, an end rarely.
    bias = {_NORMAL: 1.0, _UNKNOWN: -4.0, _CONTROL: -4.0, _BYTE: -4.0}
    leanings = [bias[kind] for kind in kinds]
    leanings[_EOS] = 0.9
    _hold_first_channel(tensors["output.weight"], leanings)
    return tensors


def _layer(chance: random.Random, prefix: str) -> dict[str, Tensor]:
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH, WIDTH),
        "attn_v": (WIDTH, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (WIDTH, FEED_FORWARD),
        "ffn_up": (WIDTH, FEED_FORWARD),
        "ffn_down": (FEED_FORWARD, WIDTH),
    }
    layer = {f"{prefix}{name}.weight": _matrix(chance, columns, rows, 0.1) for name, (columns, rows) in shapes.items()}
    return layer | {f"{prefix}attn_norm.weight": _ones(), f"{prefix}ffn_norm.weight": _ones()}


def _matrix(chance: random.Random, columns: int, rows: int, spread: float) -> Tensor:
    return Tensor((columns, rows), array("f", (chance.gauss(0.0, spread) for _ in range(columns * rows))))


def _ones() -> Tensor:
    return Tensor((WIDTH,), array("f", [1.0]) * WIDTH)


def _hold_first_channel(matrix: Tensor, values: list[float]) -> None:
    for row, value in enumerate(values):
        matrix.data[row * WIDTH] = value
