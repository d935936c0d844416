"""From raw logits to tokens: the parameters of each row's draw, and the prepared draws of a batch.

`logitkernels.reference_sampling` defines the computation. Every row is independent: its bits depend only on
its own logits, parameters, seed and position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NOT_FINITE = -1
"""Token id reported for a row without a distribution.

The logits of such a row hold a NaN, or nothing above -inf, or, at a temperature above 0, an inf that no ban
or mask removes. Bias, penalties or a low temperature can also make such a row.
"""

NOTHING_ALLOWED = -2
"""Token id reported for a row with sound logits whose bans, bias and mask leave nothing above -inf."""

MASK_BITS = 32
"""Tokens that one int32 word of a mask covers."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of one row.

    Attributes:
        temperature: 0 takes the largest logit after edits.
        bias: {token id: number added to its logit}.
        banned: token ids that must not be drawn.
        seen: int64 ids of the prompt's and the generated tokens, each once in any order (repetition penalty),
            or None.
        generated, counts: int64 ids of the generated tokens, each once in any order, and how often each
            occurred (presence, frequency), or None.
        seed, stream, position: the counter of the draw; see `logitkernels.philox.philox_uniform`.
        pending: index of the sequence's newest token among the tokens drawn in the step before, set while the
            host does not know that token. The token counts as seen, and as generated once more than the
            fields above say. Set only where a penalty needs it.
        shows_processed: whether the request asks for the processed logits.
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
    seen: NDArray[np.int64] | None = None
    generated: NDArray[np.int64] | None = None
    counts: NDArray[np.int64] | None = None
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
        """Whether the draw is greedy over the raw logits."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def num_edits(self) -> int:
        """Upper bound on the number of entries that bias, bans and penalties change."""
        ids = (self.bias or (), self.banned, *(ids for ids in (self.seen, self.generated) if ids is not None))
        return sum(len(group) for group in ids)


GREEDY_ROW = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, stream=0, position=0)
"""Placeholder for a row that is missing from a batch of fixed size."""


@dataclass(frozen=True, slots=True)
class SamplingSize:
    """Size that fixes the layout of prepared rows: the number of rows and of edits, and whether any has a mask."""

    num_rows: int
    num_edits: int
    has_masks: bool

    @classmethod
    def of(cls, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None) -> SamplingSize:
        """Return the exact size of the given rows."""
        return cls(len(rows), sum(row.num_edits for row in rows), allowed is not None)

    def check_fits(self, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None) -> None:
        """Raise ValueError for rows that need more than this size."""
        if len(rows) > self.num_rows:
            raise ValueError(f"{len(rows)} rows do not fit into a size of {self.num_rows}")
        if allowed is not None and not self.has_masks:
            raise ValueError("the rows have masks, but the size has no room for any")


@dataclass(frozen=True, slots=True)
class Sampled:
    """Result of drawing for R rows.

    Attributes:
        token_ids: int32 [R], NOT_FINITE or NOTHING_ALLOWED where nothing could be drawn.
        processed: float32 [R, V], defined for the rows that show it and have a token; None if no row shows
            it.
    """

    token_ids: Tensor
    processed: Tensor | None


class PreparedSampling(ABC):
    """Draws of a batch in the form that a backend reads; see `Kernels.prepare_sampling`.

    Attributes:
        arrays: host arrays that the caller copies to the device with those of its batch. All their names
            begin with "sampling". Empty where the backend reads the rows on the host.
    """

    arrays: Mapping[str, NDArray[Any]]

    @abstractmethod
    def draw(
        self, logits: Tensor, tensors: Mapping[str, Tensor], last_tokens: Tensor | None = None
    ) -> Sampled:
        """Draw one token for each row of ``logits`` (float32 [R, V], left unchanged).

        ``tensors`` holds ``arrays`` on the device of the logits, or the arrays of other rows of the same
        size. Other names are ignored. ``last_tokens`` int32 holds the tokens that ``RowSampling.pending``
        refers to.
        """


def check_masks(allowed: NDArray[np.int32] | None, num_rows: int, vocab_size: int) -> None:
    """Raise ValueError for masks that are not int32 [num_rows, ceil(vocab_size / 32)]."""
    expected = (num_rows, -(-vocab_size // MASK_BITS))
    if allowed is not None and (allowed.dtype != np.int32 or allowed.shape != expected):
        raise ValueError(
            f"allowed is {allowed.dtype} {list(allowed.shape)}; it must be int32 {list(expected)}"
        )


def pad_masks(allowed: NDArray[np.int32], num_rows: int) -> NDArray[np.int32]:
    """Append masks that allow everything for the missing rows."""
    if len(allowed) == num_rows:
        return allowed
    padded = np.full((num_rows, allowed.shape[1]), -1, dtype=np.int32)
    padded[: len(allowed)] = allowed
    return padded


def unpack_mask(allowed: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """Unpack masks int32 [..., ceil(V / 32)] to bool [..., V]."""
    bits = np.unpackbits(
        np.ascontiguousarray(allowed, dtype="<i4").view(np.uint8),
        axis=-1,
        count=vocab_size,
        bitorder="little",
    )
    return bits.view(np.bool_)
