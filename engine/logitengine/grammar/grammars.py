"""The grammars of an engine: compiled on threads and kept, and the masks of a step's sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

from logitengine.errors import EngineOverloadedError
from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import MOST_LEXER_STATES, CompiledGrammar, GrammarError, Vocabulary
from logitengine.grammar.workers import Workers

MOST_KEPT = 64
"""Compiled grammars that are kept for later requests."""

MOST_KEPT_BYTES = 512 << 20
"""Memory of the kept grammars, as far as it is known, without those in use."""

BYTES_PER_CHARACTER = 512
"""Memory of a compiled grammar per character of its text, at most: 150 to 420 for schemas of many properties."""

BYTES_PER_SECOND = 1 << 30
"""Memory that a lexer may take in a second of CPU time in which its states are made."""

MOST_LEXER_BYTES = MOST_LEXER_STATES * 2048
"""Memory of a lexer's states, at most."""

MOST_USED_BYTES = 2 << 30
"""Memory of the grammars in use, as far as it is known, beyond which requests with others are turned away."""

MOST_ALONE = 8
"""Answers whose lexers are their own, since they filled the one that they shared."""

NUM_COMPILERS = 2
NUM_MASK_MAKERS = 2

INLINE_SECONDS = 0.004
"""CPU time of a step's masks, after which its others are made on threads."""


@dataclass(slots=True, eq=False)
class _Kept:
    """A kept grammar, and the number of unfinished choices that follow it."""

    compiling: Future[CompiledGrammar]
    text_size: int
    num_users: int = 0

    @property
    def is_stale(self) -> bool:
        """Whether newcomers should compile it again, because its lexer is full."""
        compiling = self.compiling
        return compiling.done() and not compiling.exception() and compiling.result().is_full

    @property
    def nbytes(self) -> int:
        """Memory that it takes, roughly; llguidance tells nothing about it."""
        compiling = self.compiling
        worked = 0.0
        if compiling.done() and not compiling.exception():
            worked = compiling.result().working_seconds
        return self.text_size * BYTES_PER_CHARACTER + min(int(worked * BYTES_PER_SECOND), MOST_LEXER_BYTES)


class Grammars:
    """Makes the parse states of choices.

    Compiling and masks have threads of their own: a grammar may compile for minutes, and a mask keeps an answer waiting.

    Args:
        wake: called on a thread when a state that had no mask may have one.
    """

    def __init__(self, vocabulary: Vocabulary, wake: Callable[[], None]) -> None:
        self._vocabulary = vocabulary
        self._wake = wake
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._users: dict[ParseState, tuple[bytes, _Kept]] = {}
        self._compilers = Workers("grammar", NUM_COMPILERS)
        self._makers = Workers("mask", NUM_MASK_MAKERS)
        self._num_alone = 0
        self._alone = Lock()

    def state(self, grammar: str) -> ParseState:
        """Return the state before the first token. Whoever asks for it gives it back with ``release``.

        Raises GrammarError if this model's tokens have no grammars, and EngineOverloadedError if those in use take too
        much memory for another one.
        """
        _ = self._vocabulary.tokenizer
        key = sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        kept = self._kept.get(key)
        if kept is None or kept.is_stale:
            self._check_room(len(grammar) * BYTES_PER_CHARACTER)
            compiling = self._compilers.submit(self._vocabulary.compile, grammar)
            kept = self._kept[key] = _Kept(compiling, len(grammar))
            compiling.add_done_callback(self._on_done)
        self._kept.move_to_end(key)
        kept.num_users += 1
        state = ParseState(grammar, kept.compiling, self._vocabulary)
        self._users[state] = key, kept
        self._forget_old()
        return state

    def _check_room(self, nbytes: int) -> None:
        # Full ones too, which newcomers compile again.
        in_use = {id(kept): kept.nbytes for _, kept in self._users.values()}
        used = sum(in_use.values())
        if used and used + nbytes > MOST_USED_BYTES:
            raise EngineOverloadedError(
                f"the grammars of other requests take {used >> 20} MiB, and all may take {MOST_USED_BYTES >> 20} MiB"
            )

    def release(self, state: ParseState) -> None:
        """Let go of a state. What nobody needs and no thread has begun is not compiled."""
        with self._alone:
            state.is_abandoned = True
            self._num_alone -= state.is_alone
        key, kept = self._users.pop(state)
        kept.num_users -= 1
        if not kept.num_users and kept.compiling.cancel():
            del self._kept[key]
        self._forget_old()

    def _forget_old(self) -> None:
        """Forget what was not used for longest, beyond the bounds. Memory in use is no more than its users' own."""
        idle = [(key, kept.nbytes) for key, kept in self._kept.items() if not kept.num_users]
        nbytes = sum(size for _, size in idle)
        while idle and (nbytes > MOST_KEPT_BYTES or len(idle) > MOST_KEPT):
            key, size = idle.pop(0)
            nbytes -= size
            del self._kept[key]

    def make_masks(self, states: Iterable[ParseState]) -> None:
        """Make the masks of states that learnt a token.

        They are made one after the other, in 10 microseconds each: handing them to threads takes longer, and on a CPU the
        threads of the kernels fill the cores. Grammars that were slow before get a thread, and what exceeds the step's time.
        """
        seconds_left = INLINE_SECONDS
        for state in states:
            compiled = state.compiled
            if compiled is None:
                continue
            # A thread that works for another answer of the grammar may hold the lock for long.
            inline = seconds_left > 0 and not compiled.num_slow and compiled.lock.acquire(blocking=False)
            if not inline:
                state.give_away()
                self._makers.submit(self._advance, state, compiled)
                continue
            try:
                seconds_left -= state.advance()
            except BaseException as error:  # noqa: BLE001 - a panic of llguidance is no Exception
                state.take_back(error)
            finally:
                compiled.lock.release()
            if state.has_outgrown:
                state.give_away()
                self._begin_alone_later(state, compiled)

    def _advance(self, state: ParseState, compiled: CompiledGrammar) -> None:
        """Work for a state on a thread."""
        error: BaseException | None = None
        try:
            with compiled.lock:
                if not state.is_abandoned:
                    state.advance()
        except BaseException as failure:  # noqa: BLE001 - a panic of llguidance is no Exception
            error = failure
        if error is None and state.has_outgrown:
            self._begin_alone_later(state, compiled)
            return
        state.take_back(error)
        self._wake()

    def _begin_alone_later(self, state: ParseState, compiled: CompiledGrammar) -> None:
        """Have a state that met the bound of the shared lexer compile for itself, and newcomers as well."""
        compiled.is_full = True
        self._compilers.submit(self._begin_alone, state)

    def _begin_alone(self, state: ParseState) -> None:
        error: BaseException | None = None
        try:
            if self._may_be_alone(state):
                state.begin_alone()
        except BaseException as failure:  # noqa: BLE001 - a panic of llguidance is no Exception
            error = failure
        state.take_back(error)
        self._wake()

    def _may_be_alone(self, state: ParseState) -> bool:
        """Count a state that gets a lexer of its own. Raises GrammarError where there are too many."""
        with self._alone:
            if state.is_abandoned:
                return False
            if self._num_alone >= MOST_ALONE:
                raise GrammarError(f"it needs a lexer of its own, and {MOST_ALONE} other answers have one")
            self._num_alone += 1
            state.is_alone = True
            return True

    def _on_done(self, _done: Future[Any]) -> None:
        self._wake()
