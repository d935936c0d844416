"""One choice of one request: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from logitengine.link.messages import GenerationRequest, OutputSpec, SamplingParams
from logitengine.schedule.prompt import Prompt, root_digest
from logitengine.schedule.token_counts import TokenCounts

UNKNOWN = 0
"""Stands in ``token_ids`` for a token that the host has not read yet; a valid id, since nothing may look at it."""


class SequenceState(Enum):
    """Where a sequence is in its life. Waiting for a leader is no state: it is derived from the leader."""

    WAITING = "waiting"
    """For its place among those that run. It still has its blocks if it was parked and nobody needed them."""
    RUNNING = "running"
    PARKED = "parked"
    """Its reader lags. It keeps its blocks until somebody needs them, and is computed again later if so."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and counters; everything else is derived from them.

    Attributes:
        arrival: order of arrival; older sequences are served first and preempted last.
        leader: the first choice of the same request; the others wait for its prefill, then share its blocks.
        row_nbytes: bytes that the reader gets for each prompt row; 0 where nothing travels.
        window_bytes: the request's own bound on unread outputs; None: the engine's.
        token_ids: the prompt, then what was generated; the newest ``num_unknown`` of them are placeholders for tokens that
            steps under way have drawn.
        draw_row: the newest token's row in the latest draw while the host does not know it, else None.
        block_table: physical KV blocks, in order.
        num_computed: tokens whose keys and values are in the cache, or will be before a step that is scheduled now.
        num_cached: prompt tokens that the prefix cache gave at the first admission; None before it.
        idle_since: when it was last parked, by the scheduler's clock.
        num_rows_given: prompt positions up to which no row is owed: given, or never asked for.
        seen, generated: the tokens of the whole sequence and of the answer, counted, where a penalty needs them.
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
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_unknown: int = 0
    draw_row: int | None = None
    num_computed: int = 0
    num_cached: int | None = None
    idle_since: float = 0.0
    num_rows_given: int = field(init=False)
    seen: TokenCounts | None = field(init=False, default=None)
    generated: TokenCounts | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt.token_ids)
        # Choice 0 carries prompt rows for all choices.
        count = len(self.prompt)
        self.num_rows_given = count if self.index else self.outputs.first_prompt_row(count)
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
    ) -> Sequence:
        """Choice ``index`` of a request."""
        return cls(
            request_id=request.request_id,
            index=index,
            arrival=arrival,
            prompt=Prompt(request.prompt_token_ids, root=root_digest(cache_salt=request.cache_salt)),
            sampling=request.sampling,
            outputs=request.outputs,
            leader=leader,
            row_nbytes=row_nbytes,
            window_bytes=request.window_bytes,
        )

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def has_begun(self) -> bool:
        """It was admitted once; what it was told or computed since cannot be done by another engine."""
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
        """Tokens to compute before the answer is whole: not its last one, from which nothing is drawn."""
        return len(self.token_ids) - self.is_answered - self.num_computed

    @property
    def is_answered(self) -> bool:
        """Its last token has been drawn, though the host may not know it yet."""
        count = self.num_generated
        return count > 0 and count >= self.sampling.max_tokens

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is still to be computed."""
        return self.num_uncomputed == 1 and self.num_generated > 0

    @property
    def owes_rows(self) -> bool:
        """Prompt rows were asked for and not given yet. Until then it draws nothing."""
        return self.num_rows_given < len(self.prompt.token_ids)

    @property
    def num_held(self) -> int:
        """Prompt positions that were computed and whose rows are owed: their hidden states are held."""
        return max(0, min(self.num_computed, len(self.prompt.token_ids)) - self.num_rows_given)

    @property
    def must_wait_for_leader(self) -> bool:
        """Its prompt is being computed by the leader, or rows of that prompt have not all been given."""
        leader = self.leader
        return (
            leader is not None
            and not leader.is_finished
            and (leader.num_computed < leader.num_prompt_tokens or leader.owes_rows)
        )

    def await_token(self, row: int) -> int:
        """Row ``row`` of the latest draw gives the next token; returns the position to `learn` it at."""
        self.token_ids.append(UNKNOWN)
        self.num_unknown += 1
        self.draw_row = row
        return self.num_tokens - 1

    def learn(self, position: int, token_id: int) -> None:
        """The oldest unknown token, at ``position``, is ``token_id``."""
        self.token_ids[position] = token_id
        self.num_unknown -= 1
        if not self.num_unknown:
            self.draw_row = None
        for counts in (self.seen, self.generated):
            if counts is not None:
                counts.add(token_id)
