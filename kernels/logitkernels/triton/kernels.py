"""Operations of a decoder, by Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.interface import Kernels
from logitkernels.reference import ReferenceKernels
from logitkernels.sampling import (
    MASK_BITS,
    PreparedSampling,
    RowSampling,
    Sampled,
    SamplingSize,
    check_masks,
    pad_masks,
)
from logitkernels.triton import (
    activations,
    gather_logits,
    rms_norm,
    sample,
    sampling_rows,
    store_kv,
    top_k_logits,
)
from logitkernels.triton.matmul import matmul
from logitkernels.triton.paged_decode import paged_decode
from logitkernels.triton.paged_prefill import paged_prefill
from logitkernels.weights import Linear, Weight, stack_dense


class TritonLinear(Linear):
    """Weight [N, K] and bias [N], contiguous, multiplied by cuBLAS or, if ``batch_invariant``, in one fixed order."""

    def __init__(self, weights: Sequence[Weight], bias: Tensor | None, *, batch_invariant: bool) -> None:
        super().__init__(weights, bias)
        weight = stack_dense(weights)
        self.input_dtype = weight.dtype
        self._weight, self._bias = weight.contiguous(), None if bias is None else bias.contiguous()
        self._multiply = matmul if batch_invariant else functional.linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x.to(self.input_dtype), self._weight, self._bias).to(x.dtype)


class TritonKernels(Kernels):
    """Kernels for CUDA GPUs of compute capability 8.0 and up.

    Rows are independent of the other rows of their batch except in matrix products, where cuBLAS chooses its
    order of summation by the number of rows. With ``batch_invariant`` products have one fixed order, and
    attention gives a token the same bits in any chunk.
    """

    name = "triton"
    records_sampling = True

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant

    def pack(
        self,
        weights: Sequence[Weight],
        bias: Tensor | None = None,
        *,
        exact: bool = False,  # noqa: ARG002 - activations take the dtype of the weights
    ) -> TritonLinear:
        return TritonLinear(weights, bias, batch_invariant=self.batch_invariant)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm.rms_norm(x, weight, eps, x.dtype)

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(residual, x, weight, eps, dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return activations.silu_and_mul(gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return activations.gelu_and_mul(gate_up)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Layers use the fused kernel rope_and_store; rope alone is not worth a kernel of its own.
        return ReferenceKernels().rope(x, cos, sin)

    def store_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        store_kv.store_kv(key, value, key_cache, value_cache, slot_mapping)

    def rope_and_store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        return store_kv.rope_and_store(
            query,
            key,
            value,
            cos,
            sin,
            key_cache,
            value_cache,
            slot_mapping,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
        )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> Tensor:
        query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[-1])
        # Each kernel takes the sequences of its kind and leaves the others.
        for attend in (paged_decode, paged_prefill) if metadata.max_query_len > 1 else (paged_decode,):
            attend(query, key_cache, value_cache, metadata, out, options, uniform=self.batch_invariant)
        return out

    def top_k_logits(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if k <= top_k_logits.MAX_K:
            return top_k_logits.top_k_logits(logits, k)
        ordered = torch.sort(logits, dim=-1, descending=True, stable=True)
        return ordered.indices[:, :k].contiguous(), ordered.values[:, :k].contiguous()

    def gather_logits(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return gather_logits.gather_logits(logits, ids)

    def prepare_sampling(
        self,
        rows: Sequence[RowSampling],
        vocab_size: int,
        *,
        allowed: NDArray[np.int32] | None = None,
        size: SamplingSize | None = None,
    ) -> TritonSampling:
        return TritonSampling(rows, vocab_size, allowed, size)


class TritonSampling(PreparedSampling):
    """Rows in one array, and their masks in another if there are any."""

    def __init__(
        self,
        rows: Sequence[RowSampling],
        vocab_size: int,
        allowed: NDArray[np.int32] | None,
        size: SamplingSize | None,
    ) -> None:
        check_masks(allowed, len(rows), vocab_size)
        size = size or SamplingSize.of(rows, allowed)
        size.check_fits(rows, allowed)
        self._layout = sampling_rows.SamplingLayout(size.num_rows, max(1, size.num_edits))
        self._has_masks = size.has_masks
        packed = np.empty(self._layout.numel, dtype=np.int32)
        sampling_rows.pack(rows, self._layout, packed)
        self.arrays = {"sampling": packed}
        if size.has_masks:
            if allowed is None:
                allowed = np.empty((0, -(-vocab_size // MASK_BITS)), dtype=np.int32)
            self.arrays["sampling_allowed"] = pad_masks(allowed, size.num_rows)

    def draw(
        self, logits: Tensor, tensors: Mapping[str, Tensor], last_tokens: Tensor | None = None
    ) -> Sampled:
        rows = sampling_rows.view(tensors["sampling"], self._layout)
        scores = torch.empty_like(logits)
        if last_tokens is None:
            last_tokens = torch.full_like(rows.pending, -1)
        allowed = tensors["sampling_allowed"] if self._has_masks else None
        return Sampled(sample.sample(logits, rows, last_tokens, scores, allowed), scores)
