"""Which rows of numbers to return beside the text, and how they are written."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.protocol.base import StrictModel

TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID)]
Encoding = Literal["base64", "list"]


def all_or_nothing(value: Any) -> Any:
    """``true`` asks for all defaults, ``false`` for nothing."""
    if value is True:
        return {}
    return None if value is False else value


class RowOptions(StrictModel):
    """What logits and hidden states have in common."""

    positions: Literal["generated", "prompt", "all"] = "generated"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    encoding: Encoding | None = None

    @property
    def wire_encoding(self) -> Encoding:
        return self.encoding or "base64"

    @property
    def wants_prompt(self) -> bool:
        return self.positions != "generated"

    @property
    def wants_generated(self) -> bool:
        return self.positions != "prompt"


class ReturnHiddenStates(RowOptions):
    """Which hidden states to return: the last layer's, after the final norm."""


class ReturnLogits(RowOptions):
    """Which logits to return. ``top_k`` and ``token_ids`` exclude each other."""

    path: ClassVar[str] = "return_logits"
    """Where in a request these options stand, for errors."""

    stage: Literal["raw", "processed"] = "raw"
    top_k: int | None = Field(None, ge=1)
    token_ids: list[TokenId] | None = Field(None, min_length=1)

    @property
    def wire_encoding(self) -> Encoding:
        """``encoding``, by default base64 for the whole vocabulary and list for chosen columns."""
        if self.encoding is not None:
            return self.encoding
        return "base64" if self.top_k is None and self.token_ids is None else "list"

    @classmethod
    def field(cls, name: str) -> str:
        return f"{cls.path}.{name}" if cls.path else name

    def check_logits(self) -> None:
        """Raises BadRequestError for members that contradict each other."""
        if self.top_k is not None and self.token_ids is not None:
            raise BadRequestError(
                f"'{self.field('top_k')}' and '{self.field('token_ids')}' exclude each other.",
                param=self.field("top_k"),
            )
        if self.stage == "processed" and self.wants_prompt:
            raise BadRequestError(
                f"'{self.field('stage')}' \"processed\" exists for generated rows only: the prompt was not sampled.",
                param=self.field("stage"),
            )
