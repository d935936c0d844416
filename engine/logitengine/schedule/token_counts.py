"""Distinct tokens of a growing list, for penalties. They are updated token by token and never recounted."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Each token id once, and how often it occurred.

    ``ids`` and ``counts`` are int64 [distinct ids] in order of first occurrence; they are valid until the next `add`.
    """

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(16, dtype=np.int64)
        self._counts = np.empty(16, dtype=np.int64)
        for token_id in token_ids:
            self.add(token_id)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self)]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts[: len(self)]

    def add(self, token_id: int) -> None:
        """Count one more occurrence. Constant time, amortised."""
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids, self._counts = (np.concatenate((old, old)) for old in (self._ids, self._counts))
            self._ids[place], self._counts[place] = token_id, 0
        self._counts[place] += 1
