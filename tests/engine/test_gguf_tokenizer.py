"""Tokenizers that are made of a GGUF file's vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_gguf
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.splits import SPLITS
from logitengine.model.gguf.tokenizer import write_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def gguf_file(tmp_path: Path, pre: str) -> Path:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return write_gguf(tmp_path / "model.gguf", LlamaForCausalLM(config), "llama", {}, pre=pre)


def tokenizer_of(tmp_path: Path, pre: str) -> Tokenizer:
    checkpoint = resolve_checkpoint(str(gguf_file(tmp_path, pre)), cache=tmp_path / "cache")
    return Tokenizer.from_file(str(checkpoint.tokenizer_path / "tokenizer.json"))


def tokens_of(tmp_path: Path, pre: str, text: str) -> list[str]:
    tokens: list[str] = tokenizer_of(tmp_path, pre).encode(text).tokens
    return tokens


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "glm4", "qwen2", "gpt-4o", *SPLITS])
def test_text_is_split_and_merged(tmp_path: Path, pre: str) -> None:
    assert tokens_of(tmp_path, pre, "he 12") == ["he", "\u0120", "1", "2"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("deepseek-llm", ["it", "'", "s", "Ġ", "1234", "ä½łå¥½", "ab", "Ġ(", "x", ");", "Ċ", "Ġ", "ĠÃ©"]),
        (
            "deepseek-coder",
            ["it", "'", "s", "Ġ", "1", "2", "3", "4", "ä½łå¥½", "ab", "Ġ(", "x", ");", "Ċ", "Ġ", "ĠÃ©"],
        ),
        ("deepseek-v3", ["it", "'s", "Ġ", "123", "4", "ä½łå¥½", "ab", "Ġ(", "x", ");Ċ", "Ġ", "ĠÃ©"]),
        ("kimi-k2", ["it's", "Ġ", "123", "4", "ä½łå¥½", "ab", "Ġ(", "x", ");Ċ", "Ġ", "ĠÃ©"]),
    ],
)
def test_text_is_split_as_the_model_s_own_tokenizer_does(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    splits = tokenizer_of(tmp_path, pre).pre_tokenizer
    assert splits is not None
    assert [part for part, _ in splits.pre_tokenize_str("it's 1234\u4f60\u597dab (x);\n  \u00e9")] == expected


def test_llama_3s_prompts_begin_with_bos_where_the_file_does_not_say(tmp_path: Path) -> None:
    begin, *tokens = tokens_of(tmp_path, "llama-bpe", "he")
    assert (begin, tokens) == ('"', ["he"]), "the second token is BOS in these files"


def test_a_pre_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"how tokenizer\.ggml\.pre weird splits text is not known"):
        tokens_of(tmp_path, "weird", "he")


@pytest.mark.parametrize("key", ["token_type", "scores"])
@pytest.mark.parametrize("numbers", [[1] * 299, [], [1] * 301])
def test_tokens_without_a_type_or_score_are_refused(tmp_path: Path, key: str, numbers: list[int]) -> None:
    header = read_header(gguf_file(tmp_path, "gpt-2"))
    header.metadata[f"tokenizer.ggml.{key}"] = np.array(numbers, np.int32)
    with pytest.raises(ValueError, match=rf"{key} has no number for each of 300 tokens"):
        write_tokenizer(header, tmp_path)


@pytest.mark.parametrize("value", [-1, 300, 2**40])
def test_a_special_token_that_there_is_not_is_left_out(tmp_path: Path, value: int) -> None:
    header = read_header(gguf_file(tmp_path, "gpt-2"))
    header.metadata["tokenizer.ggml.padding_token_id"] = value
    write_tokenizer(header, tmp_path)
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_bytes())
