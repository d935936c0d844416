"""``chat.completion`` and ``chat.completion.chunk``."""

from __future__ import annotations

from typing import Any, ClassVar

from logitserve.answers.answer import Answer
from logitserve.answers.logprobs import chat_content
from logitserve.answers.record import Record


class ChatAnswer(Answer):
    """A chat answer. prompt_logprobs stand beside the choices: a chat has one prompt."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def opening_choice(self, record: Record) -> dict[str, Any]:
        """The role, in a chunk without tokens as OpenAI sends it: its npm package counts a first chunk's logprobs twice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": record.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, record: Record, *, is_first: bool) -> dict[str, Any]:  # noqa: ARG002 - completions' need
        delta = {"content": record.text} if record.text else {}
        return {"index": record.index, "delta": delta, **self._tail(record)}

    def whole_choice(self, record: Record) -> dict[str, Any]:
        message = {"role": "assistant", "content": record.text, "refusal": None}
        return {"index": record.index, "message": message, **self._tail(record)}

    def envelope_extras(self, record: Record) -> dict[str, Any]:
        entries = record.prompt_entries()
        return {} if entries is None else {"prompt_logprobs": entries}

    def _tail(self, record: Record) -> dict[str, Any]:
        logprobs = None
        if self.job.requests[0].logprobs is not None:
            content = chat_content(self.model.tokenizer.table, record.token_ids, record.logprobs)
            logprobs = {"content": content, "refusal": None}
        return {"logprobs": logprobs, "finish_reason": record.finish_reason, **record.extras()}
