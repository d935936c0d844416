"""Draws by the compiled library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitkernels.cpu.arguments import as_float32, threads_for
from logitkernels.cpu.library import Library, SamplingRowStruct
from logitkernels.philox import philox_uniform
from logitkernels.reference_sampling import HostSampling, edit_logits, with_pending
from logitkernels.sampling import RowSampling, Sampled, SamplingSize


class CpuSampling(HostSampling):
    """Rows that the library reads in place.

    Bias, penalties and bans are applied here; the library applies masks, temperature and filters, and draws.
    """

    def __init__(
        self,
        library: Library,
        rows: Sequence[RowSampling],
        vocab_size: int,
        allowed: NDArray[np.int32] | None,
        size: SamplingSize | None,
    ) -> None:
        super().__init__(rows, vocab_size, allowed, size)
        self._library = library
        if self._allowed is not None:
            self._allowed = np.ascontiguousarray(self._allowed)

    def draw(
        self,
        logits: Tensor,
        tensors: Mapping[str, Tensor],  # noqa: ARG002 - the rows are on the host
        last_tokens: Tensor | None = None,
    ) -> Sampled:
        self._check(logits)
        logits = as_float32(logits, "logits")
        rows, row_bytes = self._rows, self._vocab_size * logits.itemsize
        processed = torch.empty_like(logits) if any(row.shows_processed for row in rows) else None
        masks, mask_bytes = None, 0
        if self._allowed is not None:
            masks, mask_bytes = self._allowed.ctypes.data, self._allowed.strides[0]
        first = logits.data_ptr()
        edited: list[Tensor] = []  # kept alive while the library reads them
        structs = (SamplingRowStruct * len(rows))()
        for index, row in enumerate(rows):
            raw = scores = first + index * row_bytes
            if row.edits_logits:
                edited.append(edit_logits(logits[index], with_pending(row, last_tokens)))
                scores = edited[-1].data_ptr()
            structs[index] = SamplingRowStruct(
                raw,
                scores,
                None if masks is None else masks + index * mask_bytes,
                processed[index].data_ptr() if processed is not None and row.shows_processed else None,
                row.top_p,
                row.min_p,
                philox_uniform(row.seed, row.stream, row.position) if row.temperature else 0.0,
                row.top_k,
                row.temperature,
            )
        token_ids = torch.empty(len(rows), dtype=torch.int32)
        self._library.sample(
            structs, len(rows), self._vocab_size, token_ids.data_ptr(), threads_for(len(rows))
        )
        return Sampled(token_ids, processed)
