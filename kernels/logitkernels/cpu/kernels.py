"""The operations of a decoder on CPU, by the compiled library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import byref, c_int32, pointer
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitkernels.cpu.arguments import as_float32, as_integers, num_threads, threads_for
from logitkernels.cpu.library import (
    AttentionStruct,
    BatchStruct,
    CacheStruct,
    DecoderLayerStruct,
    Library,
)
from logitkernels.cpu.linear import CpuLinear, GgufType
from logitkernels.cpu.sampling import CpuSampling
from logitkernels.interface import AttentionMetadata, BoundLayers, DecoderLayerWeights, Kernels
from logitkernels.sampling import RowSampling, SamplingSize
from logitkernels.weights import Weight


@dataclass(frozen=True, slots=True)
class CpuDecoderLayer(DecoderLayerWeights):
    """A layer with the struct that the library reads; its norms are float32."""

    struct: DecoderLayerStruct = field(
        default_factory=DecoderLayerStruct, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        struct = self.struct
        struct.qkv, struct.output = pointer(self.qkv.struct), pointer(self.output.struct)
        struct.gate_up, struct.down = pointer(self.gate_up.struct), pointer(self.down.struct)
        struct.input_norm = self.input_norm.data_ptr()
        struct.post_attention_norm = self.post_attention_norm.data_ptr()
        struct.query_norm = None if self.q_norm is None else self.q_norm.data_ptr()
        struct.key_norm = None if self.k_norm is None else self.k_norm.data_ptr()
        struct.heads, struct.kv_heads, struct.head_size = self.num_heads, self.num_kv_heads, self.head_dim
        struct.sliding_window = _window(self.sliding_window)
        struct.eps, struct.scale = self.eps, self.scale


class CpuKernels(Kernels):
    """Kernels for x86-64, with AVX-512 VNNI and BF16 where the processor has them and else with AVX2, and for aarch64.

    Activations are float32; bfloat16 ones are widened at the door and the result is rounded back. The number of threads
    is torch's, and never changes a result.
    """

    name = "cpu"
    batch_invariant = True
    transposes_keys = True
    reads_strided_caches = True
    block_formats = frozenset(GgufType.__members__)

    def __init__(self, *, march: str = "native") -> None:
        """Build the library if needed and load it.

        Args:
            march: the instruction set to compile for; tests run what other processors would.

        Raises:
            BuildError: the library cannot be built or loaded here (see build.py).
        """
        self._library = Library(march)

    def pin_threads(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) == num_threads() > 1:
            self._library.pin_threads((c_int32 * len(cpus))(*cpus), len(cpus))

    def pack(
        self, weights: Sequence[Weight], bias: Tensor | None = None, *, exact: bool = False
    ) -> CpuLinear:
        return CpuLinear(self._library, weights, bias, exact=exact)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        if weight.shape != (size,):
            raise ValueError(f"weight is {list(weight.shape)}; x of {list(x.shape)} needs [{size}]")
        source, weight = as_float32(x, "x"), as_float32(weight, "weight")
        out = torch.empty_like(source)
        self._library.rms_norm(
            source.data_ptr(),
            weight.data_ptr(),
            eps,
            source.numel() // size,
            size,
            out.data_ptr(),
            num_threads(),
        )
        return out.to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up is {list(gate_up.shape)}; its last dimension must be even")
        source, size = as_float32(gate_up, "gate_up"), gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size)
        self._library.silu_and_mul(
            source.data_ptr(), out.numel() // size, size, out.data_ptr(), num_threads()
        )
        return out.to(gate_up.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, size = x.shape
        rotary = _check_rotary(cos, sin, tokens, size)
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
        for source, cache, struct_of in ((key, key_cache, _key_cache), (value, value_cache, _cache)):
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
                num_threads(),
            )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, key_size = query.shape
        kv_heads, value_size = value_cache.shape[1], value_cache.shape[3]
        if heads % kv_heads or key_cache.shape[3] != key_size or key_cache.shape[:3] != value_cache.shape[:3]:
            msg = f"query {list(query.shape)} does not fit caches {list(key_cache.shape)}, {list(value_cache.shape)}"
            raise ValueError(msg)
        if key_cache.dtype != value_cache.dtype:
            raise TypeError(f"key cache is {key_cache.dtype} and value cache {value_cache.dtype}")
        source = as_float32(query, "query")
        sinks = None if sinks is None else as_float32(sinks, "sinks")
        attention = AttentionStruct(
            heads,
            kv_heads,
            key_size,
            value_size,
            scale,
            softcap or 0.0,
            _window(sliding_window),
            None if sinks is None else sinks.data_ptr(),
            _key_cache(key_cache),
            _cache(value_cache),
        )
        batch = _Batch(metadata)
        out = torch.empty(tokens, heads, value_size)
        self._library.attention(
            byref(attention), byref(batch.struct), source.data_ptr(), out.data_ptr(), num_threads()
        )
        return out.to(query.dtype)

    def runs_fused(self, layer: DecoderLayerWeights) -> bool:
        return layer.is_llama

    def prepare_layer(self, layer: DecoderLayerWeights) -> CpuDecoderLayer:
        if isinstance(layer, CpuDecoderLayer):
            return layer
        values = {f.name: getattr(layer, f.name) for f in fields(DecoderLayerWeights)}
        for name in ("input_norm", "post_attention_norm", "q_norm", "k_norm"):
            if values[name] is not None:
                values[name] = as_float32(values[name].detach(), name)
        if (layer.q_norm is None) != (layer.k_norm is None):
            raise ValueError("a layer has both q_norm and k_norm or neither")
        return CpuDecoderLayer(**values)

    def decoder_layers(
        self,
        hidden: Tensor,
        layers: Sequence[DecoderLayerWeights],
        cos: Tensor,
        sin: Tensor,
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        return self.bind_layers(layers, key_caches, value_caches)(hidden, cos, sin, metadata)

    def bind_layers(
        self,
        layers: Sequence[DecoderLayerWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> BoundLayers:
        return _BoundLayers(
            self._library, [self.prepare_layer(layer) for layer in layers], key_caches, value_caches
        )

    def top_k_logits(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As ``Kernels.top_k_logits``; a NaN comes before every number, as torch.topk has it."""
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
        """``log(sum(exp(row)))`` of [R, V] -> float32 [R]; subtracted from a row's logits it gives log-probabilities."""
        rows, vocab = logits.shape
        source, out = as_float32(logits, "logits"), torch.empty(rows)
        self._library.log_sum_exp(source.data_ptr(), rows, vocab, out.data_ptr(), threads_for(rows))
        return out

    def count_above(self, logits: Tensor, bounds: Tensor) -> Tensor:
        """How many logits of each row [R, V] are larger than its bound [R] -> int64 [R]. NaN is not."""
        rows, vocab = logits.shape
        source, limits = as_float32(logits, "logits"), as_float32(bounds, "bounds")
        out = torch.empty(rows, dtype=torch.int64)
        self._library.count_above(
            source.data_ptr(), limits.data_ptr(), rows, vocab, out.data_ptr(), threads_for(rows)
        )
        return out


