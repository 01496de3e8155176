"""The shipped ranks are OpenAI's, whole, and load offline."""

from __future__ import annotations

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken

from metering import ranks
from metering.ranks import NAMES, RanksDamaged, encoding, pack

SHIPPED = Path(ranks.__file__).parent
TEXT = "Ünïcode's  text, 12345 numbers\n\n\tand 你好\uff0c世界 🎉 <|endoftext|> it's WE'LL"


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_file_regenerates_the_published_file_byte_for_byte(name: str) -> None:
    published = pack.as_tiktoken(ranks.tokens(name))
    assert hashlib.sha256(published).hexdigest() == pack.PUBLISHED_SHA256[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_encoding_equals_the_one_that_tiktoken_builds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
    cached.write_bytes(pack.as_tiktoken(ranks.tokens(name)))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs, ours = tiktoken.get_encoding(name), encoding(name)
    assert (ours._pat_str, ours._special_tokens, ours.n_vocab) == (
        theirs._pat_str,
        theirs._special_tokens,
        theirs.n_vocab,
    )
    assert ours.encode_ordinary(TEXT) == theirs.encode_ordinary(TEXT)
    assert ours.encode(TEXT, allowed_special="all") == theirs.encode(TEXT, allowed_special="all")
    assert ours.decode(ours.encode_ordinary(TEXT)) == TEXT


def test_an_encoding_is_built_once_even_when_threads_race() -> None:
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(encoding, ["cl100k_base"] * 8))
    assert all(one is built[0] for one in built)


def test_an_encoding_survives_pickling_without_its_dropped_ranks() -> None:
    assert pickle.loads(pickle.dumps(encoding("cl100k_base"))) is encoding("cl100k_base")


def test_an_unknown_encoding_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="o200k_base, cl100k_base"):
        encoding("p50k_base")


def test_a_changed_byte_is_refused_before_anything_is_decompressed(tmp_path: Path) -> None:
    damaged = bytearray((SHIPPED / "cl100k_base.xz").read_bytes())
    damaged[5000] ^= 1
    (tmp_path / "cl100k_base.xz").write_bytes(damaged)
    with pytest.raises(RanksDamaged, match=r"cl100k_base\.xz: its sha256 is .* Reinstall Tollgate"):
        ranks.tokens("cl100k_base", tmp_path)


def test_a_missing_file_says_which_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RanksDamaged, match=r"o200k_base\.xz: cannot be read: No such file.* Reinstall"):
        ranks.tokens("o200k_base", tmp_path)


def test_the_pack_command_makes_files_that_unpack_to_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.tiktoken").write_bytes(pack.as_tiktoken(ranks.tokens(name)))
    assert pack.main([str(tmp_path), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        blob = (tmp_path / "out" / f"{name}.xz").read_bytes()
        assert pack.unpack(blob) == ranks.tokens(name)
        assert f'"{name}": "{hashlib.sha256(blob).hexdigest()}"' in printed


def test_the_pack_command_refuses_a_file_that_is_not_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o200k_base.tiktoken").write_bytes(b"IQ== 0\n")
    assert pack.main([str(tmp_path), str(tmp_path)]) == 1
    assert "not the published file" in capsys.readouterr().err
    assert pack.main([]) == 2


@pytest.mark.parametrize("raw", [b"IQ== 1\n", b"I! 0\n", b"IQ==\n"])
def test_an_odd_rank_file_is_refused(raw: bytes) -> None:
    with pytest.raises(pack.NotARankFile, match="line 1"):
        pack.read_tiktoken(raw)


def test_an_odd_packed_file_is_refused() -> None:
    for blob in (b"", b"junk", pack.pack([b"a", b"bc"])[:-3]):
        with pytest.raises(pack.NotARankFile):
            pack.unpack(blob)
    with pytest.raises(pack.NotARankFile):
        pack.pack([b"x" * 256])


def test_the_notice_travels_with_the_files() -> None:
    notice = (SHIPPED / "NOTICE").read_text()
    assert "MIT License" in notice
    assert all(digest in notice for digest in pack.PUBLISHED_SHA256.values())
