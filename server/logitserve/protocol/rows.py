"""Rows of numbers to return beside the text, and their encoding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.protocol.base import StrictModel
from logitserve.protocol.limits import at_most_of

MOST_TOKEN_IDS = 1 << 20
"""Ids in one list: more than any vocabulary or context has. The model's own bounds are checked later."""

TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), at_most_of(MOST_TOKEN_IDS, "ids")]
Encoding = Literal["base64", "list"]


def _all_or_nothing(value: Any) -> Any:
    if value is True:
        return {}
    return None if value is False else value


def all_or(members: type[StrictModel]) -> BeforeValidator:
    """Return a validator: ``true`` is all defaults, ``false`` is nothing, an object chooses."""
    return BeforeValidator(_all_or_nothing, json_schema_input_type=bool | members | None)


class RowFields(StrictModel):
    """Members that logits and hidden states have in common."""

    positions: Literal["generated", "prompt", "all"] = "generated"
    """Whose rows: those that generated tokens were drawn from, those of the prompt, or both."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    encoding: Encoding | None = None
    """base64 by default; list where columns are chosen."""


class ReturnHiddenStates(RowFields):
    """Which hidden states to return: the last layer's, after the final norm."""


class ReturnLogits(RowFields):
    """Which logits to return. ``top_k`` and ``token_ids`` exclude each other."""

    stage: Literal["raw", "processed"] = "raw"
    """What the model's head returned, or what the sampler drew from."""
    top_k: int | None = Field(None, ge=1)
    """Columns of each row: the largest."""
    token_ids: TokenIds | None = Field(None, min_length=1)
    """Columns of each row: these, in this order."""

    @property
    def default_encoding(self) -> Encoding:
        """Return base64 for the whole vocabulary and list for chosen columns."""
        return "base64" if self.top_k is None and self.token_ids is None else "list"

    def check_columns(self, prefix: str) -> None:
        """Raise BadRequestError for members that contradict each other; ``prefix`` is where they stand in the body."""
        if self.top_k is not None and self.token_ids is not None:
            raise BadRequestError(
                f"'{prefix}top_k' and '{prefix}token_ids' exclude each other.", param=f"{prefix}top_k"
            )
        if self.stage == "processed" and self.positions != "generated":
            raise BadRequestError(
                f"'{prefix}stage' \"processed\" exists for generated rows only: the prompt was not sampled.",
                param=f"{prefix}stage",
            )
