"""Decode steps recorded for bucketed sizes: model, head and sampling as one replay.

Steps in which every sequence computes one token differ in four sizes only: the number of sequences, the
length of their block tables, the number of sampling edits (biases, penalties), and whether there are masks.
Each is rounded up to a bucket. The inputs are copied into the bucket's own buffer, and the bucket's recording
is replayed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from logitkernels import Kernels
from logitkernels.sampling import PreparedSampling, RowSampling, SamplingSize
from numpy.typing import NDArray
from torch import Tensor

from logitengine.run.batch import Batch
from logitengine.run.devices import Device
from logitengine.run.staging import Layout

SMALLEST_TABLE = 64
"""Blocks of the smallest bucket's tables; the tables of each larger bucket are four times as long."""

FEWEST_EDITS = 64
"""Edits of a batch that the smallest bucket holds; each larger bucket holds four times as many."""

MOST_LATE = 48
"""Sizes that may be recorded while requests wait. Beyond that, a size without a recording is launched directly."""

Size = tuple[int, int, int, bool]
"""Number of sequences, blocks of a table, edits, and whether there are masks."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A bucket: its input buffer and layout, its launch function, and its outputs."""

    layout: Layout
    inputs: Tensor
    replay: Callable[[], None]
    outputs: dict[str, Tensor]


class DecodeGraphs:
    """Recorded decode steps. ``run`` replays a batch and records a missing size first, up to `MOST_LATE` times.

    ``compute(tensors, sampling, max_seq_len)`` launches a step on a batch's arrays and returns named output
    tensors. ``last_tokens`` is the tensor that it draws into.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        compute: Callable[[dict[str, Tensor], PreparedSampling, int], dict[str, Tensor]],
        *,
        last_tokens: Tensor,
        vocab_size: int,
        block_size: int,
        max_table: int,
    ) -> None:
        self._device = device
        self._kernels = kernels
        self._compute = compute
        self._last_tokens = last_tokens
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._rows = row_buckets(len(last_tokens))
        self._max_table = max_table
        self._recorded: dict[Size, _Recorded] = {}
        self._num_late = 0

    def run(
        self, batch: Batch, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None = None
    ) -> dict[str, Tensor] | None:
        """Return the outputs of the batch, each cut to its own rows. They are valid until the next run.

        Returns None, and launches nothing, if the batch's size is not recorded and no more sizes may be.
        """
        size = self._size_of(batch, rows, allowed)
        if size not in self._recorded and self._num_late >= MOST_LATE:
            return None
        num_rows, num_blocks, _, _ = size
        arrays = {
            **batch.padded(num_rows, num_blocks),
            **self._prepare(rows, size, allowed).arrays,
        }
        if size not in self._recorded:
            self._num_late += 1
            self._record(size)
        recorded = self._recorded[size]
        staged = self._device.host_buffer(recorded.layout.nbytes)
        recorded.layout.pack(arrays, staged)
        recorded.inputs.copy_(staged, non_blocking=True)
        recorded.replay()
        return {name: output[: len(rows)] for name, output in recorded.outputs.items()}

    def _prepare(
        self, rows: Sequence[RowSampling], size: Size, allowed: NDArray[np.int32] | None = None
    ) -> PreparedSampling:
        num_rows, _, num_edits, has_masks = size
        return self._kernels.prepare_sampling(
            rows, self._vocab_size, allowed=allowed, size=SamplingSize(num_rows, num_edits, has_masks)
        )

    def _size_of(
        self, batch: Batch, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None = None
    ) -> Size:
        table = batch.arrays["block_tables"].shape[1]
        return (
            self._rows[bisect_left(self._rows, len(rows))],
            min(_power_of_four(table, SMALLEST_TABLE), self._max_table),
            _power_of_four(sum(row.num_edits for row in rows), FEWEST_EDITS),
            allowed is not None,
        )

    def record_all(self) -> None:
        """Record every number of sequences, with short tables, few edits and no masks.

        Masks would double the time and memory of it, and many servers see none. The first step with masks of each number
        of sequences is recorded when it comes, like that with longer tables: it waits for the recording once.
        """
        for num_rows in self._rows:
            size = (num_rows, min(SMALLEST_TABLE, self._max_table), FEWEST_EDITS, False)
            if size not in self._recorded:
                self._record(size)

    def _record(self, size: Size) -> None:
        """Record on a batch of padding alone. It stores nothing, and the tokens that it overwrites are restored."""
        num_rows, num_blocks, _, _ = size
        sampling = self._prepare([], size)
        arrays = {**Batch.padding(num_rows, num_blocks), **sampling.arrays}
        layout = Layout(arrays)
        staged = self._device.host_buffer(layout.nbytes)
        layout.pack(arrays, staged)
        inputs = staged.to(self._device.torch_device, copy=True)
        tensors = layout.views(inputs)
        outputs: dict[str, Tensor] = {}

        def step() -> None:
            outputs.update(self._compute(tensors, sampling, num_blocks * self._block_size))

        drawn = self._last_tokens.clone()
        replay = self._device.capture(step)
        self._last_tokens.copy_(drawn)
        self._recorded[size] = _Recorded(layout, inputs, replay, outputs)


def row_buckets(most: int) -> list[int]:
    """Return the batch sizes that are recorded: close together where a wasted row costs most, and ``most`` itself."""
    steps = [1, 2, 4, 8, *range(16, 256, 16), *range(256, most + 1, 64)]
    return [*(rows for rows in steps if rows < most), most]


def _power_of_four(count: int, smallest: int) -> int:
    """Return the smallest of ``smallest``, 4 ``smallest``, 16 ``smallest``, ... that is at least ``count``."""
    while smallest < count:
        smallest *= 4
    return smallest