class _BoundLayers:
    """Layers with their caches as the library reads them, and the tensors that they point to."""

    def __init__(
        self,
        library: Library,
        layers: Sequence[CpuDecoderLayer],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> None:
        count = len(layers)
        if not count == len(key_caches) == len(value_caches):
            raise ValueError(
                f"{count} layers with {len(key_caches)} key and {len(value_caches)} value caches"
            )
        self._library = library
        self._tensors = (layers, key_caches, value_caches)
        self._head_size = layers[0].head_dim
        self._layers = (DecoderLayerStruct * count)(*(layer.struct for layer in layers))
        self._keys = (CacheStruct * count)(*map(_key_cache, key_caches))
        self._values = (CacheStruct * count)(*map(_cache, value_caches))

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata) -> Tensor:
        tokens = hidden.shape[0]
        rotary = _check_rotary(cos, sin, tokens, self._head_size)
        cos, sin = as_float32(cos, "cos"), as_float32(sin, "sin")
        out = hidden.to(torch.float32, copy=True).contiguous()
        batch = _Batch(metadata)
        self._library.decoder_layers(
            self._layers,
            len(self._layers),
            out.data_ptr(),
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            rotary,
            self._keys,
            self._values,
            byref(batch.struct),
            num_threads(),
        )
        return out.to(hidden.dtype)


class _Batch:
    """The metadata as the library reads it, with the tensors that it points to."""

    __slots__ = ("_tensors", "struct")

    def __init__(self, metadata: AttentionMetadata) -> None:
        starts = as_integers(metadata.query_start, torch.int32, "query_start")
        lengths = as_integers(metadata.seq_lens, torch.int32, "seq_lens")
        tables = as_integers(metadata.block_tables, torch.int32, "block_tables")
        slots = as_integers(metadata.slot_mapping, torch.int64, "slot_mapping")
        self._tensors = (starts, lengths, tables, slots)
        self.struct = BatchStruct(
            len(lengths),
            starts.data_ptr(),
            lengths.data_ptr(),
            tables.data_ptr(),
            tables.shape[1],
            slots.data_ptr(),
        )


def _window(sliding_window: int | None) -> int:
    if sliding_window is None:
        return 0  # how the library says that there is none
    if sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1")
    return sliding_window


def _check_rotary(cos: Tensor, sin: Tensor, tokens: int, size: int) -> int:
    rotary = cos.shape[-1]
    if cos.shape != (tokens, rotary) or sin.shape != cos.shape or rotary % 2 or rotary > size:
        msg = (
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit {tokens} tokens of head size {size}"
        )
        raise ValueError(msg)
    return rotary


def _cache(cache: Tensor, *, may_be_transposed: bool = False) -> CacheStruct:
    if cache.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the cache is {cache.dtype}; the native kernels read float32 and bfloat16")
    block_stride, head_stride, token_stride, element_stride = cache.stride()
    block_size = cache.shape[2]
    is_transposed = may_be_transposed and token_stride == 1 and block_size % 16 == 0
    if element_stride != 1 and not is_transposed:
        raise ValueError(
            "the last dimension of a cache must be contiguous; of keys, the third instead if it is a multiple of 16"
        )
    return CacheStruct(
        cache.data_ptr(),
        cache.dtype == torch.bfloat16,
        block_stride,
        head_stride,
        token_stride,
        element_stride,
        block_size,
    )


_key_cache = partial(_cache, may_be_transposed=True)
