"""Interface of every backend: the operations a decoder needs, as functions on tensors.

Shapes use these letters throughout: T tokens of a flattened batch, S sequences, H hidden size, I intermediate size,
Hq query heads, Hkv key-value heads, D head size, V vocabulary, R rows of logits, N and K the output and input features
of a linear layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.decoder import BoundLayers, ComposedLayers, DecoderLayerWeights
from logitkernels.reference_sampling import HostSampling
from logitkernels.sampling import PreparedSampling, RowSampling, SamplingSize
from logitkernels.weights import BlockWeight, Linear, Weight


class Kernels(ABC):
    """One backend. It has no state of its own: the caller keeps what the backend prepares."""

    name: str
    batch_invariant: bool
    """Whether a row's bits never depend on the other rows, the chunking or the batch."""

    transposes_keys: bool = False
    """Whether keys are read faster from transposed caches, for block sizes that are multiples of 16.

    A transposed cache is a view [num_blocks, Hkv, block_size, D] of memory laid out as
    [num_blocks, Hkv, D, block_size].
    """

    reads_strided_caches: bool = False
    """Whether the blocks of a cache may be strided."""

    def pin_threads(self) -> None:  # noqa: B027 - nothing to do where the kernels have no threads of their own
        """Pin each CPU thread to a core of its own where there are as many cores as threads.

        Call it only in a process that does nothing else: the calling thread is pinned too, and threads that
        it starts later inherit its core.
        """

    honours_key_ends: bool = False
    """Whether ``paged_attention`` and ``bind_layers`` take metadata with ``key_ends``."""

    @property
    def bf16_sums(self) -> str:
        """Name of the order in which products of bfloat16 are summed, where it depends on the processor; else empty."""
        return ""

    block_formats: frozenset[str] = frozenset()
    """Block formats of weights that ``pack`` takes."""

    @abstractmethod
    def pack(self, weights: Sequence[Weight], bias: Tensor | None = None, *, exact: bool = False) -> Linear:
        """Pack weights [N, K] of one K, their rows stacked in order, and ``bias`` [all N]. Done once, at load.

        Each weight is dense or in blocks of one of ``block_formats``. With ``exact`` the layer multiplies them by
        unrounded activations; otherwise it may round activations to the precision of the weights.

        Raises ValueError for weights that cannot be stacked or are in blocks that the backend does not
        multiply.
        """

    embedding_formats: frozenset[str] = frozenset()
    """Formats of weights that ``embedding`` takes: blocks, and numbers as a GGUF file has them (F32, F16, BF16)."""

    def embedding(self, weight: BlockWeight | Linear) -> Callable[[Tensor], Tensor]:
        """Return the lookup of token ids, int64 [T] -> float32 [T, H], in the bytes of a weight [V, H].

        Nothing is copied: ``raw`` may be a mapped file. A layer with a ``block_format`` gives its own rows: a head
        whose weight is the embedding's too. The lookup raises IndexError for an id outside [0, V).

        Raises ValueError for a weight in another format than ``embedding_formats``, or a layer without one.
        """
        described = weight.format if isinstance(weight, BlockWeight) else "a packed layer"
        raise ValueError(f"the {self.name} kernels do not read an embedding in {described}")

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32, in the
        dtype of ``x``.

        Follows Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
        """

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ``sum = residual + x`` [T, H] in the dtype of ``residual``, and ``rms_norm(sum)`` in ``dtype``."""
        total = residual + x.to(residual.dtype)
        return total, self.rms_norm(total, weight, eps).to(dtype)

    @abstractmethod
    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return ``silu(gate) * up`` of [T, 2 I] -> [T, I]; gate is the first half of each row."""

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return ``gelu(gate) * up`` of [T, 2 I] -> [T, I] by the tanh approximation of Hendrycks and Gimpel (2016)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate ``x`` [T, heads, D] by ``cos`` and ``sin`` float32 [T, R], R <= D, in Llama's half-split order.

        Dimension i pairs with i + R/2; the last D - R dimensions pass through.
        ``cos[:, i] == cos[:, i + R/2]``.
        """

    @abstractmethod
    def store_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write ``key`` [T, Hkv, D] and ``value`` [T, Hkv, Dv] into caches [num_blocks, Hkv, block_size, D or Dv]."""

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
        """Return ``rope`` of ``query`` [T, Hq, D], and ``store_kv`` the rotated ``key`` and ``value``.

        ``q_norm`` and ``k_norm`` [D] are weights of an ``rms_norm`` of each head before the rotation.
        """
        query = query if q_norm is None else self.rms_norm(query, q_norm, eps)
        key = key if k_norm is None else self.rms_norm(key, k_norm, eps)
        self.store_kv(self.rope(key, cos, sin), value, key_cache, value_cache, slot_mapping)
        return self.rope(query, cos, sin)

    @abstractmethod
    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> Tensor:
        """Return causal attention of ``query`` [T, Hq, D] over the paged cache -> [T, Hq, Dv] in the dtype of
        ``query``.

        Query head h reads key-value head ``h // (Hq / Hkv)``. Scores and softmax are float32.
        """

    def bind_layers(
        self,
        layers: Sequence[DecoderLayerWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> BoundLayers:
        """Bind pre-norm decoder layers, run in order, to their caches: ``hidden`` [T, H] -> [T, H], same dtype.

        A backend does here the work that is the same for all calls. Backends override this where one call is
        faster than separate operations.
        """
        return ComposedLayers(self, layers, key_caches, value_caches)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Return ``log(sum(exp(row)))`` of [R, V] -> [R]; a row's logits minus it are logprobs."""
        return torch.logsumexp(logits, dim=-1)

    def top_k_logits(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of each row of ``logits`` [R, V], ties broken by lower id: ids int64 and
        values, both [R, k].

        A NaN comes before every number, as in torch.topk.
        """
        # A stable descending sort is the definition. topk first narrows the row to candidates, which include
        # every tie of the k-th value.
        threshold = torch.topk(logits, k, dim=-1).values[:, -1:]
        is_candidate = (logits >= threshold) | logits.isnan()
        ids = torch.empty(logits.shape[0], k, dtype=torch.int64, device=logits.device)
        for row in range(logits.shape[0]):
            candidates = torch.nonzero(is_candidate[row]).squeeze(-1)
            order = torch.sort(logits[row, candidates], descending=True, stable=True).indices[:k]
            ids[row] = candidates[order]
        return ids, logits.gather(-1, ids)

    def gather_logits(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [R, V] at ``ids`` int64 [R, K] -> [R, K], and each row's ``logsumexp`` [R]."""
        return logits.gather(-1, ids), self.logsumexp(logits)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return ``cap * tanh(logits / cap)``, in the dtype of ``logits``."""
        return torch.tanh(logits / cap) * cap

    def count_above(self, logits: Tensor, bounds: Tensor) -> Tensor:
        """Count the logits of each row [R, V] above its bound [R] -> int64 [R]. A NaN is not counted."""
        return (logits > bounds[:, None]).sum(-1)

    records_sampling: bool = False
    """Whether draws read nothing on the host, so that they can be recorded and replayed with other arrays."""

    def prepare_sampling(
        self,
        rows: Sequence[RowSampling],
        vocab_size: int,
        *,
        allowed: NDArray[np.int32] | None = None,
        size: SamplingSize | None = None,
    ) -> PreparedSampling:
        """Prepare the draws of a batch; see `logitkernels.sampling`.

        ``allowed`` int32 [rows, ceil(V / 32)] holds masks: bit ``id % 32`` of word ``id // 32`` is 0 where
        the token cannot be drawn. Bits beyond the vocabulary are ignored. The masks are read later and must
        not be changed.

        ``size`` fixes the layout of the arrays. Rows missing up to ``size.num_rows`` are greedy and allow
        every token. Raises ValueError for rows or masks that do not fit.
        """
        return HostSampling(rows, vocab_size, allowed, size)
