"""Options of the calls, beside the input. Their names and meanings are the HTTP API's."""

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
    """A choice of logits to return: the whole vocabulary, the ``top_k``, or the columns of ``token_ids``."""

    positions: Positions = "generated"
    stage: Literal["raw", "processed"] = "raw"
    top_k: int | None = None
    token_ids: TokenIds | None = None
    dtype: Dtype = "float32"


@dataclass(frozen=True, slots=True)
class HiddenStatesSpec:
    """A choice of hidden states to return."""

    positions: Positions = "generated"
    dtype: Dtype = "float32"


class SamplingOptions(TypedDict, total=False):
    """Options of drawing tokens, and of when to stop. An option that is left out has the server's default."""

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
    response_format: Mapping[str, object]
    structured_outputs: Mapping[str, object]


class GenerationOptions(SamplingOptions, total=False):
    """Options that chat and completions share. True for ``return_logits`` or ``return_hidden_states`` is their spec's default."""

    n: int
    top_k: int
    skip_special_tokens: bool
    prompt_logprobs: int
    return_token_ids: bool
    return_logits: bool | LogitsSpec
    return_hidden_states: bool | HiddenStatesSpec


class TemplateOptions(TypedDict, total=False):
    """Options of how messages become a prompt. ``chat_template_kwargs`` are variables that the model's template reads."""

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, object]


class ToolOptions(TypedDict, total=False):
    """Functions that the model may call, as OpenAI writes them, and how long it thinks. Both become part of the prompt."""

    tools: Sequence[Mapping[str, object]]
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, object]
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatOptions(GenerationOptions, TemplateOptions, ToolOptions, total=False):
    """Options of chat."""

    parallel_tool_calls: bool
    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int


class CompletionOptions(GenerationOptions, total=False):
    """Options of completions."""

    echo: bool
    logprobs: int
    add_special_tokens: bool
    truncate_prompt_tokens: int
    best_of: int


class LogitsOptions(SamplingOptions, TemplateOptions, total=False):
    """Members of LogitsSpec, and of sampling beside them. ``top_k`` counts columns. ``positions`` is "prompt" by default."""

    positions: Positions
    stage: Literal["raw", "processed"]
    top_k: int
    token_ids: TokenIds
    dtype: Dtype
    hidden_states: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int


class InputOptions(TypedDict, total=False):
    """Options of every call that reads an input. ``add_special_tokens`` concerns text, and is true by default.

    ``truncate_prompt_tokens`` keeps the last tokens of each input; -1 keeps as many as the context holds.
    """

    model: str
    add_special_tokens: bool
    truncate_prompt_tokens: int
    cache_salt: str


class PoolingOptions(InputOptions, TemplateOptions, total=False):
    """Options of pooling. ``head`` may be left out where the server has one head, or none."""

    head: str


class RewardOptions(PoolingOptions, total=False):
    """Options of rewards. ``return_values`` adds the value of every position."""

    return_values: bool


class EmbeddingOptions(InputOptions, total=False):
    """Options of embeddings. ``dimensions`` cuts the pooled vector before it is normalised."""

    dimensions: int
    pooling: Literal["mean", "last", "cls"]
    normalize: bool


class TokenizeOptions(TemplateOptions, ToolOptions, total=False):
    """Options of tokenize. ``add_special_tokens`` is true by default for a prompt, and false for messages."""

    model: str
    add_special_tokens: bool
    return_token_strs: bool


class DetokenizeOptions(TypedDict, total=False):
    """Options of detokenize."""

    model: str
