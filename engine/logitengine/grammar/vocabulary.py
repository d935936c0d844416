"""The model's tokens as llguidance sees them, and grammars compiled for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

WORD_BITS = 32
"""Tokens that one int32 word of a mask covers."""

MOST_LEXER_STATES = 32_000
"""States of a lexer; each takes 1 to 2 kB. All answers of one compiled grammar share its lexer."""

MOST_ERROR_CHARACTERS = 500
"""Characters of an error that are told."""

SLOW_SECONDS = 0.004
"""CPU time of a mask after which its grammar's next `SLOW_MASKS` are made on threads, so that no other sequence waits."""

WORKING_SECONDS = 0.0002
"""CPU time of a mask that may have added states to the lexer. One that adds none takes a tenth."""

SLOW_MASKS = 100
"""Masks in a row that must be fast before a slow grammar counts as fast again: a lexer is slow while it is new."""

Mask = NDArray[np.int32]
"""Bits of the tokens that may come next: int32 [ceil(V / 32)], for a model with V logits a row."""


class GrammarError(ValueError):
    """A grammar that cannot be honoured, with the reason."""


@dataclass(slots=True, eq=False)
class CompiledGrammar:
    """A grammar before its first token: choices copy the matcher, whose copies share one lexer, and share the mask.

    Attributes:
        lock: held while any of the copies works. llguidance has a lock of its own, but waits for it with the
            interpreter's lock.
        is_full: whether an answer has met the bound of the lexer's states.
        num_slow: masks to be made on threads from here on, because one was slow.
        working_seconds: CPU time of the masks that took long enough to have added to the lexer.
    """

    matcher: LLMatcher
    first_mask: Mask
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_full: bool = False
    num_slow: int = 0
    working_seconds: float = 0.0

    def count(self, seconds: float) -> None:
        """Count the CPU time of a mask."""
        if seconds > SLOW_SECONDS:
            self.num_slow = SLOW_MASKS
        elif self.num_slow:
            self.num_slow -= 1
        if seconds > WORKING_SECONDS:
            self.working_seconds += seconds


class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer_path: directory with tokenizer.json.
        vocab_size: logits of a row. Ids that the tokenizer does not know are never allowed.
        eos_token_ids: tokens that end an answer, which a grammar allows where it may end.
    """

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = Path(tokenizer_path) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._num_words = -(-vocab_size // WORD_BITS)

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer, which takes half a second and the interpreter's lock to make. Raises GrammarError."""
        try:
            # A path that begins with a slash is read by llguidance. As a string of Python the file takes up to 4 bytes a letter.
            path = str(self._path.absolute())
            try:
                return LLTokenizer(path, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
            except ValueError:
                # A tokenizer may know more tokens than the model has logits.
                return LLTokenizer(path, eos_token=self._eos_token_ids)
        except BaseException as error:
            # llguidance panics at tokens of kilobytes, which raises what is no Exception and has no public name.
            if not isinstance(error, OSError | ValueError) and type(error).__name__ != "PanicException":
                raise
            raise GrammarError(
                f"this model's answers cannot follow a grammar, because llguidance does not take its tokenizer: {error}"
            ) from error

    @cached_property
    def ends(self) -> Mask:
        """Bits of the tokens that end an answer."""
        mask = np.zeros(self._num_words, np.uint32)
        for token_id in self._eos_token_ids:
            mask[token_id // WORD_BITS] |= np.uint32(1 << token_id % WORD_BITS)
        return mask.view(np.int32)

    def allows_end(self, mask: Mask) -> bool:
        """Whether the mask holds a token that ends an answer."""
        return any(
            int(mask[token_id // WORD_BITS]) >> token_id % WORD_BITS & 1 for token_id in self._eos_token_ids
        )

    def compile(self, grammar: str) -> CompiledGrammar:
        """Compile a grammar of llguidance, and find its first tokens. Raises GrammarError.

        It takes milliseconds for what people write, and may take minutes and gigabytes for what they should not.
        """
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=MOST_LEXER_STATES)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(error_of(matcher))
        mask = self.fill(matcher)
        if matcher.is_error():
            raise GrammarError(error_of(matcher))
        return CompiledGrammar(matcher, mask)

    def fill(self, matcher: LLMatcher) -> Mask:
        """Return the mask of the matcher's next token. It means nothing if the matcher is in error afterwards."""
        mask = np.empty(-(-self.tokenizer.vocab_size // WORD_BITS), np.int32)
        # Ten times faster than mask.ctypes.data.
        matcher.unsafe_compute_mask_ptr(mask.__array_interface__["data"][0], mask.nbytes)
        return mask[: self._num_words]


def error_of(matcher: LLMatcher) -> str:
    """Return the matcher's error in one line, shortened."""
    return shortened(" ".join(matcher.get_error().replace("<non-verbose/>", "").split()))


def shortened(text: str) -> str:
    """Return the text, or its beginning if it is long: an error may quote the whole grammar."""
    return text if len(text) <= MOST_ERROR_CHARACTERS else text[: MOST_ERROR_CHARACTERS - 1] + "…"
