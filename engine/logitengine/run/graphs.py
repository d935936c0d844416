"""Decode steps recorded for bucketed sizes: model, head and sampling as one replay.

A step in which every sequence computes one token has the same shape as the next one, but for how many sequences there
are, how long their block tables are and how many edits (biases, penalties) their sampling has. Each of the three is
rounded up to a bucket, the inputs are copied into the bucket's own buffer, and what was recorded for it is replayed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from logitkernels import Kernels
from logitkernels.sampling import PackedRows, RowSampling
from torch import Tensor

from logitengine.run.batch import Batch
from logitengine.run.devices import Device
from logitengine.run.staging import Layout

SMALLEST_TABLE = 64
"""Blocks; larger tables are four times as long each."""

FEWEST_EDITS = 64
"""Of a batch; larger buckets have room for four times as many each."""

Size = tuple[int, int, int]
"""Sequences, blocks of a table, edits."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A bucket: where its inputs go, what launches it, and what it leaves behind."""

    layout: Layout
    inputs: Tensor
    replay: Callable[[], None]
    outputs: dict[str, Tensor]


class DecodeGraphs:
    """``run`` replays a decode batch; what is missing is recorded first.

    ``compute(tensors, sampling, max_seq_len)`` launches a step on a batch's arrays and gives named output tensors.
    ``last_tokens`` is what it draws into.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        compute: Callable[[dict[str, Tensor], PackedRows, int], dict[str, Tensor]],
        *,
        last_tokens: Tensor,
        block_size: int,
        max_table: int,
    ) -> None:
        self._device = device
        self._kernels = kernels
        self._compute = compute
        self._last_tokens = last_tokens
        self._block_size = block_size
        self._rows = row_buckets(len(last_tokens))
        self._max_table = max_table
        self._recorded: dict[Size, _Recorded] = {}

    def run(self, batch: Batch, rows: Sequence[RowSampling]) -> dict[str, Tensor]:
        """The outputs of the batch, each cut to its own rows. They hold until the next run."""
        size = self._size_of(batch, rows)
        num_rows, num_blocks, num_edits = size
        arrays = {
            **batch.padded(num_rows, num_blocks),
            "sampling": self._kernels.pack_sampling(rows, num_rows, num_edits),
        }
        recorded = self._recorded.get(size) or self._record(size)
        staged = self._device.host_buffer(recorded.layout.nbytes)
        recorded.layout.pack(arrays, staged)
        recorded.inputs.copy_(staged, non_blocking=True)
        recorded.replay()
        return {name: output[: len(rows)] for name, output in recorded.outputs.items()}

    def _size_of(self, batch: Batch, rows: Sequence[RowSampling]) -> Size:
        table = batch.arrays["block_tables"].shape[1]
        return (
            self._rows[bisect_left(self._rows, len(rows))],
            min(_power_of_four(table, SMALLEST_TABLE), self._max_table),
            _power_of_four(sum(row.num_edits for row in rows), FEWEST_EDITS),
        )

    def record_all(self) -> None:
        """Record every number of sequences, with short tables and few edits."""
        for num_rows in self._rows:
            size = (num_rows, min(SMALLEST_TABLE, self._max_table), FEWEST_EDITS)
            if size not in self._recorded:
                self._record(size)

    def _record(self, size: Size) -> _Recorded:
        """Record on a batch of padding alone: it stores nothing, and what it draws is put back."""
        num_rows, num_blocks, num_edits = size
        arrays = {
            **Batch.padding(num_rows, num_blocks),
            "sampling": self._kernels.pack_sampling([], num_rows, num_edits),
        }
        layout = Layout(arrays)
        staged = self._device.host_buffer(layout.nbytes)
        layout.pack(arrays, staged)
        inputs = staged.to(self._device.torch_device, copy=True)
        tensors = layout.views(inputs)
        sampling = PackedRows(tensors["sampling"], num_rows, num_edits)
        outputs: dict[str, Tensor] = {}

        def step() -> None:
            outputs.update(self._compute(tensors, sampling, num_blocks * self._block_size))

        drawn = self._last_tokens.clone()
        replay = self._device.capture(step)
        self._last_tokens.copy_(drawn)
        self._recorded[size] = _Recorded(layout, inputs, replay, outputs)
        return self._recorded[size]


def row_buckets(most: int) -> list[int]:
    """Batch sizes that are recorded: close together where a wasted row costs most, and ``most`` itself."""
    steps = [1, 2, 4, 8, *range(16, 256, 16), *range(256, most + 1, 64)]
    return [*(rows for rows in steps if rows < most), most]


def _power_of_four(count: int, smallest: int) -> int:
    """The smallest of ``smallest``, 4 ``smallest``, 16 ``smallest``, ... that is at least ``count``."""
    while smallest < count:
        smallest *= 4
    return smallest
