"""From raw logits to tokens: the reference, in torch.

Every row is treated by itself: its bits depend on its own logits, parameters, seed and position, and on nothing else
in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_CANDIDATES = 1024
"""Entries of a row that top-p and min-p look at before they sort all of it."""

NOT_FINITE = -1
NOTHING_ALLOWED = -2

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row is turned into a token.

    Attributes:
        temperature: 0 takes the largest score.
        bias: {token id: number added to its logit}.
        banned: token ids that must not be drawn.
        seen: int64 ids of the prompt and of the generated tokens, each once (repetition penalty), or None.
        generated, counts: int64 ids of the generated tokens, each once, and how often (presence, frequency), or None.
        seed, stream, position: the counter of the draw; see `philox_uniform`.
        pending: where the sequence's newest token lies among the tokens drawn in the step before, when the host does not
            know it yet; it counts as seen and generated once more than the fields above say. Only told where a penalty
            needs it.
        shows_processed: whether the processed scores were asked for.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stream: int
    position: int
    bias: dict[int, float] | None = None
    banned: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seen: Tensor | None = None
    generated: Tensor | None = None
    counts: Tensor | None = None
    pending: int | None = None
    shows_processed: bool = False

    @property
    def edits_logits(self) -> bool:
        """Whether bias, penalties or bans may change an entry."""
        return bool(
            self.bias
            or self.banned
            or self.seen is not None
            or self.generated is not None
            or self.pending is not None
        )

    @property
    def is_plain_argmax(self) -> bool:
        """Greedy over the raw logits themselves."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def num_edits(self) -> int:
        """At least as many as the entries that bias, bans and penalties change."""
        ids = (self.bias or (), self.banned, *(ids for ids in (self.seen, self.generated) if ids is not None))
        return sum(len(group) for group in ids)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """``num_rows`` rows with room for ``num_edits`` edits in one int32 tensor on the device; see `Kernels.pack_sampling`."""

    buffer: Tensor
    num_rows: int
    num_edits: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn for R rows.

    Attributes:
        token_ids: int32 [R]; -1 where there is no distribution to draw from: the row holds a NaN, or nothing above -inf is
            left, or an inf at a temperature above 0.
        processed: float32 [R, V], defined for the rows that show it and have a token; None if none shows it.
    """

    token_ids: Tensor
    processed: Tensor | None


def sample_rows(logits: Tensor, rows: Sequence[RowSampling], last_tokens: Tensor | None = None) -> Sampled:
    """Draw for each row of ``logits`` (float32 [R, V], left as they are): what every backend is compared with."""
    largest, argmax = logits.max(dim=-1)
    token_ids = torch.where(largest > -torch.inf, argmax, -1).tolist()
    processed = torch.empty_like(logits) if any(row.shows_processed for row in rows) else None
    for index, row in enumerate(rows):
        if token_ids[index] < 0 or (row.is_plain_argmax and not row.shows_processed):
            continue
        scores = process_logits(logits[index], with_pending(row, last_tokens))
        token_ids[index] = draw(scores, row) if scores.max().isfinite() else -1
        if processed is not None:
            processed[index] = scores
    return Sampled(torch.tensor(token_ids, dtype=torch.int32), processed)


def with_pending(row: RowSampling, last_tokens: Tensor | None) -> RowSampling:
    """The row with the token that was drawn in the step before among its seen and generated ones."""
    if row.pending is None:
        return row
    if last_tokens is None:
        raise ValueError("a row's newest token is pending, but no tokens of the step before are given")
    token = last_tokens[row.pending].long().reshape(1)
    if token < 0:  # that row had no distribution, and ended
        return replace(row, pending=None)
    nothing = token[:0]
    seen = torch.cat((nothing if row.seen is None else row.seen, token)).unique()
    generated, counts = (nothing if ids is None else ids for ids in (row.generated, row.counts))
    ids, index = torch.cat((generated, token)).unique(return_inverse=True)
    totals = torch.zeros_like(ids).index_add(0, index, torch.cat((counts, torch.ones_like(token))))
    return replace(row, seen=seen, generated=ids, counts=totals, pending=None)


def process_logits(logits: Tensor, row: RowSampling) -> Tensor:
    """The scores that the row's token is drawn from: float32 [V] -> a new float32 [V], -inf where filtered.

    Order: bias, repetition penalty (Keskar et al. 2019, "CTRL"), presence and frequency penalties (as OpenAI defines
    them), bans, temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). Ties at a filter's edge
    go to the lower id. At temperature 0 the result is a point mass: 0 for the largest score, -inf elsewhere
    (everywhere if nothing is left to choose from).
    """
    scores = edit_logits(logits, row)
    if row.temperature == 0:
        best = torch.argmax(scores)
        point = torch.full_like(scores, -torch.inf)
        if scores[best] > -torch.inf:
            point[best] = 0.0
        return point
    scores /= row.temperature
    return _filter(scores, row)


def edit_logits(logits: Tensor, row: RowSampling) -> Tensor:
    """Bias, penalties and bans: float32 [V] -> a new float32 [V]."""
    scores = logits.clone()
    if row.bias:
        ids = torch.tensor(list(row.bias), device=scores.device)
        scores[ids] += torch.tensor(list(row.bias.values()), dtype=scores.dtype, device=scores.device)
    if row.seen is not None:
        picked = scores[row.seen]
        penalty = row.repetition_penalty
        scores[row.seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    if row.generated is not None and row.counts is not None:
        scores[row.generated] -= row.presence_penalty + row.frequency_penalty * row.counts.to(scores.dtype)
    if row.banned:
        scores[list(row.banned)] = -torch.inf
    return scores


def _filter(scores: Tensor, row: RowSampling) -> Tensor:
    if not (row.top_k or row.top_p < 1 or row.min_p > 0):
        return scores
    vocab = scores.shape[0]
    size = min(row.top_k or NUM_CANDIDATES, vocab)
    while True:
        kept = _nucleus(scores, row, size)
        if kept is not None:
            break
        size = min(size * 8, vocab)
    filtered = torch.full_like(scores, -torch.inf)
    filtered[kept] = scores[kept]
    return filtered


def _nucleus(scores: Tensor, row: RowSampling, size: int) -> Tensor | None:
    """Ids kept by top-k, top-p and min-p if the ``size`` largest scores decide it, else None."""
    ids = _largest(scores, size)
    top = scores[ids]
    decided = size == scores.shape[0] or bool(row.top_k)
    # top-k renormalises over what it kept; otherwise masses are of the whole row.
    log_mass = torch.log_softmax(top if row.top_k else scores, dim=-1)
    mass = (log_mass if row.top_k else log_mass[ids]).double().exp()
    keep = torch.ones_like(mass, dtype=torch.bool)
    if row.top_p < 1:
        before = mass.cumsum(-1) - mass
        keep &= before < row.top_p
        keep[0] = True
        decided = decided or not bool(keep[-1])
    if row.min_p > 0:
        keep &= mass >= row.min_p * mass[0]
        decided = decided or not bool(keep[-1])
    return ids[keep] if decided else None


def _largest(scores: Tensor, size: int) -> Tensor:
    """Ids of the ``size`` largest scores, in descending order, ties by lower id."""
    threshold = torch.topk(scores, size).values[-1]
    candidates = torch.nonzero(scores >= threshold).squeeze(-1)
    return candidates[torch.sort(scores[candidates], descending=True, stable=True).indices[:size]]


def draw(processed: Tensor, row: RowSampling) -> int:
    """The token that the row's counter picks from its processed scores [V]: the inverse of the cumulative
    distribution, in order of id, at one uniform number."""
    if row.temperature == 0:
        return int(torch.argmax(processed))
    mass = torch.softmax(processed, dim=-1).double().cumsum(-1)
    target = philox_uniform(row.seed, row.stream, row.position) * float(mass[-1])
    index = int(torch.searchsorted(mass, torch.tensor(target, dtype=torch.float64), right=True))
    return min(index, processed.shape[0] - 1)


def philox_uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) from the counter (position, stream) under the key ``seed`` (64 bits).

    Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). A draw needs no state, so it
    cannot depend on what else was drawn.
    """
    words = philox4x32((position & 0xFFFFFFFF, position >> 32, stream, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return float((words[0] << 32 | words[1]) >> 11) / 2.0**53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 on a counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    key_0, key_1 = key
    for _ in range(_PHILOX_ROUNDS):
        product_0, product_1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1 = (product_1 >> 32) ^ c1 ^ key_0, product_1 & _LOW_32
        c2, c3 = (product_0 >> 32) ^ c3 ^ key_1, product_0 & _LOW_32
        key_0, key_1 = (key_0 + _PHILOX_KEY_STEPS[0]) & _LOW_32, (key_1 + _PHILOX_KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3
