"""Rows of logits and hidden states, as base64 or as lists."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from logitserve.http.openapi.answers.base import answer

Shape = Annotated[list[int], Field(min_length=2, max_length=2, description="Rows, and columns of each.")]
Encoding = Annotated[
    Literal["base64", "list"],
    Field(
        description="base64 is little-endian and row-major; a list has null for -inf and NaN, which JSON lacks."
    ),
]
Offset = Annotated[
    int,
    Field(description="Position in the prompt of the first row's token. Row j scores the token at j + 1."),
]
Numbers = str | list[list[float | None]]
Ids = str | list[list[int]]


@answer
class _Rows(TypedDict):
    shape: Shape
    dtype: Literal["float32", "float16", "bfloat16"]
    encoding: Encoding


@answer
class WholeRows(_Rows):
    """Rows over every column: the vocabulary, or the hidden size."""

    data: Numbers


@answer
class ChosenRows(_Rows):
    """Rows over the columns that top_k or token_ids chose."""

    token_ids: Ids
    """Token id of each column, [rows, columns]; int32 as base64."""
    values: Numbers


@answer
class WholePromptRows(WholeRows):
    """Rows over every column, for tokens of the prompt."""

    offset: Offset


@answer
class ChosenPromptRows(ChosenRows):
    """Rows over chosen columns, for tokens of the prompt."""

    offset: Offset


@answer
class Logits(TypedDict):
    """Logits of one choice, or of one chunk of it."""

    stage: Literal["raw", "processed"]
    """What the model's head returned, or what the sampler drew from."""
    batch_invariant: NotRequired[Literal[False]]
    """Present where the bits of a row may depend on the requests beside it."""
    generated: NotRequired[WholeRows | ChosenRows]
    """Row i is the distribution that token_ids[i] was drawn from."""
    prompt: NotRequired[WholePromptRows | ChosenPromptRows]


@answer
class HiddenStates(TypedDict):
    """The last layer's output after the final norm, for one choice or one chunk of it."""

    generated: NotRequired[WholeRows]
    prompt: NotRequired[WholePromptRows]
