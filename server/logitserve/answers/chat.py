"""``chat.completion`` and ``chat.completion.chunk``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from logitserve.answers.choices import ChoicesAnswer
from logitserve.answers.logprobs import ChatLogprobs
from logitserve.answers.record import Record
from logitserve.jobs.job import Job
from logitserve.text.choice import Delta
from logitserve.text.parser import Reasoning, TextPart, ToolCall

ARGUMENTS_CHARACTERS = 60_000
"""Characters of a call's arguments in one event: JSON writes none of them in more than six bytes."""


class ChatRecord(Record):
    """A choice with its thinking and its calls.

    Attributes:
        calls: in the shape of a message, or of a chunk's delta, where the calls are pieces.
    """

    def __init__(self, job: Job, index: int) -> None:
        with_logprobs = job.requests[0].logprobs is not None
        super().__init__(job, index, ChatLogprobs(job.model.tokenizer.table) if with_logprobs else None)
        self._reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def add_part(self, part: TextPart) -> None:
        match part:
            case Reasoning():
                self._reasoning.append(part.text)
            case _CallPiece():
                self.calls.append(part.written())
            case ToolCall():
                function = {"name": part.name, "arguments": part.arguments}
                self.calls.append({"id": part.id, "type": "function", "function": function})

    def spoken(self) -> dict[str, Any]:
        """Return the members beside the content: thinking under the names of both conventions, and calls."""
        members: dict[str, Any] = {}
        if self._reasoning:
            members["reasoning"] = members["reasoning_content"] = "".join(self._reasoning)
        if self.calls:
            members["tool_calls"] = self.calls
        return members


class _CallPiece(ToolCall):
    """A piece of a call in a stream: what the call is, or some of its arguments."""

    def written(self) -> dict[str, Any]:
        if self.id:
            function = {"name": self.name, "arguments": ""}
            return {"index": self.index, "id": self.id, "type": "function", "function": function}
        return {"index": self.index, "function": {"arguments": self.arguments}}


class ChatAnswer(ChoicesAnswer[ChatRecord]):
    """A chat answer. What belongs to its prompt stands beside the choices, because a chat has one prompt."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def record(self, index: int) -> ChatRecord:
        return ChatRecord(self.job, index)

    def opening_choices(self, record: ChatRecord) -> list[dict[str, Any]]:
        """Return the role, in a chunk without tokens as OpenAI sends it.

        Its npm package counts a first chunk's logprobs twice.
        """
        delta = {"role": "assistant", "content": ""}
        return [{"index": record.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def divided(self, delta: Delta) -> Sequence[Delta]:
        """Return a delta with calls as one for each piece of a call and each text beside it.

        The tokens, their rows and the end go with the last one.
        """
        if not any(isinstance(part, ToolCall) for part in delta.parts):
            return (delta,)
        groups = _groups(delta.parts)
        before = [
            Delta(index=delta.index, token_ids=[], parts=group, text_offsets=[]) for group in groups[:-1]
        ]
        return [*before, replace(delta, parts=groups[-1])]

    def chunk_choice(self, record: ChatRecord) -> dict[str, Any]:
        delta = {"content": record.text} if record.text else {}
        return {"index": record.index, "delta": {**delta, **record.spoken()}, **_tail(record)}

    def whole_choice(self, record: ChatRecord) -> dict[str, Any]:
        """Return the message. It has no content where it has calls instead, as OpenAI has it."""
        content = record.text if record.text or not record.calls else None
        message = {"role": "assistant", "content": content, "refusal": None, **record.spoken()}
        return {"index": record.index, "message": message, **_tail(record)}

    def envelope_extras(self, record: ChatRecord) -> dict[str, Any]:
        return record.prompt_logprobs()

    def opening_extras(self, record: ChatRecord) -> dict[str, Any]:
        return record.prompt_token_ids()


def _groups(parts: Sequence[TextPart]) -> list[list[TextPart]]:
    """Return the parts of each chunk: texts together, every piece of a call alone."""
    groups: list[list[TextPart]] = []
    is_text = False
    for part in parts:
        if isinstance(part, ToolCall):
            groups += [[piece] for piece in _pieces(part)]
        elif is_text:
            groups[-1].append(part)
        else:
            groups.append([part])
        is_text = not isinstance(part, ToolCall)
    return groups


def _pieces(call: ToolCall) -> list[_CallPiece]:
    """Return the id and the name first, then the arguments, as OpenAI streams them."""
    starts = range(0, len(call.arguments), ARGUMENTS_CHARACTERS)
    texts = [call.arguments[start : start + ARGUMENTS_CHARACTERS] for start in starts]
    return [
        _CallPiece(call.index, call.id, call.name, ""),
        *(_CallPiece(call.index, "", "", text) for text in texts),
    ]


def _tail(record: Record) -> dict[str, Any]:
    return {"logprobs": record.logprobs(), "finish_reason": record.finish_reason, **record.extras()}
