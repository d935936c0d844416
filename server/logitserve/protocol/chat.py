"""``POST /v1/chat/completions``: messages, and what chat adds to the shared fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from logitengine.images.messages import Detail
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.protocol.base import (
    IGNORED_FIELDS,
    MOST_MEMBERS,
    NEUTRAL_VALUES,
    RequestBody,
    StrictModel,
    member_error,
    without_nulls,
)
from logitserve.protocol.content import CACHE_HINT, ImagePart, Part, TextPart, as_parts
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.limits import at_most, at_most_items, at_most_members_of, config_of, too_large
from logitserve.protocol.tools import PastCalls, ToolFields

NOT_OF_CHATS = frozenset({"suffix"})
SERVED_IN_CHATS = frozenset({"tools", "tool_choice", "reasoning_effort"})

OUTPUT_FIELDS = {
    "reasoning_content": "an assistant's past reasoning, which clients send back",
    "reasoning": "the same by OpenRouter's name",
    "annotations": "sources that OpenAI's assistant named",
    "refusal": "OpenAI's text of a refusal, beside the content",
    "provider_specific_fields": "what LiteLLM keeps of other providers' answers",
}
"""Members of an assistant's past answers that clients send back, each with its reason to change nothing."""

IGNORED_IN_MESSAGES = {**OUTPUT_FIELDS, **CACHE_HINT}

NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "type": ("text",),
    "function_call": (),
    "audio": (),
}


_Parts = Annotated[list[Part], Field(fail_fast=True), at_most_items("max_messages", "parts")]


class Message(StrictModel):
    """One message. Text parts are joined by newlines before the chat template sees them, but for those of a user where
    the model reads images.

    Clients send answers back with every member that OpenAI defines, null where empty.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_IN_MESSAGES)
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_IN_MESSAGES)
    reasons: ClassVar[dict[str, str]] = IGNORED_IN_MESSAGES
    neutral_values: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_IN_MESSAGES
    takes_any_null: ClassVar[bool] = True

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """A developer is the system where the model's chat template knows no developer."""
    content: Annotated[_Parts | None, BeforeValidator(as_parts, json_schema_input_type=str | _Parts)] = None
    """Only an assistant may have said nothing."""
    name: str | None = None
    tool_calls: PastCalls = Field([])
    """Calls that an assistant made. What they gave follows in messages of the role `tool`."""
    tool_call_id: str | None = None

    @classmethod
    def _ignored_in(cls, members: dict[str, Any]) -> frozenset[str]:
        """Return the members of answers where an assistant speaks."""
        return cls.ignored if members.get("role") == "assistant" else cls.ignored - OUTPUT_FIELDS.keys()

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise member_error("missing_required_parameter", "is missing", "content")
        if self.tool_calls and self.role != "assistant":
            raise member_error("invalid_value", "is for assistants alone", "tool_calls")
        for i, part in enumerate(self.content or []):
            if isinstance(part, ImagePart) and self.role != "user":
                raise member_error(
                    "invalid_value", "is an image, which only a user may send", f"content[{i}]"
                )
        return self

    @property
    def num_images(self) -> int:
        return sum(isinstance(part, ImagePart) for part in self.content or [])

    def for_template(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": self.role, "content": self._content_for_template()}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return fields

    def _content_for_template(self) -> str | list[dict[str, str]]:
        """Return a text, or the parts of a user's content where it has several or an image."""
        content = self.content or []
        texts = [part.text for part in content if isinstance(part, TextPart)]
        if self.role != "user" or len(content) == len(texts) < 2:
            return "\n".join(texts)
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in content
        ]


def _bound_images(messages: list[Message], info: ValidationInfo) -> list[Message]:
    num_images, limit = sum(message.num_images for message in messages), config_of(info).max_images
    if num_images > limit:
        raise too_large(str(info.field_name), num_images, limit, "images", "max_images")
    return messages


Messages = Annotated[
    list[Message],
    Field(fail_fast=True),
    at_most_items("max_messages", "messages"),
    AfterValidator(_bound_images),
]


class TemplateFields(RequestBody):
    """How a conversation becomes a prompt, by the model's chat template."""

    add_generation_prompt: bool = True
    """Opens the assistant's turn."""
    continue_final_message: bool = False
    """Goes on with the last message's text: its turn stays open, and no other is opened."""
    chat_template_kwargs: Annotated[
        dict[str, Any],
        BeforeValidator(without_nulls, json_schema_input_type=dict[str, Any]),
        at_most_members_of(MOST_MEMBERS, "members"),
    ] = Field({})
    """Variables that the model's chat template reads, such as `enable_thinking`."""

    @property
    def opens_turn(self) -> bool:
        """Return whether the assistant's turn is opened."""
        return self.add_generation_prompt and not self.continue_final_message

    def check_template(self) -> None:
        """Raise BadRequestError for fields that contradict each other."""
        is_asked = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and is_asked:
            raise BadRequestError(
                "'continue_final_message' leaves the last turn open and 'add_generation_prompt' opens another: "
                "set one of them to false.",
                param="continue_final_message",
            )


@dataclass(frozen=True, slots=True)
class SentImage:
    """An image of a request, and the field that it came in."""

    url: str
    detail: Detail
    param: str


def images_of(messages: Sequence[Message]) -> list[SentImage]:
    """Return the images of a conversation in their order."""
    return [
        SentImage(part.image_url.url, part.image_url.detail, f"messages[{i}].content[{j}].image_url")
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content or [])
        if isinstance(part, ImagePart)
    ]


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as chat templates read them: those of tools have the name of the function that was called."""
    turns = [message.for_template() for message in messages]
    names: dict[str, str] = {}
    for message, turn in zip(messages, turns, strict=True):
        names.update({call.id: call.function.name for call in message.tool_calls})
        if message.role == "tool" and message.name is None and message.tool_call_id in names:
            turn["name"] = names[message.tool_call_id]
    return turns


class ChatBody(ToolFields, TemplateFields, GenerationBody):
    """The body of a chat request."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS) - {"parallel_tool_calls"}
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL_VALUES) - NOT_OF_CHATS - SERVED_IN_CHATS

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=LARGEST_ID)
    logprobs: bool = False
    top_logprobs: Annotated[int | None, at_most("max_logprobs")] = Field(None, ge=0)
    parallel_tool_calls: bool = True
    """Whether a grammar of calls, as under `tool_choice` required, allows more than one."""

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        GenerationBody.check(self)
        self.check_template()
        self.check_tools()
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise BadRequestError(
                "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ.",
                param="max_tokens",
            )
