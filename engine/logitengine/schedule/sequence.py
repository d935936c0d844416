"""One choice of one request: its tokens, its blocks, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from logitengine.grammar.parse_state import ParseState
from logitengine.link.messages import GenerationRequest, OutputSpec, PromptItem, SamplingParams
from logitengine.schedule.prompt import Prompt, item_digest, root_digest
from logitengine.schedule.rope_positions import rope_positions
from logitengine.schedule.token_counts import TokenCounts

UNKNOWN = 0
"""Placeholder in ``token_ids`` for a token that the host has not read yet. A valid id, because nothing may read it."""


class SequenceState(Enum):
    """State of a sequence. Waiting for a leader is no state: it is derived from the leader."""

    WAITING = "waiting"
    """Waits for a place among the running. It still has its blocks if it was parked and nobody needed them."""
    RUNNING = "running"
    PARKED = "parked"
    """Its reader lags. It keeps its blocks until another sequence needs them, and is recomputed later if so."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and counters of one choice; everything else is derived from them.

    Attributes:
        arrival: order of arrival; older sequences are served first and preempted last.
        leader: the first choice of the same request; the others wait for its prefill, then share its blocks.
        row_nbytes: bytes that the reader gets for each prompt row; 0 if nothing is sent.
        window_bytes: the request's own bound on unread outputs; None: the engine's.
        grammar: where the answer stands in its grammar; None without one.
        token_ids: the prompt, then the generated tokens. The newest ``num_unknown`` of them are placeholders
            for tokens that launched steps have drawn.
        draw_row: row of the newest token in the latest draw while the host does not know the token, else
            None.
        block_table: physical KV blocks, in order.
        num_published: blocks at the beginning of the table that other sequences can find.
        block_hashes: hashes of the first blocks' contents, as far as they were needed; they outlive the table.
        num_computed: tokens whose keys and values are in the cache, or will be before any step scheduled from
            here on.
        num_cached: prompt tokens that the prefix cache gave at the first admission; None before it.
        idle_since: time when it was last parked, by the scheduler's clock.
        num_rows_given: prompt positions up to which no row is owed: given, or never requested.
        positions: rotary positions of the prompt's tokens, int64 [3, tokens], where they differ from the tokens' own.
        position_offset: what is added to the own position of every token after the prompt.
        joins_items: whether the tokens of an item attend to each other in both directions, so that no chunk divides them.
        seen, generated: counts of the whole sequence's and of the answer's tokens, if a penalty needs them.
    """

    request_id: str
    index: int
    arrival: int
    prompt: Prompt
    sampling: SamplingParams
    outputs: OutputSpec
    leader: Sequence | None = None
    row_nbytes: int = 0
    window_bytes: int | None = None
    joins_items: bool = False
    grammar: ParseState | None = None
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_published: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_unknown: int = 0
    draw_row: int | None = None
    num_computed: int = 0
    num_cached: int | None = None
    idle_since: float = 0.0
    num_rows_given: int = field(init=False)
    positions: NDArray[np.int64] | None = field(init=False)
    position_offset: int = field(init=False, default=0)
    seen: TokenCounts | None = field(init=False, default=None)
    generated: TokenCounts | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt.token_ids)
        # Choice 0 carries prompt rows for all choices.
        count = len(self.prompt)
        self.num_rows_given = count if self.index else self.outputs.first_prompt_row(count)
        self.positions = rope_positions(count, self.prompt.items)
        if self.positions is not None:
            self.position_offset = int(self.positions.max()) + 1 - count
        if self.sampling.repetition_penalty != 1.0:
            self.seen = TokenCounts(self.token_ids)
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self.generated = TokenCounts()

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        index: int,
        arrival: int,
        *,
        leader: Sequence | None = None,
        row_nbytes: int = 0,
        joins_items: bool = False,
        grammar: ParseState | None = None,
    ) -> Sequence:
        """Make the sequence for choice ``index`` of a request."""
        root = root_digest(cache_salt=request.cache_salt)
        return cls(
            request_id=request.request_id,
            index=index,
            arrival=arrival,
            prompt=Prompt(
                request.prompt_token_ids,
                # How fast an image is read must not tell that another root has it.
                items=tuple(replace(item, digest=item_digest(root, item)) for item in request.items),
                root=root,
            ),
            sampling=request.sampling,
            outputs=request.outputs,
            leader=leader,
            row_nbytes=row_nbytes,
            window_bytes=request.window_bytes,
            joins_items=joins_items,
            grammar=grammar,
        )

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def has_begun(self) -> bool:
        """Whether it was admitted once.

        What it reported or computed since then cannot be continued by another engine.
        """
        return self.num_cached is not None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def num_known(self) -> int:
        return len(self.token_ids) - self.num_unknown

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the answer is complete.

        The answer's last token is not among them: nothing follows it.
        """
        return len(self.token_ids) - self.is_answered - self.num_computed

    @property
    def is_answered(self) -> bool:
        """Whether its last token has been drawn, though the host may not know the token yet."""
        count = self.num_generated
        return count > 0 and count >= self.sampling.max_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is still to be computed."""
        return self.num_uncomputed == 1 and self.num_generated > 0

    @property
    def owes_rows(self) -> bool:
        """Whether prompt rows were requested and not all given yet. Until then it draws nothing."""
        return self.num_rows_given < len(self.prompt.token_ids)

    @property
    def uncomputed_items(self) -> Iterator[PromptItem]:
        """Items of the prompt that are not wholly in the cache, in order."""
        return (item for item in self.prompt.items if item.stop > self.num_computed)

    def end_of_ready(self, stop: int, is_ready: Callable[[PromptItem], bool]) -> int:
        """Return where a chunk that would end at ``stop`` has to end: before the first item whose output is missing."""
        for item in self.uncomputed_items:
            if item.start >= stop:
                break
            if not is_ready(item):
                return max(item.start, self.num_computed)
        return stop

    def end_of_whole_items(self, stop: int) -> int:
        """Return where a chunk that would end at ``stop`` has to end so that it divides no item that is joined."""
        if self.joins_items:
            for item in self.uncomputed_items:
                if item.start < stop < item.stop:
                    return max(item.start, self.num_computed)
        return stop

    @property
    def num_held(self) -> int:
        """Number of computed prompt positions whose rows are owed; their hidden states are held."""
        return max(0, min(self.num_computed, len(self.prompt.token_ids)) - self.num_rows_given)

    @property
    def must_wait_for_leader(self) -> bool:
        """Whether the leader still computes the prompt or owes rows of it."""
        leader = self.leader
        return (
            leader is not None
            and not leader.is_finished
            and (leader.num_computed < leader.num_prompt_tokens or leader.owes_rows)
        )

    @property
    def must_wait_for_grammar(self) -> bool:
        """Whether its grammar is still being compiled."""
        return self.grammar is not None and not self.grammar.is_compiled

    @property
    def awaits_mask(self) -> bool:
        """Whether it is unknown which tokens may come next: because of a token that the host has not read, or a thread."""
        grammar = self.grammar
        return grammar is not None and (self.num_unknown > 0 or grammar.mask is None)

    def await_token(self, row: int) -> int:
        """Expect the next token from row ``row`` of the latest draw; return the position to `learn` it at."""
        self.token_ids.append(UNKNOWN)
        self.num_unknown += 1
        self.draw_row = row
        return self.num_tokens - 1

    def learn(self, position: int, token_id: int) -> None:
        """Set the oldest unknown token, at ``position``, to ``token_id``."""
        self.token_ids[position] = token_id
        self.num_unknown -= 1
        if not self.num_unknown:
            self.draw_row = None
        for counts in (self.seen, self.generated):
            if counts is not None:
                counts.add(token_id)
