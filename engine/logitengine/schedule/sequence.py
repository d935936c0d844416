"""One choice of one request as the scheduler sees it: tokens, blocks and counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams

UNKNOWN = 0
"""Stands in ``token_ids`` for a token that the host has not read yet; a valid id, since nothing may look at it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """State is tokens and counters; everything else is derived from them.

    Attributes:
        arrival: order of arrival; older sequences are served first and preempted last.
        leader: the first choice of the same request; the others wait for its prefill, then share its blocks.
        token_ids: the prompt, then what was generated; the newest ``num_unknown`` of them are placeholders for tokens that
            steps under way have drawn.
        draw_row: the newest token's row in the latest draw while the host does not know it, else None.
        block_table: physical KV blocks, in order.
        num_computed: tokens whose keys and values are in the cache, or will be before a step that is scheduled now.
        num_cached: prompt tokens that the prefix cache gave at the first admission.
        num_prompt_rows_sent: prompt rows already handed out; a preempted sequence computes them again but never sends
            them twice.
        pooled: what the reporter has pooled of the prompt's hidden states so far.
    """

    request: GenerationRequest
    index: int
    arrival: int
    leader: Sequence | None = None
    token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_unknown: int = 0
    draw_row: int | None = None
    num_computed: int = 0
    num_cached: int = 0
    num_prompt_rows_sent: int = 0
    pooled: Any = None
    admitted_once: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def logits_spec(self) -> LogitsSpec | None:
        return self.request.logits

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_known(self) -> int:
        return self.num_tokens - self.num_unknown

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the answer is whole: not its last one, from which nothing is drawn."""
        return self.num_tokens - self.is_answered - self.num_computed

    @property
    def is_answered(self) -> bool:
        """Its last token has been drawn, though the host may not know it yet."""
        return self.num_generated > 0 and self.num_generated >= self.sampling.max_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """As far as the host knows them."""
        return self.token_ids[self.num_prompt_tokens : self.num_known]

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

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is still to be computed."""
        return self.num_uncomputed == 1 and self.num_generated > 0

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether prompt rows were asked for and are still owed. Choice 0 carries them for all choices."""
        if self.index != 0 or self.num_prompt_rows_sent == self.num_prompt_tokens:
            return False
        return self.request.wants_prompt_rows

    @property
    def must_wait_for_leader(self) -> bool:
        leader = self.leader
        return leader is not None and not leader.finished and leader.num_computed < leader.num_prompt_tokens
