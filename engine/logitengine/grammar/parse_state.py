"""Where one choice's answer stands in its grammar."""

from __future__ import annotations

import time
from concurrent.futures import Future

from llguidance import LLMatcher

from logitengine.grammar.vocabulary import CompiledGrammar, Mask, Vocabulary, error_of

SLOW_SECONDS = 0.004
"""A grammar whose mask took longer has its next mask made on a thread, so that other sequences do not wait for it."""


class ParseState:
    """The parse of one choice's tokens, and the mask of its next one.

    It is compiled first, on a thread, and then knows a mask except while one is made on a thread. Its methods are called by the
    engine's thread alone, except ``make_mask``.

    Attributes:
        error: why nothing can follow any more, else None.
    """

    __slots__ = ("_compiling", "_making", "_mask", "_matcher", "_vocabulary", "error", "is_slow")

    def __init__(self, compiling: Future[CompiledGrammar], vocabulary: Vocabulary) -> None:
        self._compiling = compiling
        self._vocabulary = vocabulary
        self._matcher: LLMatcher | None = None
        self._mask: Mask | None = None
        self._making: Future[None] | None = None
        self.error: str | None = None
        self.is_slow = False

    @property
    def is_compiled(self) -> bool:
        """Whether the grammar is compiled, or was refused."""
        return self._compiling.done()

    @property
    def is_settled(self) -> bool:
        """Whether no thread works for this state: it has a mask or an error."""
        return self.is_compiled and (self._making is None or self._making.done())

    @property
    def mask(self) -> Mask | None:
        """The tokens that may come next; None as long as a thread works for it, and after an error."""
        if not self.is_settled or self._has_failed():
            return None
        if self._matcher is None:
            compiled = self._compiling.result()
            self._matcher, self._mask = compiled.matcher.deep_copy(), compiled.first_mask
        return self._mask

    @property
    def may_end(self) -> bool:
        """Whether the answer may end here."""
        mask = self.mask
        return mask is not None and self._vocabulary.allows_end(mask)

    @property
    def is_over(self) -> bool:
        """Whether nothing but the answer's end may come next."""
        mask = self.mask
        return mask is not None and not (mask & ~self._vocabulary.ends).any()

    def _has_failed(self) -> bool:
        """Whether nothing can follow. A thread's failure, a panic of llguidance included, is this state's alone."""
        failure = self._compiling.exception() or (self._making and self._making.exception())
        if failure and self.error is None:
            self.error = str(failure)
        return self.error is not None

    def learn(self, token_id: int) -> None:
        """Advance by the token that was drawn. The mask is made afterwards, by ``make_mask``, here or on a thread."""
        matcher = self._matcher
        if matcher is None or not matcher.consume_token(token_id):
            self.error = "a token was drawn that it does not allow" if matcher is None else error_of(matcher)

    def make_mask(self) -> None:
        """Make the mask after the tokens learnt so far."""
        if self._matcher is None or self.error is not None:
            return
        started = time.perf_counter()
        mask = self._vocabulary.fill(self._matcher)
        self.is_slow = time.perf_counter() - started > SLOW_SECONDS
        if self._matcher.is_error():
            self.error = error_of(self._matcher)
        self._mask = mask

    def make_mask_later(self, making: Future[None]) -> None:
        """Have no mask until ``making``, a call of ``make_mask`` on a thread, is done."""
        self._making = making
