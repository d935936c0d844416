"""Text from token ids, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitserve.text.token_table import TokenTable


class Detokenizer:
    """Turns tokens into text as they come, never splitting a character.

    The bytes of a character that is not whole yet are held back. Bytes that can never become a character are U+FFFD. The
    pieces joined are the text of all tokens at once. ``at_start`` is for text that nothing precedes: the space that
    SentencePiece tokenizers put there is dropped. ``kept`` are special tokens that are not skipped, since a parser needs
    them.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        skip_special_tokens: bool = True,
        kept: Collection[int] = (),
        at_start: bool = False,
    ) -> None:
        self._table = table
        skipped = table.special_ids.difference(kept) if skip_special_tokens else ()
        self._skipped: frozenset[int] = frozenset(skipped)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = at_start and table.leading_space

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        if token_id in self._skipped:
            return ""
        return self._cleaned(self._decoder.decode(self._table[token_id]))

    def finish(self) -> str:
        """Return U+FFFD for a character that never became whole, or nothing."""
        return self._cleaned(self._decoder.decode(b"", final=True))

    def _cleaned(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def special_tokens_in(table: TokenTable, strings: Sequence[str]) -> dict[int, str]:
    """Return the special tokens whose text stands in one of ``strings``, by id."""
    texts = {token_id: table.text(token_id) for token_id in table.special_ids}
    return {
        token_id: text for token_id, text in texts.items() if text and any(text in one for one in strings)
    }
