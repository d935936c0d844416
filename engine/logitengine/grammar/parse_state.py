"""Where one choice's answer stands in its grammar."""

from __future__ import annotations

from concurrent.futures import Future
from time import thread_time

from llguidance import LLMatcher

from logitengine.grammar.vocabulary import CompiledGrammar, Mask, Vocabulary, error_of, shortened

LEXER_FAILED = "InternalError"
"""Stop reason of a matcher whose lexer has reached `MOST_LEXER_STATES`, or was left broken by another answer's failure."""


class ParseState:
    """The parse of one choice's tokens, and the mask of its next one.

    It is compiled first, on a thread, and then knows a mask except while one is made on a thread. Between ``give_away``
    and ``take_back`` a thread calls ``advance`` or ``begin_alone``; everything else is called by the engine's thread.

    Attributes:
        grammar: the text of the grammar.
        error: why nothing can follow any more, else None.
        is_abandoned: whether nobody needs it any more, so that threads need not work for it.
        is_alone: whether it has a lexer of its own.
        has_outgrown: whether the lexer that it shares with other answers is full, so that it needs one of its own.
    """

    __slots__ = (
        "_compiled",
        "_compiling",
        "_is_away",
        "_mask",
        "_matcher",
        "_token_ids",
        "_vocabulary",
        "error",
        "grammar",
        "has_outgrown",
        "is_abandoned",
        "is_alone",
    )

    def __init__(self, grammar: str, compiling: Future[CompiledGrammar], vocabulary: Vocabulary) -> None:
        self.grammar = grammar
        self._compiling = compiling
        self._vocabulary = vocabulary
        self._compiled: CompiledGrammar | None = None
        self._matcher: LLMatcher | None = None
        self._mask: Mask | None = None
        self._token_ids: list[int] = []
        self._is_away = False
        self.error: str | None = None
        self.has_outgrown = False
        self.is_abandoned = False
        self.is_alone = False

    @property
    def is_compiled(self) -> bool:
        """Whether the grammar is compiled, or was refused."""
        return self._compiled is not None or self._compiling.done()

    @property
    def is_settled(self) -> bool:
        """Whether no thread works for this state: it has a mask or an error."""
        return not self._is_away and self.is_compiled

    @property
    def compiled(self) -> CompiledGrammar | None:
        """The compiled grammar; None while it is compiled, and if that failed."""
        if self._compiled is None and self._compiling.done() and self.error is None:
            failure = self._compiling.exception()
            if failure is not None:
                self.error = shortened(str(failure))
            else:
                self._compiled = self._compiling.result()
                self._mask = self._compiled.first_mask
        return self._compiled

    @property
    def mask(self) -> Mask | None:
        """The tokens that may come next; None as long as a thread works for it, and after an error."""
        if self._is_away or self.compiled is None or self.error is not None:
            return None
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

    def learn(self, token_id: int) -> None:
        """Take the token that was drawn. ``advance`` consumes it, here or on a thread."""
        self._token_ids.append(token_id)

    def advance(self) -> float:
        """Consume the token learnt last and make the next one's mask. Returns the seconds of CPU that it took.

        The caller holds the lock of the compiled grammar, whose lexer all its answers share.
        """
        started = thread_time()
        if self._compiled is None:
            self.error = "a token was drawn before it was compiled"
            return 0.0
        if self._matcher is None:
            self._matcher = self._compiled.matcher.deep_copy()
        self._consume(self._matcher, self._token_ids[-1:])
        seconds = thread_time() - started
        self._compiled.count(seconds)
        return seconds

    def begin_alone(self) -> None:
        """Compile the grammar for this answer alone, and parse its tokens again. It may take long."""
        self.has_outgrown = False
        self._compiled = self._vocabulary.compile(self.grammar)
        self._matcher = self._compiled.matcher
        self._consume(self._matcher, self._token_ids)

    def _consume(self, matcher: LLMatcher, token_ids: list[int]) -> None:
        mask: Mask | None = None
        if matcher.consume_tokens(token_ids):
            mask = self._vocabulary.fill(matcher)
        if not matcher.is_error():
            self._mask = mask
        elif matcher.stop_reason() == LEXER_FAILED and not self.is_alone:
            self.has_outgrown = True
        else:
            self.error = error_of(matcher)

    def give_away(self) -> None:
        """Have no mask until ``take_back``: a thread works for it."""
        self._is_away = True

    def take_back(self, error: BaseException | None = None) -> None:
        """End a thread's work, with the error that it met if it did not expect it: a panic of llguidance."""
        if error is not None:
            self.error = shortened(str(error))
        self._is_away = False
