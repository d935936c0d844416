"""Sampling in torch, the reference for every backend. It runs on the device of the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitkernels.philox import philox_uniform
from logitkernels.sampling import (
    GREEDY_ROW,
    NOT_FINITE,
    NOTHING_ALLOWED,
    PreparedSampling,
    RowSampling,
    Sampled,
    SamplingSize,
    check_masks,
    pad_masks,
    unpack_mask,
)

NUM_CANDIDATES = 1024
"""Entries of a row that top-p and min-p examine before they sort the whole row."""


class HostSampling(PreparedSampling):
    """Rows that are read on the host and drawn by the reference."""

    def __init__(
        self,
        rows: Sequence[RowSampling],
        vocab_size: int,
        allowed: NDArray[np.int32] | None,
        size: SamplingSize | None,
    ) -> None:
        check_masks(allowed, len(rows), vocab_size)
        if size is not None:
            size.check_fits(rows, allowed)
            missing = size.num_rows - len(rows)
            rows = [*rows, *[GREEDY_ROW] * missing]
            allowed = None if allowed is None else pad_masks(allowed, size.num_rows)
        self.arrays = {}
        self._rows = rows
        self._vocab_size = vocab_size
        self._allowed = allowed

    def draw(
        self,
        logits: Tensor,
        tensors: Mapping[str, Tensor],  # noqa: ARG002 - the rows are on the host
        last_tokens: Tensor | None = None,
    ) -> Sampled:
        self._check(logits)
        return sample_rows(logits, self._rows, last_tokens, self._allowed)

    def _check(self, logits: Tensor) -> None:
        """Raise ValueError for logits whose shape differs from the prepared one."""
        if logits.shape != (len(self._rows), self._vocab_size):
            raise ValueError(
                f"logits are {list(logits.shape)}; {len(self._rows)} rows of {self._vocab_size} were prepared"
            )


def sample_rows(
    logits: Tensor,
    rows: Sequence[RowSampling],
    last_tokens: Tensor | None = None,
    allowed: NDArray[np.int32] | None = None,
) -> Sampled:
    """Draw a token for each row of ``logits`` (float32 [R, V], left unchanged). The reference for every backend.

    ``allowed`` int32 [R, ceil(V / 32)] are the rows' masks; see `Kernels.prepare_sampling`.
    """
    largest, argmax = logits.max(dim=-1)
    peaks: list[float] = largest.tolist()
    token_ids: list[int] = argmax.tolist()
    processed = torch.empty_like(logits) if any(row.shows_processed for row in rows) else None
    for index, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        mask = None if allowed is None else allowed[index]
        if not peak > -math.inf:
            token_ids[index] = NOT_FINITE
        elif not row.is_plain_argmax or row.shows_processed or mask is not None:
            edited = edit_logits(logits[index], with_pending(row, last_tokens), mask)
            token_ids[index], scores = _sample_row(edited, row, peak)
            if processed is not None and scores is not None:
                processed[index] = scores
    return Sampled(torch.tensor(token_ids, dtype=torch.int32, device=logits.device), processed)


def _sample_row(edited: Tensor, row: RowSampling, peak: float) -> tuple[int, Tensor | None]:
    """Return the token and the processed logits of a row of edited logits [V].

    ``peak`` is the largest raw logit, above -inf. The processed logits are None where nothing can be drawn.
    """
    largest = float(edited.max())
    if largest == -math.inf:
        is_finite = peak < math.inf or row.temperature == 0
        return NOTHING_ALLOWED if is_finite else NOT_FINITE, None
    if math.isnan(largest):
        return NOT_FINITE, None
    scores = _filtered(edited, row)
    return (draw(scores, row), scores) if scores.max().isfinite() else (NOT_FINITE, None)


def with_pending(row: RowSampling, last_tokens: Tensor | None) -> RowSampling:
    """Return the row with the token of the step before counted among its seen and generated ones."""
    if row.pending is None:
        return row
    if last_tokens is None:
        raise ValueError("a row's newest token is pending, but no tokens of the step before are given")
    token = int(last_tokens[row.pending])
    if token < 0:  # nothing could be drawn for that row, and it ended
        return replace(row, pending=None)
    nothing = np.empty(0, dtype=np.int64)
    seen, generated, counts = (
        nothing if ids is None else ids for ids in (row.seen, row.generated, row.counts)
    )
    if not (seen == token).any():
        seen = np.append(seen, token)
    is_token = generated == token
    if is_token.any():
        counts = counts + is_token
    else:
        generated, counts = np.append(generated, token), np.append(counts, 1)
    return replace(row, seen=seen, generated=generated, counts=counts, pending=None)


def process_logits(logits: Tensor, row: RowSampling, allowed: NDArray[np.int32] | None = None) -> Tensor:
    """Return the processed logits that the row's token is drawn from: float32 [V] -> another float32 [V].

    Filtered entries are -inf. Order: bias, repetition penalty (Keskar et al. 2019, "CTRL"), presence and
    frequency penalties (as OpenAI defines them), bans and the mask ``allowed`` int32 [ceil(V / 32)],
    temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). Ties at a filter's edge go
    to the lower id. At temperature 0 the result is a point mass: 0 for the largest entry and -inf elsewhere
    (everywhere if no entry is above -inf).
    """
    return _filtered(edit_logits(logits, row, allowed), row)


def edit_logits(logits: Tensor, row: RowSampling, allowed: NDArray[np.int32] | None = None) -> Tensor:
    """Apply bias, penalties, bans and the mask: float32 [V] -> another float32 [V]."""
    scores, device = logits.clone(), logits.device
    if row.bias:
        ids = torch.tensor(list(row.bias), device=device)
        scores[ids] += torch.tensor(list(row.bias.values()), dtype=scores.dtype, device=device)
    if row.seen is not None:
        seen = torch.from_numpy(row.seen).to(device)
        picked = scores[seen]
        penalty = row.repetition_penalty
        scores[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    if row.generated is not None and row.counts is not None:
        counts = torch.from_numpy(row.counts).to(device, scores.dtype)
        generated = torch.from_numpy(row.generated).to(device)
        scores[generated] -= row.presence_penalty + row.frequency_penalty * counts
    if row.banned:
        scores[torch.tensor(row.banned, device=device)] = -torch.inf
    if allowed is not None:
        is_allowed = torch.from_numpy(unpack_mask(allowed, len(scores))).to(device)
        scores.masked_fill_(~is_allowed, -torch.inf)
    return scores


def _filtered(edited: Tensor, row: RowSampling) -> Tensor:
    """Apply temperature and filters to edited logits [V], which may be overwritten."""
    if row.temperature == 0:
        best = torch.argmax(edited)
        point = torch.full_like(edited, -torch.inf)
        if edited[best] > -torch.inf:
            point[best] = 0.0
        return point
    edited /= row.temperature
    return _filter(edited, row)


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
    """Return the ids kept by top-k, top-p and min-p if the ``size`` largest entries decide them, else None."""
    ids = _largest(scores, size)
    top = scores[ids]
    decided = size == scores.shape[0] or bool(row.top_k)
    # top-k renormalises over what it keeps; otherwise masses are relative to the whole row.
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
    """Return ids of the ``size`` largest entries, in descending order, ties by lower id."""
    threshold = torch.topk(scores, size).values[-1]
    candidates = torch.nonzero(scores >= threshold).squeeze(-1)
    return candidates[torch.sort(scores[candidates], descending=True, stable=True).indices[:size]]


def draw(processed: Tensor, row: RowSampling) -> int:
    """Return the token that the row's counter picks from its processed logits [V].

    It inverts the cumulative distribution, in order of id, at one uniform number.
    """
    if row.temperature == 0:
        return int(torch.argmax(processed))
    mass = torch.softmax(processed, dim=-1).double().cumsum(-1)
    target = philox_uniform(row.seed, row.stream, row.position) * float(mass[-1])
    found = torch.searchsorted(
        mass, torch.tensor(target, dtype=torch.float64, device=mass.device), right=True
    )
    index = int(found)
    return min(index, processed.shape[0] - 1)
