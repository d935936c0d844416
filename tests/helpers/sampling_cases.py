"""Rows and sampling parameters for the sampling tests of every backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from logitkernels import Kernels
from logitkernels.sampling import RowSampling, Sampled
from numpy.typing import NDArray
from torch import Tensor

PLAIN = RowSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, stream=0, position=3)
GREEDY = replace(PLAIN, temperature=0.0)


def eighths(rows: int, vocab: int, seed: int, spread: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.round(torch.randn(rows, vocab, generator=generator) * spread) / 8


def draw_rows(
    kernels: Kernels,
    logits: Tensor,
    rows: list[RowSampling],
    last_tokens: Tensor | None = None,
    allowed: NDArray[np.int32] | None = None,
) -> Sampled:
    """Return the kernels' draws for exactly these rows."""
    prepared = kernels.prepare_sampling(rows, logits.shape[1], allowed=allowed)
    tensors = {name: torch.from_numpy(array).to(logits.device) for name, array in prepared.arrays.items()}
    return prepared.draw(logits, tensors, last_tokens)


@st.composite
def sampling_rows(draw: st.DrawFn, vocab: int, num_last: int) -> RowSampling:
    ids = st.lists(st.integers(0, vocab - 1), unique=True, max_size=5)
    seen, generated = draw(st.none() | ids), draw(st.none() | ids)
    counts = None if generated is None else [1 + i % 3 for i in generated]
    arrays = {
        name: None if values is None else np.array(values, dtype=np.int64)
        for name, values in (("seen", seen), ("generated", generated), ("counts", counts))
    }
    return RowSampling(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, 300])),
        top_p=draw(st.sampled_from([0.013, 0.31, 0.77, 0.93, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.0017, 0.11])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stream=draw(st.integers(0, 2**32 - 1)),
        position=draw(st.integers(0, 2**40)),
        bias=draw(
            st.none() | st.dictionaries(st.integers(0, vocab - 1), st.sampled_from([-3.0, 1.25]), max_size=4)
        ),
        banned=draw(st.just(()) | ids.map(lambda values: (*values, *values))),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.75, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        **arrays,
        pending=draw(st.none() | st.integers(0, num_last - 1)),
        shows_processed=draw(st.booleans()),
    )
