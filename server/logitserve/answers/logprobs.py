"""Log-probabilities in the shapes of chat, of completions, and of vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logitengine.link.messages import Logprobs

from logitserve.text.token_table import TokenTable

LOWEST = -9999.0
"""What stands for minus infinity, which JSON lacks; the number that OpenAI uses."""


def finite(logprob: float) -> float:
    return max(LOWEST, logprob)


def chat_content(table: TokenTable, token_ids: Sequence[int], logprobs: Logprobs) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat choice: for each token ``{token, logprob, bytes, top_logprobs}``."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": table.text(token_id), "logprob": finite(logprob), "bytes": list(table[token_id])}

    return [
        {
            **entry(token_id, logprobs.token_logprobs[row]),
            "top_logprobs": [
                entry(top_id, logprob)
                for top_id, logprob in zip(logprobs.top_ids[row], logprobs.top_logprobs[row], strict=True)
            ],
        }
        for row, token_id in enumerate(token_ids)
    ]


class CompletionLogprobs:
    """``logprobs`` of a completions choice: four lists with an entry for each token."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offsets: list[int] = []

    def add(
        self, token_ids: Sequence[int], text_offsets: Sequence[int], logprobs: Logprobs, top: int
    ) -> None:
        """Append tokens with their scores and the ``top`` most likely, the token itself always among them."""
        for row, token_id in enumerate(token_ids):
            name = token_name(self._table, token_id)
            logprob = finite(logprobs.token_logprobs[row])
            likely = zip(logprobs.top_ids[row][:top], logprobs.top_logprobs[row][:top], strict=True)
            self._tokens.append(name)
            self._token_logprobs.append(logprob)
            tops = {token_name(self._table, top_id): finite(score) for top_id, score in likely}
            self._top_logprobs.append({**tops, name: logprob} if top else None)
        self._text_offsets += text_offsets

    def add_unscored(self, token_id: int, text_offset: int) -> None:
        """Append the first token of a prompt: nothing comes before it that could score it."""
        self._tokens.append(token_name(self._table, token_id))
        self._token_logprobs.append(None)
        self._top_logprobs.append(None)
        self._text_offsets.append(text_offset)

    def finish(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offsets,
        }


def token_name(table: TokenTable, token_id: int) -> str:
    r"""The token's text, or ``bytes:\xe2\x82`` where it is no whole character: names must tell tokens apart."""
    data = table[token_id]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_entries(
    table: TokenTable, token_ids: Sequence[int], logprobs: Logprobs, top: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs for these prompt tokens: token id -> ``{logprob, rank, decoded_token}``, ranks from 1.

    The ``top`` most likely tokens, and the token itself.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": table.text(token_id)}

    entries: list[dict[str, Any] | None] = []
    for row, token_id in enumerate(token_ids):
        likely = zip(logprobs.top_ids[row][:top], logprobs.top_logprobs[row][:top], strict=True)
        scores = {str(top_id): entry(top_id, score, rank) for rank, (top_id, score) in enumerate(likely, 1)}
        scores[str(token_id)] = entry(token_id, logprobs.token_logprobs[row], logprobs.ranks[row] + 1)
        entries.append(scores)
    return entries


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """Consecutive stretches of one sequence as one."""
    return Logprobs(
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        ranks=[value for part in parts for value in part.ranks],
        top_ids=[value for part in parts for value in part.top_ids],
        top_logprobs=[value for part in parts for value in part.top_logprobs],
    )
