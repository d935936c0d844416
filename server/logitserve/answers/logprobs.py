"""Log-probabilities in the shapes of chat, of completions, and of vLLM's prompt_logprobs, written as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from logitengine.link.messages import Logprobs

from logitserve.answers.json_pieces import JsonArray, JsonPieces
from logitserve.text.token_table import TokenTable

LOWEST = -9999.0
"""Number that stands for minus infinity, which JSON lacks; OpenAI's choice."""


def finite(logprob: float) -> float:
    return max(LOWEST, logprob)


class LogprobsWriter(Protocol):
    """Writes the ``logprobs`` of one choice."""

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""

    def add(self, token_ids: Sequence[int], text_offsets: Sequence[int], logprobs: Logprobs) -> None:
        """Append tokens, where their text begins in the choice's, and their log-probabilities."""

    def finish(self) -> dict[str, Any]:
        """The member's value, for `json_pieces.dumps`."""


class ChatLogprobs:
    """``logprobs`` of a chat choice: ``content`` has ``{token, logprob, bytes, top_logprobs}`` for each token."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._content = JsonArray()

    @property
    def nbytes(self) -> int:
        return self._content.nbytes

    def add(self, token_ids: Sequence[int], text_offsets: Sequence[int], logprobs: Logprobs) -> None:  # noqa: ARG002
        self._content.extend(
            [
                {
                    **self._entry(token_id, logprobs.token_logprobs[row]),
                    "top_logprobs": [
                        self._entry(top_id, logprob)
                        for top_id, logprob in zip(
                            logprobs.top_ids[row], logprobs.top_logprobs[row], strict=True
                        )
                    ],
                }
                for row, token_id in enumerate(token_ids)
            ]
        )

    def finish(self) -> dict[str, Any]:
        return {"content": self._content.finish(), "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._table.text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._table[token_id]),
        }


class CompletionLogprobs:
    """``logprobs`` of a completions choice: four lists with an entry for each token.

    Args:
        top: how many of the likeliest tokens are named beside each; the token itself always is, unless it is 0.
        first_offset: where the text of the tokens begins in the choice's.
    """

    def __init__(self, table: TokenTable, top: int, first_offset: int = 0) -> None:
        self._table = table
        self._top = top
        self._first_offset = first_offset
        self._lists = {
            name: JsonArray() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }

    @property
    def nbytes(self) -> int:
        return sum(entries.nbytes for entries in self._lists.values())

    def add(self, token_ids: Sequence[int], text_offsets: Sequence[int], logprobs: Logprobs) -> None:
        names = [token_name(self._table, token_id) for token_id in token_ids]
        own = [finite(logprob) for logprob in logprobs.token_logprobs[: len(names)]]
        tops = [self._tops(name, own[row], logprobs, row) for row, name in enumerate(names)]
        offsets = [self._first_offset + offset for offset in text_offsets]
        self._extend(names, own, tops, offsets)

    def add_first(self, token_id: int, text_offset: int) -> None:
        """Append the first token of a prompt, which has no log-probability: no token comes before it."""
        self._extend([token_name(self._table, token_id)], [None], [None], [text_offset])

    def extend_from(self, other: CompletionLogprobs) -> None:
        """Append the entries of another writer."""
        for name, entries in self._lists.items():
            entries.extend_from(other._lists[name])

    def finish(self) -> dict[str, JsonPieces]:
        return {name: entries.finish() for name, entries in self._lists.items()}

    def _tops(self, name: str, own: float, logprobs: Logprobs, row: int) -> dict[str, float] | None:
        if not self._top:
            return None
        likely = zip(logprobs.top_ids[row][: self._top], logprobs.top_logprobs[row], strict=False)
        tops = {token_name(self._table, top_id): finite(logprob) for top_id, logprob in likely}
        return {**tops, name: own}

    def _extend(
        self,
        names: Sequence[str],
        own: Sequence[float | None],
        tops: Sequence[dict[str, float] | None],
        offsets: Sequence[int],
    ) -> None:
        for entries, values in zip(self._lists.values(), (names, own, tops, offsets), strict=True):
            entries.extend(values)


class PromptLogprobs:
    """vLLM's prompt_logprobs: for each token id -> ``{logprob, rank, decoded_token}``, ranks from 1.

    The ``top`` likeliest tokens and the token itself; null for a prompt's first token.
    """

    def __init__(self, table: TokenTable, top: int) -> None:
        self._table = table
        self._top = top
        self._entries = JsonArray()

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes

    def add_first(self) -> None:
        self._entries.extend([None])

    def add(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        self._entries.extend(
            [self._likely(token_id, logprobs, row) for row, token_id in enumerate(token_ids)]
        )

    def finish(self) -> JsonPieces:
        return self._entries.finish()

    def _likely(self, token_id: int, logprobs: Logprobs, row: int) -> dict[str, Any]:
        likely = zip(logprobs.top_ids[row][: self._top], logprobs.top_logprobs[row], strict=False)
        entries = {
            str(top_id): self._entry(top_id, logprob, rank)
            for rank, (top_id, logprob) in enumerate(likely, 1)
        }
        entries[str(token_id)] = self._entry(token_id, logprobs.token_logprobs[row], logprobs.ranks[row] + 1)
        return entries

    def _entry(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self._table.text(token_id)}


def token_name(table: TokenTable, token_id: int) -> str:
    r"""The token's text, or ``bytes:\xe2\x82`` where it is no whole character: names must tell tokens apart."""
    data = table[token_id]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
