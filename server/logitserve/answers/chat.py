"""``chat.completion`` and ``chat.completion.chunk``."""

from __future__ import annotations

from typing import Any, ClassVar

from logitserve.answers.choices import ChoicesAnswer
from logitserve.answers.logprobs import ChatLogprobs
from logitserve.answers.record import Record


class ChatAnswer(ChoicesAnswer[Record]):
    """A chat answer. What belongs to its prompt stands beside the choices, because a chat has one prompt."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def record(self, index: int) -> Record:
        with_logprobs = self.job.requests[0].logprobs is not None
        return Record(
            self.job, index, ChatLogprobs(self.job.model.tokenizer.table) if with_logprobs else None
        )

    def opening_choices(self, record: Record) -> list[dict[str, Any]]:
        """Return the role, in a chunk without tokens as OpenAI sends it.

        Its npm package counts a first chunk's logprobs twice.
        """
        delta = {"role": "assistant", "content": ""}
        return [{"index": record.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk_choice(self, record: Record) -> dict[str, Any]:
        delta = {"content": record.text} if record.text else {}
        return {"index": record.index, "delta": delta, **_tail(record)}

    def whole_choice(self, record: Record) -> dict[str, Any]:
        message = {"role": "assistant", "content": record.text, "refusal": None}
        return {"index": record.index, "message": message, **_tail(record)}

    def envelope_extras(self, record: Record) -> dict[str, Any]:
        return record.prompt_logprobs()

    def opening_extras(self, record: Record) -> dict[str, Any]:
        return record.prompt_token_ids()


def _tail(record: Record) -> dict[str, Any]:
    return {"logprobs": record.logprobs(), "finish_reason": record.finish_reason, **record.extras()}
