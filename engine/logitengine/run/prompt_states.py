"""States of prompts that are kept from one step to the next, by sequence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from logitengine.link.messages import Pooling
from logitengine.run.devices import Device
from logitengine.schedule.sequence import Sequence


class HeldStates:
    """Last hidden states of prompt positions whose rows are owed, in one pool.

    The scheduler bounds how many are held; the pool grows to the largest number so far. States are copied
    into the pool, so they may come from a buffer that the next step overwrites.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool: Tensor | None = None
        self._free: list[int] = []
        self._places: dict[Sequence, list[int]] = {}

    def put(self, sequence: Sequence, states: Tensor) -> None:
        """Hold ``states`` [rows, H] after the states that the sequence already has."""
        pool = self._with_room_for(states)
        places = [self._free.pop() for _ in range(len(states))]
        self._places.setdefault(sequence, []).extend(places)
        pool.index_copy_(0, self._on_device(places), states)

    def _with_room_for(self, states: Tensor) -> Tensor:
        size = 0 if self._pool is None else len(self._pool)
        missing = len(states) - len(self._free)
        if self._pool is None or missing > 0:
            grown = states.new_empty(max(size + missing, 2 * size), states.shape[1])
            if self._pool is not None:
                grown[:size] = self._pool
            self._free += range(size, len(grown))
            self._pool = grown
        return self._pool

    def take(self, sequence: Sequence, count: int) -> Tensor:
        """Return the first ``count`` held states of the sequence [count, H], and hold them no longer."""
        assert self._pool is not None  # noqa: S101 - something was put in
        places = self._places[sequence][:count]
        del self._places[sequence][:count]
        self._free += places
        return self._pool.index_select(0, self._on_device(places))

    def drop(self, sequence: Sequence) -> None:
        self._free += self._places.pop(sequence, ())

    @property
    def num_held(self) -> int:
        return sum(map(len, self._places.values()))

    def _on_device(self, places: list[int]) -> Tensor:
        return self._device.upload({"places": np.array(places, dtype=np.int64)})["places"]


class PooledStates:
    """Pooled state of each sequence's prompt rows so far."""

    def __init__(self) -> None:
        self._pooled: dict[Sequence, Tensor] = {}

    def add(self, sequence: Sequence, pooling: Pooling, states: Tensor) -> None:
        """Add the hidden states [rows, H] of the next prompt rows.

        The mean is summed in float64, one row after the other, so that its bits do not depend on the
        chunking.
        """
        before = self._pooled.get(sequence)
        if pooling == "last":
            self._pooled[sequence] = states[-1].clone()
        elif pooling == "cls":
            self._pooled[sequence] = states[0].clone() if before is None else before
        else:
            zero = states.new_zeros(states.shape[1], dtype=torch.float64)
            carried = (zero if before is None else before)[None]
            self._pooled[sequence] = torch.cat((carried, states.double())).cumsum(0)[-1]

    def pop(self, sequence: Sequence, pooling: Pooling) -> Tensor:
        """Return the pooled prompt, float32 [H], once every row that it needs was added."""
        pooled = self._pooled.pop(sequence)
        return (pooled / sequence.num_prompt_tokens if pooling == "mean" else pooled).to(torch.float32)

    def drop(self, sequence: Sequence) -> None:
        self._pooled.pop(sequence, None)
