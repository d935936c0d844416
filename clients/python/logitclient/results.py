"""Results of the calls. ``raw`` is an answer's own JSON, without the arrays that are decoded beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from logitclient.rows import Rows

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Stage = Literal["raw", "processed"]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """Rows of hidden states [rows, hidden], of the last layer after the final norm."""

    generated: Rows | None = None
    prompt: Rows | None = None

    def to_torch(self) -> dict[str, torch.Tensor]:
        """Return copies of the values that there are, under "generated" and "prompt"."""
        return _to_torch(self.generated, self.prompt)


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """Rows of logits: [rows, vocabulary], or [rows, k] with the ids of the columns in ``Rows.token_ids``.

    Token i was drawn from row i of ``generated``. Row j of ``prompt`` predicts the token at ``offset + j + 1``.
    ``batch_invariant`` is False where the server warns that rows depend on the other requests in the batch.
    """

    stage: Stage
    generated: Rows | None = None
    prompt: Rows | None = None
    batch_invariant: bool = True

    def to_torch(self) -> dict[str, torch.Tensor]:
        """Return copies of the values that there are, under "generated" and "prompt"."""
        return _to_torch(self.generated, self.prompt)


def _to_torch(generated: Rows | None, prompt: Rows | None) -> dict[str, torch.Tensor]:
    blocks = {"generated": generated, "prompt": prompt}
    return {name: rows.to_torch() for name, rows in blocks.items() if rows is not None}


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens. ``cached_tokens`` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, its rank in the vocabulary from 1, and its text. -9999 stands for -inf."""

    logprob: float
    rank: int
    text: str


PromptLogprobs = tuple[dict[int, TokenLogprob] | None, ...]
"""Log-probabilities by token id, for each prompt token: its own, and those of the likeliest tokens in its place.

The first token has None: no row predicts it.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One continuation.

    ``token_ids`` int32 [tokens] is None unless logits, hidden states or token ids were requested.
    ``prompt_logprobs`` is None unless requested, and in all but a prompt's first choice.
    """

    index: int
    text: str
    finish_reason: str | None
    token_ids: NDArray[np.int32] | None = None
    logits: Logits | None = None
    hidden_states: HiddenStates | None = None
    prompt_logprobs: PromptLogprobs | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk(Choice):
    """A part of one choice: the text, tokens and rows of one step, or of a part of it where the rows are long.

    A prompt's rows and logprobs come before its first token, over several chunks where the prompt is long.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """An answer. ``choices`` has every choice, prompt by prompt. ``text`` and the like are the first choice's."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    raw: dict[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def token_ids(self) -> NDArray[np.int32] | None:
        return self.choices[0].token_ids

    @property
    def logits(self) -> Logits | None:
        return self.choices[0].logits

    @property
    def hidden_states(self) -> HiddenStates | None:
        return self.choices[0].hidden_states

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        return self.choices[0].prompt_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Results(Sequence[T], Generic[T]):
    """A sequence of one result for each input (or model), and the members that the answer has beside them."""

    data: tuple[T, ...]
    model: str | None
    usage: Usage | None
    raw: dict[str, Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[T]:
        return iter(self.data)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self.data[index]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLogits:
    """Rows of one input. ``prompt_token_ids`` and ``token_ids`` (the generated ones) are int32 [tokens]."""

    index: int
    prompt_token_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logits: Logits
    hidden_states: HiddenStates | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True, eq=False)
class LogitsBatch:
    """Rows that one engine step computed for one input. Every array is [rows] or [rows, columns].

    Batches of several inputs interleave, and the rows of each input come in order.

    ``sequence`` int32 is the input's index. ``position`` int32 is the place of the token that the row predicts.
    ``token_id`` int32 is that token, and ``logprob`` float32 its log-probability. They are -1 and NaN where that token
    does not exist (yet).
    """

    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32]
    logprob: NDArray[np.float32]
    logits: Rows
    hidden_states: Rows | None = None
    stage: Stage = "raw"
    batch_invariant: bool = True

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Likelihood of one input, in natural logarithms.

    ``nll`` is the sum over ``num_tokens`` tokens, all but the first. ``perplexity`` is None where there are none.
    """

    index: int
    nll: float
    num_tokens: int
    perplexity: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Reward:
    """Values of a head. ``reward`` is the last token's: float64 [] or [outputs].

    ``values`` has every token's: float64 [tokens] or [tokens, outputs].
    """

    index: int
    head: str
    reward: NDArray[np.float64]
    values: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """Vector of one input: float32 [dimensions]."""

    index: int
    vector: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Pooling:
    """Values at the last token of one input: float32 [outputs] of a head, or [hidden] where there is no head."""

    index: int
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens of a prompt: ``token_ids`` int32 [tokens], and ``token_strs``, their texts, where requested."""

    token_ids: NDArray[np.int32]
    token_strs: tuple[str, ...] | None
    max_model_len: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Model:
    """A served model by one of its names. ``raw`` has the members that have no field here."""

    id: str
    vocab_size: int | None
    max_model_len: int | None
    batch_invariant: bool | None
    raw: dict[str, Any] = field(repr=False)
