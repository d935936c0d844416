"""``POST /v1/completions``: raw prompts, as text or token ids, one or many."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, NEUTRAL_VALUES
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.inputs import Prompts

MOST_COMPLETION_LOGPROBS = 5
"""OpenAI's bound."""


class CompletionBody(GenerationBody):
    """The body of a completions request."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_VALUES)

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_COMPLETION_LOGPROBS)
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise BadRequestError(
                "'echo' of a scored prompt can be streamed for one choice only: set 'n' to 1, or leave out 'logprobs' "
                "or 'stream'.",
                param="echo",
            )
