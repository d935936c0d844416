"""``POST /v1/completions``: raw prompts, as text or token ids, one or many."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, NEUTRAL_VALUES
from logitserve.protocol.generation import LARGEST_ID, GenerationBody

Prompt = str | list[int]


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST_ID for item in value)


def _as_prompts(value: Any) -> list[Prompt]:
    """A string, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if isinstance(value[0], int) and is_token_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and is_token_ids(item) for item in value):
            return list(value)
    msg = "must be a string, a list of token ids, or a list of strings or of lists of token ids, not empty"
    raise ValueError(msg)


class CompletionBody(GenerationBody):
    """The body of a completions request."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_VALUES)

    prompt: Annotated[list[Prompt], PlainValidator(_as_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise BadRequestError(
                "'echo' of a scored prompt can be streamed for one choice only: set 'n' to 1, or leave out 'logprobs' "
                "or 'stream'.",
                param="echo",
            )
