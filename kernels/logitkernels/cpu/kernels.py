"""Operations of a decoder on CPU, by the compiled library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import byref, c_int32
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.cpu.arguments import (
    BatchArguments,
    as_float32,
    as_integers,
    cache_struct,
    check_rotary,
    key_cache_struct,
    num_threads,
    threads_for,
    window_of,
)
from logitkernels.cpu.embedding import NUMBERS, CpuEmbedding, CpuPackedEmbedding
from logitkernels.cpu.layers import CpuLayers
from logitkernels.cpu.library import GATES, AttentionStruct, Library
from logitkernels.cpu.linear import BLOCK_TYPES, Bf16Sums, CpuLinear, GgufType
from logitkernels.cpu.memory import PackedMemory
from logitkernels.cpu.processor import NATIVE, Target
from logitkernels.cpu.sampling import CpuSampling
from logitkernels.decoder import Activation, DecoderLayerWeights
from logitkernels.interface import Kernels
from logitkernels.sampling import RowSampling, SamplingSize
from logitkernels.weights import BlockWeight, Linear, Weight


class CpuKernels(Kernels):
    """Kernels for x86-64 (AVX-512 where the processor has VNNI and BF16, else AVX2; AMX for bfloat16) and for aarch64.

    Activations are float32; bfloat16 ones are widened on entry and the result is rounded back. The number of
    threads is torch's, and never changes a result.
    """

    name = "cpu"
    batch_invariant = True
    transposes_keys = True
    reads_strided_caches = True
    honours_key_ends = True
    block_formats = frozenset(BLOCK_TYPES)
    embedding_formats = frozenset({*GgufType.__members__, *NUMBERS})

    def __init__(self, *, target: Target = NATIVE, prebuilt: Path | None = None) -> None:
        """Load the library; build it if it is needed and neither prebuilt nor in the cache.

        Args:
            target: what to compile for; tests use it to run the code of other processors.
            prebuilt: directory of libraries that were compiled ahead (``build_ahead``). One of them is taken.

        Raises:
            PrebuiltError: the directory has no library of these sources for this processor.
            BuildError: the library cannot be built or loaded here (see errors.py).
        """
        self._library = Library(target, prebuilt)
        self._memory = PackedMemory(self._library)

    @property
    def bf16_sums(self) -> str:
        return Bf16Sums(self._library.bf16_sums()).name

    def pin_threads(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) == num_threads() > 1:
            self._library.pin_threads((c_int32 * len(cpus))(*cpus), len(cpus))

    def pack(
        self, weights: Sequence[Weight], bias: Tensor | None = None, *, exact: bool = False
    ) -> CpuLinear:
        return CpuLinear(self._library, self._memory, weights, bias, exact=exact)

    def embedding(self, weight: BlockWeight | Linear) -> CpuEmbedding | CpuPackedEmbedding:
        if isinstance(weight, BlockWeight):
            return CpuEmbedding(self._library, weight)
        if not isinstance(weight, CpuLinear) or weight.block_format is None:
            raise ValueError(
                "a layer's rows are looked up where it is one weight in blocks, packed by these kernels"
            )
        return CpuPackedEmbedding(self._library, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        if weight.shape != (size,):
            raise ValueError(f"weight is {list(weight.shape)}; x of {list(x.shape)} needs [{size}]")
        source, weight = as_float32(x, "x"), as_float32(weight, "weight")
        out, rows = torch.empty_like(source), source.numel() // size
        self._library.rms_norm(
            source.data_ptr(), weight.data_ptr(), eps, rows, size, out.data_ptr(), threads_for(rows)
        )
        return out.to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate_and_mul("silu", gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate_and_mul("gelu_tanh", gate_up)

    def _gate_and_mul(self, activation: Activation, gate_up: Tensor) -> Tensor:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up is {list(gate_up.shape)}; its last dimension must be even")
        source, size = as_float32(gate_up, "gate_up"), gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size)
        rows = out.numel() // size
        self._library.gate_and_mul(
            GATES[activation], source.data_ptr(), rows, size, out.data_ptr(), threads_for(rows)
        )
        return out.to(gate_up.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, size = x.shape
        rotary = check_rotary(cos, sin, tokens, size)
        source, cos, sin = as_float32(x, "x"), as_float32(cos, "cos"), as_float32(sin, "sin")
        out = torch.empty_like(source)
        self._library.rope(
            source.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            tokens,
            heads,
            size,
            rotary,
            out.data_ptr(),
            num_threads(),
        )
        return out.to(x.dtype)

    def store_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        slots = as_integers(slot_mapping, torch.int64, "slot_mapping")
        for source, cache, struct_of in (
            (key, key_cache, key_cache_struct),
            (value, value_cache, cache_struct),
        ):
            tokens, heads, size = source.shape
            if (heads, size) != (cache.shape[1], cache.shape[3]) or len(slots) != tokens:
                msg = f"{list(source.shape)} with {len(slots)} slots does not fit a cache of {list(cache.shape)}"
                raise ValueError(msg)
            source = as_float32(source, "key and value")  # noqa: PLW2901  the same values, contiguous
            self._library.store(
                source.data_ptr(),
                tokens,
                heads,
                size,
                byref(struct_of(cache)),
                slots.data_ptr(),
                threads_for(tokens),
            )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> Tensor:
        tokens, heads, key_size = query.shape
        kv_heads, value_size = value_cache.shape[1], value_cache.shape[3]
        if heads % kv_heads or key_cache.shape[3] != key_size or key_cache.shape[:3] != value_cache.shape[:3]:
            msg = f"query {list(query.shape)} does not fit caches {list(key_cache.shape)}, {list(value_cache.shape)}"
            raise ValueError(msg)
        if key_cache.dtype != value_cache.dtype:
            raise TypeError(f"key cache is {key_cache.dtype} and value cache {value_cache.dtype}")
        source = as_float32(query, "query")
        sinks = None if options.sinks is None else as_float32(options.sinks, "sinks")
        attention = AttentionStruct(
            heads,
            kv_heads,
            key_size,
            value_size,
            options.scale,
            options.softcap or 0.0,
            window_of(options.sliding_window),
            None if sinks is None else sinks.data_ptr(),
            key_cache_struct(key_cache),
            cache_struct(value_cache),
        )
        batch = BatchArguments(metadata)
        out = torch.empty(tokens, heads, value_size)
        self._library.attention(
            byref(attention), byref(batch.struct), source.data_ptr(), out.data_ptr(), num_threads()
        )
        return out.to(query.dtype)

    def bind_layers(
        self,
        layers: Sequence[DecoderLayerWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> CpuLayers:
        return CpuLayers(self._library, layers, key_caches, value_caches)

    def top_k_logits(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ``Kernels.top_k_logits``; a NaN comes before every number, as in torch.topk."""
        rows, vocab = logits.shape
        if not 1 <= k <= vocab:
            raise ValueError(f"k is {k}; it must be from 1 to the {vocab} logits of a row")
        source = as_float32(logits, "logits")
        ids, values = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
        self._library.top_k(
            source.data_ptr(), rows, vocab, k, ids.data_ptr(), values.data_ptr(), threads_for(rows)
        )
        return ids, values.to(logits.dtype)

    def prepare_sampling(
        self,
        rows: Sequence[RowSampling],
        vocab_size: int,
        *,
        allowed: NDArray[np.int32] | None = None,
        size: SamplingSize | None = None,
    ) -> CpuSampling:
        return CpuSampling(self._library, rows, vocab_size, allowed, size)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Return ``log(sum(exp(row)))`` of [R, V] -> float32 [R]; a row's logits minus it are logprobs."""
        rows, vocab = logits.shape
        source, out = as_float32(logits, "logits"), torch.empty(rows)
        self._library.log_sum_exp(source.data_ptr(), rows, vocab, out.data_ptr(), threads_for(rows))
        return out

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return ``cap * tanh(logits / cap)``, in the dtype of ``logits``. Torch's own tanh depends on the processor."""
        source = as_float32(logits, "logits")
        out = torch.empty_like(source)
        self._library.softcap(source.data_ptr(), cap, source.numel(), out.data_ptr(), num_threads())
        return out.to(logits.dtype)

    def count_above(self, logits: Tensor, bounds: Tensor) -> Tensor:
        """Count the logits of each row [R, V] above its bound [R] -> int64 [R]. A NaN is not counted."""
        rows, vocab = logits.shape
        source, limits = as_float32(logits, "logits"), as_float32(bounds, "bounds")
        out = torch.empty(rows, dtype=torch.int64)
        self._library.count_above(
            source.data_ptr(), limits.data_ptr(), rows, vocab, out.data_ptr(), threads_for(rows)
        )
        return out
