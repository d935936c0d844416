"""Incremental detokenisation, compared with the tokenizers library's decoding of the whole sequence."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.model.checkpoint.resolve import Checkpoint
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.token_table import TokenTable, UnsupportedDecoderError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SLOW_START = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁Hello", "▁", "▁▁", "world", "é", "▁日本", "!", "<0x", "a▁b"]


def table_of(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(json.loads(tokenizer.to_str()))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def incremental(
    table: TokenTable, ids: list[int], *, skip_special_tokens: bool = True, at_start: bool = True
) -> list[str]:
    detokenizer = Detokenizer(table, skip_special_tokens=skip_special_tokens, at_start=at_start)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.fixture(scope="module")
def byte_level(smollm2: Checkpoint) -> tuple[Tokenizer, TokenTable]:
    path = smollm2.tokenizer_path / "tokenizer.json"
    return Tokenizer.from_file(str(path)), TokenTable(json.loads(path.read_text()))


def sentencepiece(*, strip: bool) -> Tokenizer:
    """Return a tokenizer with the decoder of Llama 2 (``strip``) or of Gemma."""
    vocabulary = {token: token_id for token_id, token in enumerate(["<unk>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@SLOW_START
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_pieces_of_random_tokens_join_to_the_whole_text(
    byte_level: tuple[Tokenizer, TokenTable], ids: list[int], *, skip: bool
) -> None:
    tokenizer, table = byte_level
    pieces = incremental(table, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@SLOW_START
@given(data=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_of_random_bytes_join_to_the_whole_text(
    byte_level: tuple[Tokenizer, TokenTable], data: list[int]
) -> None:
    """Single-byte tokens in any order give broken, overlong and unfinished characters."""
    tokenizer, table = byte_level
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = [token_id for byte in data if (token_id := tokenizer.token_to_id(alphabet[byte])) is not None]
    assert "".join(incremental(table, ids)) == tokenizer.decode(ids)


@SLOW_START
@given(text=st.text(max_size=60))
def test_a_text_survives_and_no_piece_splits_a_character(
    byte_level: tuple[Tokenizer, TokenTable], text: str
) -> None:
    """The reference is the decoded text, since the tokenizer lacks tokens for a few control characters."""
    tokenizer, table = byte_level
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    pieces = incremental(table, ids, skip_special_tokens=False)
    assert "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in whole


@pytest.mark.parametrize("strip", [True, False])
@given(data=st.data())
def test_sentencepiece_pieces_join_to_the_whole_text(data: st.DataObject, *, strip: bool) -> None:
    """The ids are words and whole characters in byte tokens.

    Broken runs of bytes are left out: our decoding replaces each piece, the library's the whole run.
    """
    tokenizer = sentencepiece(strip=strip)
    words = st.sampled_from([[id_of(tokenizer, word)] for word in [*WORDS, "<s>"]])
    characters = st.sampled_from("é日😀 a").map(lambda char: [1 + byte for byte in char.encode()])
    ids = [token_id for group in data.draw(st.lists(words | characters, max_size=12)) for token_id in group]
    assert "".join(incremental(table_of(tokenizer), ids)) == tokenizer.decode(ids)


def test_a_continuation_keeps_the_space_that_a_text_start_drops() -> None:
    tokenizer = sentencepiece(strip=True)
    ids = [id_of(tokenizer, "▁Hello")]
    assert incremental(table_of(tokenizer), ids, at_start=True)[0] == "Hello"
    assert incremental(table_of(tokenizer), ids, at_start=False)[0] == " Hello"


def test_an_unfinished_character_is_held_back_and_flushed_as_a_replacement() -> None:
    tokenizer = sentencepiece(strip=False)
    first_byte = 1 + 0xE6
    assert incremental(table_of(tokenizer), [first_byte]) == ["", "\ufffd"]


def test_an_id_that_only_pads_the_vocabulary_has_no_text(byte_level: tuple[Tokenizer, TokenTable]) -> None:
    assert byte_level[1][60_000] == b""


def test_a_decoder_without_bytes_per_token_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedDecoderError, match="WordPiece"):
        table_of(tokenizer)
