"""Conversion of rows of logits to the requested outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.link.messages import Array, LogitsRows, LogitsSpec, Logprobs
from logitengine.run.devices import Device

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LogitsBlock:
    """Requested columns of some rows: ``values`` [R, V], or [R, k] with ``token_ids`` int32 [R, k]."""

    values: Tensor
    token_ids: Tensor | None = None

    def fetch(self, device: Device) -> LogitsBlock:
        """Start the block's copy to the host. The result may be read after the wait of the device's next mark."""
        ids = None if self.token_ids is None else device.fetch(self.token_ids)
        return LogitsBlock(device.fetch(self.values), ids)

    def rows(self, start: int, stop: int) -> LogitsRows:
        """Return rows ``start:stop`` of a fetched block in wire form."""
        return LogitsRows(
            values=to_array(self.values[start:stop]),
            token_ids=None if self.token_ids is None else to_array(self.token_ids[start:stop]),
        )


def take_columns(rows: Tensor, spec: LogitsSpec, kernels: Kernels) -> LogitsBlock:
    """Return the columns of ``rows`` (float32 [R, V]) that ``spec`` asks for, in its dtype. Always a copy."""
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.top_k is not None:
        ids, values = kernels.top_k_logits(rows, spec.top_k)
    elif spec.token_ids is not None:
        chosen = torch.tensor(spec.token_ids, device=rows.device)
        ids, values = chosen.expand(rows.shape[0], -1), rows[:, chosen]
    else:
        return LogitsBlock(rows.to(dtype, copy=True))
    return LogitsBlock(values.to(dtype), ids.to(torch.int32).contiguous())


def join_logits(parts: list[LogitsBlock]) -> LogitsBlock:
    if len(parts) == 1:
        return parts[0]
    ids = [part.token_ids for part in parts if part.token_ids is not None]
    return LogitsBlock(torch.cat([part.values for part in parts]), torch.cat(ids) if ids else None)


@dataclass(frozen=True, slots=True)
class LogprobsBlock:
    """Log-softmax of some raw rows: the logprob and rank of one token in each, and the k likeliest tokens.

    ``logprobs`` float32 [R], ``ranks`` int64 [R], ``top_ids`` int64 [R, k], ``top_logprobs`` float32 [R, k].
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def fetch(self, device: Device) -> LogprobsBlock:
        """Start the block's copy to the host. The result may be read after the wait of the device's next mark."""
        tensors = (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        return LogprobsBlock(*(device.fetch(tensor) for tensor in tensors))

    def rows(self, start: int, stop: int) -> Logprobs:
        """Return rows ``start:stop`` of a fetched block in wire form."""
        return Logprobs(
            token_logprobs=self.logprobs[start:stop].tolist(),
            ranks=self.ranks[start:stop].tolist(),
            top_ids=self.top_ids[start:stop].tolist(),
            top_logprobs=self.top_logprobs[start:stop].tolist(),
        )


def compute_logprobs(rows: Tensor, token_ids: Tensor, top: int, kernels: Kernels) -> LogprobsBlock:
    """Compute logprobs of ``token_ids`` int64 [R] and of the ``top`` likeliest tokens in ``rows`` (float32 [R, V])."""
    chosen, normaliser = kernels.gather_logits(rows, token_ids[:, None])
    normaliser = normaliser[:, None]
    ranks = kernels.count_above(rows, chosen.squeeze(-1))
    ids, values = (
        kernels.top_k_logits(rows, top) if top else (token_ids.new_empty(len(rows), 0), chosen[:, :0])
    )
    return LogprobsBlock(
        logprobs=(chosen - normaliser).squeeze(-1),
        ranks=ranks,
        top_ids=ids,
        top_logprobs=values - normaliser,
    )


def join_logprobs(parts: list[LogprobsBlock]) -> LogprobsBlock:
    if len(parts) == 1:
        return parts[0]
    return LogprobsBlock(
        logprobs=torch.cat([part.logprobs for part in parts]),
        ranks=torch.cat([part.ranks for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
    )


def to_array(tensor: Tensor) -> Array:
    """Return the bytes of a host tensor, little-endian and row-major, without a copy if it is contiguous."""
    data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
