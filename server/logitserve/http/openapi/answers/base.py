"""Common parts of all answers: a decorator for closed objects, usage, and the error object."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

answer = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
"""Decorator of a TypedDict that names all members of an answer. The string under a member describes it."""


@answer
class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Tokens whose keys and values were found in the prefix cache."""


@answer
class Usage(TypedDict):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@answer
class CompletionTokensDetails(TypedDict):
    """What the tokens written were for."""

    reasoning_tokens: int
    """Tokens of the thinking, its closing one included."""


@answer
class ChatUsage(Usage):
    """Tokens read and written, those of the thinking apart where the model thinks."""

    completion_tokens_details: NotRequired[CompletionTokensDetails]


@answer
class ReadUsage(TypedDict):
    """Tokens read, where none is written."""

    prompt_tokens: int
    total_tokens: int


@answer
class ErrorObject(TypedDict):
    """OpenAI's error object."""

    message: str
    """What is wrong, by which limit, and which flag of the server moves it."""
    type: str
    """Kind of the error, such as invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """Path of the field at fault, such as messages[0].content."""
    code: str | None
    """Name of the error for programs, such as context_length_exceeded."""


@answer
class ErrorAnswer(TypedDict):
    """The body of every refusal, and the last event of a stream that failed."""

    error: ErrorObject


Finish = Literal["stop", "length"]
"""Why a choice ended: a stop token or string, or its limit of tokens."""

ChatFinish = Literal["stop", "length", "tool_calls"]
"""The same of a chat's choice, which may end to have its calls answered."""

Fingerprint = Annotated[
    str,
    Field(
        description="Digest of all that decides the bits of a row. Equal ones promise equal rows, where `batch_invariant`."
    ),
]
