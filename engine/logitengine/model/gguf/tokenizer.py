"""Conversion of a GGUF file's vocabulary to the files of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from logitengine.model.gguf.header import Header, StringArray
from logitengine.model.gguf.splits import SPLITS

BYTE_LEVEL = "gpt2"

PLAIN_SPLITS = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion", "phi-2", "granite-docling"})
"""Pre-tokenizers that split text as GPT-2's does, by ``tokenizer.ggml.pre``."""

DIGIT_SPLITS = frozenset({"smollm", "refact", "command-r", "starcoder", "codeshell", "minerva-7b", "exaone"})
"""Pre-tokenizers that split off each digit first."""

LLAMA3_SPLITS = frozenset({"glm4", "chatglm-bpe"})
"""Pre-tokenizers that split as Llama 3's does, and that transformers does not know by these names."""

BEGIN_ADDED = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})
"""Pre-tokenizers of vocabularies whose prompts begin with BOS where the file does not say."""


SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_tokenizer(header: Header, directory: Path) -> None:
    """Write tokenizer.json, its config and the chat template. Raises ValueError for a vocabulary of an unknown kind or size."""
    vocabulary, config = (
        {
            name: value
            for key, name in names.items()
            if (value := _metadata(header, f"tokenizer.{key}")) is not None
        }
        for names in (GGUF_TOKENIZER_MAPPING["tokenizer"], GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    )
    _check_lengths(header, len(vocabulary["tokens"]))
    kind, pre = vocabulary.get("tokenizer_type"), vocabulary.get("pre_tokenizer_type", "default")
    if kind == BYTE_LEVEL:
        if pre in LLAMA3_SPLITS:
            vocabulary["pre_tokenizer_type"] = "llama-bpe"
        elif pre not in PLAIN_SPLITS | DIGIT_SPLITS | SPLITS.keys() | GGUF_PRE_TOKENIZER_SPLITS.keys():
            raise ValueError(f"how tokenizer.ggml.pre {pre} splits text is not known")
    if kind == "llama" or (kind == BYTE_LEVEL and pre in BEGIN_ADDED):
        config.setdefault("add_bos_token", True)
    for name, key in SPECIAL_TOKENS.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and 0 <= token_id < len(vocabulary["tokens"]):
            config[name] = vocabulary["tokens"][token_id]
    backend, _ = convert_gguf_tokenizer(str(header.metadata["general.architecture"]), vocabulary)
    if kind == BYTE_LEVEL and pre in DIGIT_SPLITS:
        _split_digits(backend)
    if kind == BYTE_LEVEL and pre in SPLITS:
        _split_by(backend, SPLITS[pre])
    PreTrainedTokenizerFast(tokenizer_object=_Uncopied(backend), **config).save_pretrained(directory)


def _check_lengths(header: Header, num_tokens: int) -> None:
    for key in ("token_type", "scores"):
        numbers = header.metadata.get(f"tokenizer.ggml.{key}")
        if numbers is not None and (not isinstance(numbers, np.ndarray) or len(numbers) != num_tokens):
            raise ValueError(f"tokenizer.ggml.{key} has no number for each of {num_tokens} tokens")


class _Uncopied:
    """A backend that is its own deep copy. transformers makes one through JSON: seconds and 300 MB for 262,144 tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: dict[int, object]) -> Tokenizer:
        return self._backend


def _metadata(header: Header, key: str) -> Any:
    """Return the value, its arrays as lists; None if it is missing."""
    value = header.metadata.get(key)
    if isinstance(value, StringArray):
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


def _split_digits(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _split_by(backend: Tokenizer, expressions: tuple[str, ...]) -> None:
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
