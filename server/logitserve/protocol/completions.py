"""``POST /v1/completions``: raw prompts, as text or token ids, one or many."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, NEUTRAL_VALUES
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.inputs import Prompts
from logitserve.protocol.limits import at_most


class CompletionBody(GenerationBody):
    """The body of a completions request."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_VALUES)

    prompt: Prompts
    """A text or its token ids, or a list of texts or of lists of ids, with n choices for each."""
    echo: bool = False
    """Begins every choice with its prompt."""
    logprobs: Annotated[int | None, at_most("max_completion_logprobs")] = Field(None, ge=0)
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise BadRequestError(
                "'echo' of a scored prompt can be streamed for one choice only: set 'n' to 1, or leave out 'logprobs' "
                "or 'stream'.",
                param="echo",
            )
