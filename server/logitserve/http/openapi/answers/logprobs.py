"""Log-probabilities in the shapes of chat, of completions, and of vLLM's prompt_logprobs."""

from __future__ import annotations

from typing_extensions import TypedDict

from logitserve.http.openapi.answers.base import answer


@answer
class TopLogprob(TypedDict):
    """A likely token."""

    token: str
    logprob: float
    """Natural logarithm, from the raw logits; -9999 stands for minus infinity."""
    bytes: list[int]


@answer
class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


@answer
class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None


@answer
class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completions choice: four lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@answer
class PromptLogprob(TypedDict):
    """A token that may stand at a position of the prompt."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt likely tokens by id, itself included; null for the first."""
