"""``POST /v1/completions``: raw prompts, as text or token ids, one or many."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, NEUTRAL_VALUES
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.inputs import Prompts, TruncatePromptTokens
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
    truncate_prompt_tokens: TruncatePromptTokens = None
    """Keeps the last tokens of each prompt; -1: as many as the context holds beside `max_tokens`."""
    best_of: Annotated[int | None, at_most("max_n")] = Field(None, ge=1)
    """Choices to generate for each prompt, of which the n with the largest mean log-probability are returned."""

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of < self.n:
            raise BadRequestError(
                f"'best_of' is {self.best_of}, less than 'n', which is {self.n}.", param="best_of"
            )
        if self.stream and (self.best_of or 1) > self.n:
            raise BadRequestError(
                "'best_of' over 'n' cannot be streamed: which choices are best is known at the end.",
                param="best_of",
            )
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise BadRequestError(
                "'echo' of a scored prompt can be streamed for one choice only: set 'n' to 1, or leave out 'logprobs' "
                "or 'stream'.",
                param="echo",
            )
