"""The grammars of an engine: compiled on threads and kept, and the masks of a step's sequences."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import CompiledGrammar, Vocabulary

MOST_KEPT = 64
"""Compiled grammars that are kept for later requests."""

NUM_THREADS = 2
NICENESS = 5
"""Added to the niceness of the threads: steps go first where cores are scarce."""


class Grammars:
    """Makes the parse states of choices.

    Args:
        wake: called on a thread when a state that had no mask may have one.
    """

    def __init__(self, vocabulary: Vocabulary, wake: Callable[[], None]) -> None:
        self._vocabulary = vocabulary
        self._wake = wake
        self._kept: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()
        self._pool = ThreadPoolExecutor(
            NUM_THREADS, thread_name_prefix="grammar", initializer=_yield_to_steps
        )

    def state(self, grammar: str) -> ParseState:
        """Return the state before the first token. Raises GrammarError if this model's tokens have no grammars."""
        _ = self._vocabulary.tokenizer
        compiling = self._kept.get(grammar)
        if compiling is None:
            compiling = self._kept[grammar] = self._pool.submit(self._vocabulary.compile, grammar)
            compiling.add_done_callback(self._on_done)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return ParseState(compiling, self._vocabulary)

    def make_masks(self, states: Iterable[ParseState]) -> None:
        """Make the masks of states that learnt a token.

        They are made one after the other, in 10 microseconds each: handing them to threads takes longer, and on a CPU the
        threads of the kernels fill the cores. Only grammars that were slow before get a thread.
        """
        for state in states:
            if state.is_slow:
                making = self._pool.submit(state.make_mask)
                state.make_mask_later(making)
                making.add_done_callback(self._on_done)
            else:
                state.make_mask()

    def _on_done(self, _done: Future[Any]) -> None:
        self._wake()


def _yield_to_steps() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
