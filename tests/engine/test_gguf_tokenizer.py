"""Tokenizers that are made of a GGUF file's vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_gguf
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint import resolve_checkpoint
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def tokens_of(tmp_path: Path, pre: str, text: str) -> list[str]:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    path = write_gguf(tmp_path / "model.gguf", LlamaForCausalLM(config), "llama", {}, pre=pre)
    checkpoint = resolve_checkpoint(str(path), cache=tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path / "tokenizer.json"))
    tokens: list[str] = tokenizer.encode(text).tokens
    return tokens


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "glm4", "qwen2"])
def test_text_is_split_and_merged(tmp_path: Path, pre: str) -> None:
    assert tokens_of(tmp_path, pre, "he 12") == ["he", "\u0120", "1", "2"]


def test_llama_3s_prompts_begin_with_bos_where_the_file_does_not_say(tmp_path: Path) -> None:
    begin, *tokens = tokens_of(tmp_path, "llama-bpe", "he")
    assert (begin, tokens) == ('"', ["he"]), "the second token is BOS in these files"


def test_a_pre_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"how tokenizer\.ggml\.pre weird splits text is not known"):
        tokens_of(tmp_path, "weird", "he")
