"""From rows of logits to what a request asked to see of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.link.messages import Array, LogitsRows, LogitsSpec, Logprobs
from logitengine.run.devices import Device

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def row_nbytes(spec: LogitsSpec, vocab_size: int) -> int:
    """Bytes of one row as it travels."""
    itemsize = TORCH_DTYPES[spec.dtype].itemsize
    columns = (
        spec.top_k if spec.top_k is not None else len(spec.token_ids) if spec.token_ids is not None else None
    )
    return vocab_size * itemsize if columns is None else columns * (itemsize + 4)


@dataclass(frozen=True, slots=True)
class Selected:
    """The asked-for columns of some rows: ``values`` [R, V], or [R, k] with ``token_ids`` int32 [R, k]."""

    values: Tensor
    token_ids: Tensor | None = None

    def fetch(self, device: Device) -> Selected:
        """On their way to the host: to be read once the wait of the device's next mark is over."""
        return Selected(
            device.fetch(self.values), None if self.token_ids is None else device.fetch(self.token_ids)
        )

    def rows(self, start: int, stop: int) -> LogitsRows:
        """Some of the rows, of fetched ones, as they travel."""
        return LogitsRows(
            values=to_array(self.values[start:stop]),
            token_ids=None if self.token_ids is None else to_array(self.token_ids[start:stop]),
        )


def select(rows: Tensor, spec: LogitsSpec, kernels: Kernels) -> Selected:
    """The asked-for columns of ``rows`` (float32 [R, V]) in the asked-for dtype. Always a copy."""
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.top_k is not None:
        ids, values = kernels.top_k_logits(rows, spec.top_k)
    elif spec.token_ids is not None:
        chosen = torch.tensor(spec.token_ids, device=rows.device)
        ids, values = chosen.expand(rows.shape[0], -1), rows[:, chosen]
    else:
        return Selected(rows.to(dtype, copy=True))
    return Selected(values.to(dtype), ids.to(torch.int32).contiguous())


def join_selected(parts: list[Selected]) -> Selected:
    if len(parts) == 1:
        return parts[0]
    ids = [part.token_ids for part in parts if part.token_ids is not None]
    return Selected(torch.cat([part.values for part in parts]), torch.cat(ids) if ids else None)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-softmax of some raw rows: of a token in each, its rank, and of the k likeliest.

    ``logprobs`` float32 [R], ``ranks`` int64 [R], ``top_ids`` int64 [R, k], ``top_logprobs`` float32 [R, k].
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def fetch(self, device: Device) -> Scores:
        """On their way to the host: to be read once the wait of the device's next mark is over."""
        tensors = (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        return Scores(*(device.fetch(tensor) for tensor in tensors))

    def rows(self, start: int, stop: int) -> Logprobs:
        """Some of the rows, of fetched ones, as they travel."""
        return Logprobs(
            token_logprobs=self.logprobs[start:stop].tolist(),
            ranks=self.ranks[start:stop].tolist(),
            top_ids=self.top_ids[start:stop].tolist(),
            top_logprobs=self.top_logprobs[start:stop].tolist(),
        )


def score(rows: Tensor, token_ids: Tensor, top: int, kernels: Kernels) -> Scores:
    """The scores of ``token_ids`` int64 [R] and of the ``top`` likeliest tokens in ``rows`` (float32 [R, V])."""
    chosen, normaliser = kernels.gather_logits(rows, token_ids[:, None])
    normaliser = normaliser[:, None]
    ranks = kernels.count_above(rows, chosen.squeeze(-1))
    ids, values = (
        kernels.top_k_logits(rows, top) if top else (token_ids.new_empty(len(rows), 0), chosen[:, :0])
    )
    return Scores(
        logprobs=(chosen - normaliser).squeeze(-1),
        ranks=ranks,
        top_ids=ids,
        top_logprobs=values - normaliser,
    )


def join_scores(parts: list[Scores]) -> Scores:
    if len(parts) == 1:
        return parts[0]
    return Scores(
        logprobs=torch.cat([part.logprobs for part in parts]),
        ranks=torch.cat([part.ranks for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
    )


def to_array(tensor: Tensor) -> Array:
    """The bytes of a host tensor, little-endian and row-major, without a copy if it lies contiguous."""
    data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
