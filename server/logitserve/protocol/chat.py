"""``POST /v1/chat/completions``: messages, and what chat adds to the shared fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, NEUTRAL_VALUES, StrictModel
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.limits import at_most, at_most_items

COMPLETIONS_ONLY = frozenset({"suffix", "best_of"})


class TextPart(StrictModel):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Parts = Annotated[list[TextPart], Field(fail_fast=True), at_most_items("max_messages", "parts")]


class Message(StrictModel):
    """One message. Text parts are joined by newlines before the chat template sees them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, message: Any) -> Any:
        """Drop null fields.

        Clients send answers back with every field that OpenAI defines, null where empty.
        """
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None}

    def for_template(self) -> dict[str, str]:
        fields = {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields


Messages = Annotated[list[Message], Field(fail_fast=True), at_most_items("max_messages", "messages")]


class ChatBody(GenerationBody):
    """The body of a chat request."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_VALUES) - COMPLETIONS_ONLY

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=LARGEST_ID)
    logprobs: bool = False
    top_logprobs: Annotated[int | None, at_most("max_logprobs")] = Field(None, ge=0)
    add_generation_prompt: bool = True

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise BadRequestError(
                "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ.",
                param="max_tokens",
            )
