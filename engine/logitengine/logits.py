"""From rows of logits to what a request asked to see of them."""

from __future__ import annotations

import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.messages import Array, LogitsRows, LogitsSpec, Logprobs

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def row_nbytes(spec: LogitsSpec, vocab_size: int) -> int:
    """Bytes of one row as it travels."""
    itemsize = TORCH_DTYPES[spec.dtype].itemsize
    columns = (
        spec.top_k if spec.top_k is not None else len(spec.token_ids) if spec.token_ids is not None else None
    )
    return vocab_size * itemsize if columns is None else columns * (itemsize + 4)


def select(rows: Tensor, spec: LogitsSpec, kernels: Kernels) -> LogitsRows:
    """The asked-for columns of ``rows`` (float32 [R, V]) in the asked-for dtype. Always a copy."""
    if spec.top_k is not None:
        ids, values = kernels.top_k_logits(rows, spec.top_k)
    elif spec.token_ids is not None:
        chosen = torch.tensor(spec.token_ids, device=rows.device)
        ids, values = chosen.expand(rows.shape[0], -1), rows[:, chosen]
    else:
        return LogitsRows(values=to_array(rows.to(TORCH_DTYPES[spec.dtype], copy=True)))
    return LogitsRows(
        values=to_array(values.to(TORCH_DTYPES[spec.dtype])),
        token_ids=to_array(ids.to(torch.int32).contiguous()),
    )


def logprobs(rows: Tensor, token_ids: list[int], top: int, kernels: Kernels) -> Logprobs:
    """Log-softmax of ``rows`` (float32 [R, V]) at ``token_ids`` [R] and at the ``top`` most likely tokens of each."""
    normaliser = kernels.logsumexp(rows)[:, None]
    chosen = rows.gather(-1, torch.tensor(token_ids, device=rows.device)[:, None])
    ranks = (rows > chosen).sum(-1)
    top_ids: list[list[int]] = [[] for _ in token_ids]
    top_logprobs: list[list[float]] = [[] for _ in token_ids]
    if top:
        ids, values = kernels.top_k_logits(rows, top)
        top_ids, top_logprobs = ids.tolist(), (values - normaliser).tolist()
    return Logprobs(
        token_logprobs=(chosen - normaliser).squeeze(-1).tolist(),
        ranks=ranks.tolist(),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def join_logprobs(parts: list[Logprobs]) -> Logprobs:
    return Logprobs(
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        ranks=[value for part in parts for value in part.ranks],
        top_ids=[ids for part in parts for ids in part.top_ids],
        top_logprobs=[values for part in parts for values in part.top_logprobs],
    )


def join_rows(parts: list[LogitsRows]) -> LogitsRows:
    return LogitsRows(
        values=_join([part.values for part in parts]),
        token_ids=_join([part.token_ids for part in parts if part.token_ids is not None])
        if parts[0].token_ids is not None
        else None,
    )


def to_array(tensor: Tensor) -> Array:
    """The bytes of a tensor, little-endian and row-major, without a copy if it lies contiguous in host memory."""
    host = tensor.contiguous().cpu()
    data = host.view(torch.uint8).numpy().data.cast("B")
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def _join(arrays: list[Array]) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    rows = sum(array.shape[0] for array in arrays)
    return Array(arrays[0].dtype, (rows, *arrays[0].shape[1:]), b"".join(array.data for array in arrays))
