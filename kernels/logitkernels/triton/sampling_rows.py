"""Rows of sampling parameters as tensors, in one buffer that a single copy moves to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitkernels.sampling import GREEDY_ROW, RowSampling

SEEN = 1
BANNED = 2
"""Bits of ``edit_flags``."""

_FIELDS = {
    "seed": (torch.int64, "row"),
    "position": (torch.int64, "row"),
    "temperature": (torch.float32, "row"),
    "top_k": (torch.int32, "row"),
    "top_p": (torch.float32, "row"),
    "min_p": (torch.float32, "row"),
    "stream": (torch.int32, "row"),
    "repetition_penalty": (torch.float32, "row"),
    "presence_penalty": (torch.float32, "row"),
    "frequency_penalty": (torch.float32, "row"),
    "pending": (torch.int32, "row"),
    "shows_processed": (torch.int32, "row"),
    "edit_start": (torch.int32, "start"),
    "edit_ids": (torch.int32, "edit"),
    "edit_bias": (torch.float32, "edit"),
    "edit_counts": (torch.int32, "edit"),
    "edit_flags": (torch.int32, "edit"),
}
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}
_ALIGNMENT = (
    4  # int32 words: Triton compiles a kernel once more for a pointer that is not a multiple of 16 bytes
)


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """R rows of `RowSampling`, one entry each, and the entries of their logits that are edited before the draw.

    Row r owns the edits ``edit_start[r]:edit_start[r + 1]``, each id once. An edit is the effect of bias,
    bans, seen and generated tokens on one logit.

    Attributes:
        seed: int64 [R], the bits of the unsigned 64-bit seed.
        position: int64 [R].
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32 [R].
        top_k, stream: int32 [R].
        pending: int32 [R], an index into the tokens of the step before; -1 for none.
        shows_processed: int32 [R], 0 or 1.
        edit_start: int32 [R + 1].
        edit_ids: int32 [E].
        edit_bias: float32 [E], added to the logit.
        edit_counts: int32 [E], times generated.
        edit_flags: int32 [E], SEEN, BANNED or both.
    """

    seed: Tensor
    position: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    stream: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    pending: Tensor
    shows_processed: Tensor
    edit_start: Tensor
    edit_ids: Tensor
    edit_bias: Tensor
    edit_counts: Tensor
    edit_flags: Tensor


@dataclass(frozen=True, slots=True)
class SamplingLayout:
    """Layout of the fields of ``num_rows`` rows with up to ``num_edits`` edits in a buffer of int32 words."""

    num_rows: int
    num_edits: int

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Map of each field to its first word and the word after its last."""
        lengths = {"row": self.num_rows, "start": self.num_rows + 1, "edit": self.num_edits}
        spans, begin = {}, 0
        for name, (dtype, kind) in _FIELDS.items():
            end = begin + lengths[kind] * (dtype.itemsize // 4)
            spans[name] = (begin, end)
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        return spans

    @property
    def numel(self) -> int:
        return max(end for _, end in self.spans.values())

    @property
    def nbytes(self) -> int:
        return 4 * self.numel


def view(buffer: Tensor, layout: SamplingLayout) -> SamplingTensors:
    """Return the fields that ``pack`` wrote, as views of ``buffer`` (int32, contiguous, at least ``layout.numel``)."""
    return SamplingTensors(
        **{name: buffer[begin:end].view(_FIELDS[name][0]) for name, (begin, end) in layout.spans.items()}
    )


def pack(rows: Sequence[RowSampling], layout: SamplingLayout, out: NDArray[np.int32]) -> None:
    """Write ``rows`` into ``out`` (int32, contiguous, at least ``layout.numel``). Rows left over are greedy.

    Raises ValueError if there are more rows or edits than the layout has room for.
    """
    if len(rows) > layout.num_rows:
        raise ValueError(f"{len(rows)} rows do not fit into a layout of {layout.num_rows}")
    fields = {
        name: out[begin:end].view(_NUMPY[_FIELDS[name][0]]) for name, (begin, end) in layout.spans.items()
    }
    every = [*rows, *[GREEDY_ROW] * (layout.num_rows - len(rows))]
    fields["seed"].view(np.uint64)[:] = [row.seed for row in every]
    fields["stream"].view(np.uint32)[:] = [row.stream for row in every]
    fields["top_k"][:] = [min(row.top_k, 0x7FFFFFFF) for row in every]
    fields["pending"][:] = [-1 if row.pending is None else row.pending for row in every]
    for name in (
        "position",
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "shows_processed",
    ):
        fields[name][:] = [getattr(row, name) for row in every]
    used = 0
    fields["edit_start"][:] = 0
    for index, row in enumerate(rows):
        used += _pack_edits(row, fields, used)
        fields["edit_start"][index + 1] = used
    fields["edit_start"][len(rows) + 1 :] = used


def _pack_edits(row: RowSampling, fields: dict[str, NDArray[Any]], begin: int) -> int:
    """Write the row's edits from ``begin`` on and return their number."""
    sources = _edited_ids(row)
    if not sources:
        return 0
    ids = next(iter(sources.values()))
    if len(sources) > 1:
        ids = np.unique(np.concatenate(list(sources.values())))
    end = begin + len(ids)
    if end > len(fields["edit_ids"]):
        raise ValueError(
            f"the rows have more edits than the {len(fields['edit_ids'])} that the layout has room for"
        )
    edits = {name: fields[name][begin:end] for name in ("edit_ids", "edit_bias", "edit_counts", "edit_flags")}
    edits["edit_ids"][:] = ids
    for name in ("edit_bias", "edit_counts", "edit_flags"):
        edits[name][:] = 0
    # A single source need not be sorted or searched.
    where = {
        name: slice(None) if len(sources) == 1 else np.searchsorted(ids, source)
        for name, source in sources.items()
    }
    if row.bias:
        edits["edit_bias"][where["bias"]] = list(row.bias.values())
    if "generated" in where and row.counts is not None:
        edits["edit_counts"][where["generated"]] = row.counts
    if "seen" in where:
        edits["edit_flags"][where["seen"]] |= SEEN
    if "banned" in where:
        edits["edit_flags"][where["banned"]] |= BANNED
    return len(ids)


def _edited_ids(row: RowSampling) -> dict[str, NDArray[np.int64]]:
    """Map each kind of edit to the ids that it changes, each once; only kinds that have an effect."""
    sources = {}
    if row.bias:
        sources["bias"] = np.fromiter(row.bias, dtype=np.int64, count=len(row.bias))
    if row.banned:
        sources["banned"] = np.array(sorted(set(row.banned)), dtype=np.int64)
    if row.seen is not None and row.repetition_penalty != 1:
        sources["seen"] = row.seen
    if row.generated is not None and (row.presence_penalty or row.frequency_penalty):
        sources["generated"] = row.generated
    return {name: ids for name, ids in sources.items() if len(ids)}
