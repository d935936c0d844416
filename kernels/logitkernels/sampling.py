"""From raw logits to tokens: how each row is drawn, and what backends make of a batch of rows.

`logitkernels.reference_sampling` defines what is computed. Every row is treated by itself: its bits depend on its own
logits, parameters, seed and position, and on nothing else in the batch.
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
"""Stands for the token of a row without a distribution: its logits hold a NaN, nothing above -inf, or, at a temperature
above 0, an inf that no ban or mask takes from what is left. Also where bias, penalties or a low temperature make such a
row of it."""

NOTHING_ALLOWED = -2
"""Stands for the token of a row whose logits are fine, but whose bans, bias and mask leave nothing above -inf."""

MASK_BITS = 32
"""Tokens that one int32 word of a mask speaks for."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row is turned into a token.

    Attributes:
        temperature: 0 takes the largest score.
        bias: {token id: number added to its logit}.
        banned: token ids that must not be drawn.
        seen: int64 ids of the prompt and of the generated tokens, each once in any order (repetition penalty), or None.
        generated, counts: int64 ids of the generated tokens, each once in any order, and how often (presence, frequency),
            or None.
        seed, stream, position: the counter of the draw; see `logitkernels.philox.philox_uniform`.
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
        """Greedy over the raw logits themselves."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def num_edits(self) -> int:
        """At least as many as the entries that bias, bans and penalties change."""
        ids = (self.bias or (), self.banned, *(ids for ids in (self.seen, self.generated) if ids is not None))
        return sum(len(group) for group in ids)


GREEDY_ROW = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, stream=0, position=0)
"""What stands for a row that is missing from a batch of fixed size."""


@dataclass(frozen=True, slots=True)
class SamplingSize:
    """What the layout of prepared rows depends on: their number, that of their edits, and whether any has a mask."""

    num_rows: int
    num_edits: int
    has_masks: bool

    @classmethod
    def of(cls, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None) -> SamplingSize:
        """The exact size of some rows."""
        return cls(len(rows), sum(row.num_edits for row in rows), allowed is not None)

    def check_fits(self, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None) -> None:
        """Raises ValueError for rows that need more than this size."""
        if len(rows) > self.num_rows:
            raise ValueError(f"{len(rows)} rows do not fit into a size of {self.num_rows}")
        if allowed is not None and not self.has_masks:
            raise ValueError("the rows have masks, but the size has no room for any")


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn for R rows.

    Attributes:
        token_ids: int32 [R], NOT_FINITE or NOTHING_ALLOWED where nothing could be drawn.
        processed: float32 [R, V], defined for the rows that show it and have a token; None if none shows it.
    """

    token_ids: Tensor
    processed: Tensor | None


class PreparedSampling(ABC):
    """The draws of a batch, as a backend reads them; see `Kernels.prepare_sampling`.

    Attributes:
        arrays: host arrays that the caller takes to the device with those of its batch. All their names begin with
            "sampling"; there are none where the backend reads the rows on the host.
    """

    arrays: Mapping[str, NDArray[Any]]

    @abstractmethod
    def draw(
        self, logits: Tensor, tensors: Mapping[str, Tensor], last_tokens: Tensor | None = None
    ) -> Sampled:
        """One draw for each row of ``logits`` (float32 [R, V], left as they are).

        ``tensors`` are ``arrays`` on the device of the logits, or those of other rows of the same size; other names are
        not looked at. ``last_tokens`` int32 are the tokens that ``RowSampling.pending`` refers to.
        """


def check_masks(allowed: NDArray[np.int32] | None, num_rows: int, vocab_size: int) -> None:
    """Raises ValueError for masks that are not int32 [num_rows, ceil(vocab_size / 32)]."""
    expected = (num_rows, -(-vocab_size // MASK_BITS))
    if allowed is not None and (allowed.dtype != np.int32 or allowed.shape != expected):
        raise ValueError(
            f"allowed is {allowed.dtype} {list(allowed.shape)}; it must be int32 {list(expected)}"
        )


def pad_masks(allowed: NDArray[np.int32], num_rows: int) -> NDArray[np.int32]:
    """The masks with those of missing rows, which allow everything."""
    if len(allowed) == num_rows:
        return allowed
    padded = np.full((num_rows, allowed.shape[1]), -1, dtype=np.int32)
    padded[: len(allowed)] = allowed
    return padded


def unpack_mask(allowed: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """Masks int32 [..., ceil(V / 32)] as bool [..., V]."""
    bits = np.unpackbits(
        np.ascontiguousarray(allowed, dtype="<i4").view(np.uint8),
        axis=-1,
        count=vocab_size,
        bitorder="little",
    )
    return bits.view(np.bool_)
