"""Answers about inputs that are read and not continued: an object for each, in the inputs' order."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from logitserve.http.openapi.answers.base import Fingerprint, Finish, ReadUsage, Usage, answer
from logitserve.http.openapi.answers.rows import HiddenStates, Logits


@answer
class InputLogits(TypedDict):
    """The rows of one input."""

    object: Literal["logits"]
    index: int
    token_ids: list[int]
    """Tokens that were generated."""
    prompt_token_ids: list[int]
    logits: NotRequired[Logits]
    hidden_states: NotRequired[HiddenStates]
    finish_reason: Finish


@answer
class LogitsList(TypedDict):
    """The rows of all inputs."""

    object: Literal["list"]
    model: str
    system_fingerprint: Fingerprint
    data: list[InputLogits]
    usage: Usage


@answer
class _List(TypedDict):
    object: Literal["list"]
    model: str
    usage: ReadUsage


@answer
class Perplexity(TypedDict):
    """How likely one input is."""

    object: Literal["perplexity"]
    index: int
    nll: float | None
    """Sum of the scored tokens' negative log-likelihoods, in natural logarithms."""
    num_tokens: int
    """Tokens that are scored: all but the first."""
    perplexity: float | None
    """exp(nll / num_tokens); null where nothing is scored or no float64 holds it."""


@answer
class PerplexityList(_List):
    """How likely the inputs are."""

    data: list[Perplexity]


@answer
class Reward(TypedDict):
    """A head's judgement of one input. A head with several outputs gives lists in place of numbers."""

    object: Literal["reward"]
    index: int
    reward: float | list[float | None] | None
    """The value at the input's last token."""
    values: NotRequired[list[float | None] | list[list[float | None]]]
    """The value at every token, for return_values."""


@answer
class RewardList(_List):
    """A head's judgement of the inputs."""

    head: str
    data: list[Reward]


Vector = str | list[float | None]
"""Numbers, or the base64 of little-endian float32."""


@answer
class Embedding(TypedDict):
    """A vector for one input."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


@answer
class EmbeddingList(_List):
    """A vector for each input."""

    data: list[Embedding]


@answer
class Pooled(TypedDict):
    """A head's last values for one input, or the last token's hidden states."""

    object: Literal["pooling"]
    index: int
    data: Vector


@answer
class PooledList(_List):
    """Pooled values of the inputs."""

    id: str
    created: int
    data: list[Pooled]
