"""What can be asked for beside the input. The names and meanings are those of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

Positions = Literal["generated", "prompt", "all"]
Dtype = Literal["float32", "float16", "bfloat16"]

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer]
Input: TypeAlias = str | TokenIds | Sequence[str] | Sequence[TokenIds]
Messages: TypeAlias = Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class LogitsSpec:
    """Which logits to return: the whole vocabulary, the ``top_k``, or the columns of ``token_ids``."""

    positions: Positions = "generated"
    stage: Literal["raw", "processed"] = "raw"
    top_k: int | None = None
    token_ids: TokenIds | None = None
    dtype: Dtype = "float32"


@dataclass(frozen=True, slots=True)
class HiddenStatesSpec:
    """Which hidden states to return."""

    positions: Positions = "generated"
    dtype: Dtype = "float32"


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn and when to stop. What is left out is the server's default."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    seed: int
    logit_bias: Mapping[str, float] | Mapping[int, float]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int
    stop_token_ids: TokenIds
    ignore_eos: bool
    cache_salt: str


class GenerationOptions(SamplingOptions, total=False):
    """What chat and completions share. ``return_logits`` and ``return_hidden_states``: True is their spec's defaults."""

    n: int
    top_k: int
    skip_special_tokens: bool
    prompt_logprobs: int
    return_token_ids: bool
    return_logits: bool | LogitsSpec
    return_hidden_states: bool | HiddenStatesSpec


class ChatOptions(GenerationOptions, total=False):
    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int
    add_generation_prompt: bool


class CompletionOptions(GenerationOptions, total=False):
    echo: bool
    logprobs: int
    add_special_tokens: bool


class LogitsOptions(SamplingOptions, total=False):
    """The members of LogitsSpec flat; here ``top_k`` counts columns. ``positions`` is "prompt" by default."""

    positions: Positions
    stage: Literal["raw", "processed"]
    top_k: int
    token_ids: TokenIds
    dtype: Dtype
    hidden_states: bool
    add_special_tokens: bool
    add_generation_prompt: bool


class InputOptions(TypedDict, total=False):
    """``add_special_tokens``: to text, as the tokenizer does by itself."""

    model: str
    add_special_tokens: bool
    cache_salt: str


class PoolingOptions(InputOptions, total=False):
    """``head`` may be left out where the server has one, or none."""

    head: str
    add_generation_prompt: bool


class RewardOptions(PoolingOptions, total=False):
    """``return_values`` gives every position's value."""

    return_values: bool


class EmbeddingOptions(InputOptions, total=False):
    """``dimensions`` cuts the pooled vector before it is normalised."""

    dimensions: int
    pooling: Literal["mean", "last", "cls"]
    normalize: bool


class TokenizeOptions(TypedDict, total=False):
    """``add_special_tokens`` is true by default for a prompt, and false for messages, whose template has them."""

    model: str
    add_special_tokens: bool
    add_generation_prompt: bool
    return_token_strs: bool


class DetokenizeOptions(TypedDict, total=False):
    model: str
