"""Answers of chat and completions, whole and as the events of a stream."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from logitserve.http.openapi.answers.base import ChatFinish, ChatUsage, Fingerprint, Finish, Usage, answer
from logitserve.http.openapi.answers.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs
from logitserve.http.openapi.answers.rows import HiddenStates, Logits

StopReason = Annotated[
    str | int | None, Field(description="The stop string or token id that ended the choice.")
]
TokenIds = Annotated[
    list[int],
    Field(
        description="The choice's tokens, or the chunk's; present where they or their rows were asked for."
    ),
]
PromptTokenIds = Annotated[
    list[int],
    Field(
        description="Tokens of the prompt, for return_token_ids; a completion has them in each prompt's first choice."
    ),
]


@answer
class _Tokens(TypedDict):
    token_ids: NotRequired[TokenIds]
    logits: NotRequired[Logits]
    hidden_states: NotRequired[HiddenStates]


Thinking = Annotated[str, Field(description="The model's thinking; `reasoning_content` is the same text.")]


@answer
class CalledFunction(TypedDict):
    """The function that the model calls."""

    name: str
    arguments: str
    """A JSON object."""


@answer
class AnswerCall(TypedDict):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


@answer
class AnswerMessage(TypedDict):
    """What the assistant says. There is no content where there are calls in its place."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[Thinking]
    reasoning_content: NotRequired[Thinking]
    tool_calls: NotRequired[list[AnswerCall]]


@answer
class ChatChoice(_Tokens):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: StopReason


@answer
class ChatCompletion(TypedDict):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[ChatChoice]
    usage: ChatUsage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[PromptTokenIds]


@answer
class CalledFunctionPiece(TypedDict):
    """The name of a function, with empty arguments, or a piece of its arguments."""

    name: NotRequired[str]
    arguments: str


@answer
class CallPiece(TypedDict):
    """What a call is, once, and then its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionPiece


@answer
class ChatDelta(TypedDict):
    """What a chunk adds to the message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning: NotRequired[Thinking]
    reasoning_content: NotRequired[Thinking]
    tool_calls: NotRequired[list[CallPiece]]


@answer
class ChatChunkChoice(_Tokens):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    stop_reason: NotRequired[StopReason]


@answer
class ChatCompletionChunk(TypedDict):
    """An event of a chat stream. The one with usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[ChatChunkChoice]
    usage: NotRequired[ChatUsage | None]
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[PromptTokenIds]


@answer
class _CompletionChoice(_Tokens):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    stop_reason: StopReason
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[PromptTokenIds]


@answer
class CompletionChoice(_CompletionChoice):
    """One of n continuations of one of the prompts."""

    finish_reason: Finish


@answer
class CompletionChunkChoice(_CompletionChoice):
    """What a chunk adds to a choice."""

    finish_reason: Finish | None


@answer
class _CompletionEnvelope(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: Fingerprint


@answer
class Completion(_CompletionEnvelope):
    """A whole completions answer: n choices for each prompt, in the prompts' order."""

    choices: list[CompletionChoice]
    usage: Usage


@answer
class CompletionChunk(_CompletionEnvelope):
    """An event of a completions stream. The one with usage has no choices."""

    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]
