"""Every Triton kernel alone: its error against the reference in float64, and its time against the device's floor.

Bytes and operations are counted by formula: each input is read once, each output written once, and attention
is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpus.shapes import ModelShape, Sizes
from gpus.timing import Call, Ceilings, Timer
from logitkernels import AttentionMetadata, AttentionOptions, ReferenceKernels
from logitkernels.philox import philox_uniform
from logitkernels.reference_sampling import process_logits
from logitkernels.sampling import PreparedSampling, RowSampling
from logitkernels.triton import TritonKernels
from logitkernels.triton.activations import gelu_and_mul, silu_and_mul
from logitkernels.triton.matmul import matmul
from logitkernels.triton.paged_decode import paged_decode
from logitkernels.triton.paged_prefill import paged_prefill
from logitkernels.triton.rms_norm import add_rms_norm, rms_norm
from logitkernels.triton.store_kv import rope_and_store, store_kv
from torch import Tensor
from torch.nn import functional

BLOCK_SIZE = 16
ROUNDED = 1e-2
"""Allowed relative error where intermediate results are rounded to bfloat16."""
SUMMED = 1e-5
"""Allowed relative error where sums are float32."""
DRAWN = 1e-4
"""Allowed distance of the number that drew a token from the token's share of the cumulative distribution."""
CHECKED_SEQUENCES = 16
"""Number of a batch's sequences that are compared: float64 copies of all keys would not fit."""

REFERENCE = ReferenceKernels()
KERNELS = TritonKernels()


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size. ``draw`` returns a set of random inputs; the other functions take one set.

    ``torch_name`` and ``torch_run`` are torch's own computation of the same result, if it has one.
    """

    kernel: str
    size: str
    nbytes: int
    flops: int
    draw: Callable[[], Any]
    run: Callable[[Any], object]
    error: Callable[[Any], float]
    tolerance: float
    torch_name: str = ""
    torch_run: Callable[[Any], object] | None = None


@torch.inference_mode()
def measure(case: Case, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """Return a row of the table: the error, and seconds if the error is small enough to be worth timing."""
    inputs = [case.draw() for _ in range(timer.sets(case.nbytes))]
    error = case.error(inputs[0])
    seconds = timer.median(_calls(case.run, inputs))
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "size": case.size,
        "error": error,
        "ok": error <= case.tolerance,
        "seconds": seconds,
        "bytes per second": case.nbytes / seconds,
        "operations per second": case.flops / seconds,
        "fraction": ceilings.floor(case.nbytes, case.flops) / seconds,
        "bound": "bytes" if case.nbytes / ceilings.copy >= case.flops / ceilings.matmul else "operations",
    }
    if case.torch_run is not None:
        row |= {"torch": case.torch_name, "torch seconds": timer.median(_calls(case.torch_run, inputs))}
    return row


def _calls(run: Callable[[Any], object], inputs: Sequence[Any]) -> list[Call]:
    return [lambda one=one: run(one) for one in inputs]  # type: ignore[misc]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the error over all entries; infinite if the entries that are NaN (not written) differ."""
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def all_cases(shape: ModelShape, sizes: Sizes, device: torch.device) -> Iterator[Case]:
    draw = Draw(device)
    yield from attention_cases(shape, sizes, draw)
    yield from store_cases(shape, sizes, draw)
    yield from pointwise_cases(shape, sizes, draw)
    yield from matmul_cases(shape, sizes, draw)
    yield from logits_cases(shape, sizes, draw)


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tensors on the device."""

    device: torch.device

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, dtype=dtype, device=self.device)

    def nothing(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return a tensor of NaN, which must be overwritten."""
        return torch.full(size, torch.nan, dtype=dtype, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, device=self.device)

    def ids(self, *size: int, below: int) -> Tensor:
        return torch.randint(below, size, device=self.device)

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Paged:
    """Last ``query_len`` tokens of sequences of one length, whose blocks are scattered in the cache."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    metadata: AttentionMetadata
    out: Tensor
    scale: float

    @classmethod
    def draw(cls, draw: Draw, shape: ModelShape, sequences: int, query_len: int, seq_len: int) -> Paged:
        width = -(-seq_len // BLOCK_SIZE)
        tables = draw.permutation(sequences * width).view(sequences, width)
        cache = (sequences * width, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        query = draw.normal(sequences * query_len, shape.heads, shape.head_dim)
        metadata = AttentionMetadata(
            query_start=draw.integers(range(0, sequences * query_len + 1, query_len)),
            seq_lens=draw.integers([seq_len] * sequences),
            block_tables=tables.int(),
            slot_mapping=tables.new_zeros(sequences * query_len),
            max_query_len=query_len,
            max_seq_len=seq_len,
        )
        caches = (draw.normal(*cache), draw.normal(*cache))
        return cls(query, *caches, metadata, draw.nothing(*query.shape), shape.head_dim**-0.5)

    def attend(self, attention: Callable[..., None]) -> None:
        attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.metadata,
            self.out,
            AttentionOptions(self.scale),
        )

    def error(self, attention: Callable[..., None]) -> float:
        """Return the error over the rows of a few sequences; for the others check only that they were written."""
        self.attend(attention)
        if self.out.isnan().any():
            return float("inf")
        count = min(CHECKED_SEQUENCES, len(self.metadata.seq_lens))
        rows = count * self.metadata.max_query_len
        last = replace(
            self.metadata,
            query_start=self.metadata.query_start[: count + 1],
            seq_lens=self.metadata.seq_lens[-count:],
            block_tables=self.metadata.block_tables[-count:],
        )
        expected = REFERENCE.paged_attention(
            self.query[-rows:].double(), self.key_cache, self.value_cache, last, AttentionOptions(self.scale)
        )
        return relative_error(self.out[-rows:], expected)

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first sequence's query, keys and values [1, heads, tokens, D], as torch's own attention reads them."""
        table = self.metadata.block_tables[0].long()
        caches = (cache[table].transpose(0, 1).flatten(1, 2) for cache in (self.key_cache, self.value_cache))
        keys, values = (cache[None, :, : self.metadata.max_seq_len].contiguous() for cache in caches)
        return self.query.transpose(0, 1)[None].contiguous(), keys, values


def attention_cases(shape: ModelShape, sizes: Sizes, draw: Draw) -> Iterator[Case]:
    for name, query_len, seq_len in (
        ("causal", sizes.causal, sizes.causal),
        ("chunk", sizes.chunk, sizes.chunk_end),
    ):
        size = f"{shape.name}, {query_len} of {seq_len} tokens"
        pairs = query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2
        yield Case(
            "paged_prefill",
            size,
            _attention_bytes(shape, query_len, seq_len),
            4 * pairs * shape.heads * shape.head_dim,
            lambda query_len=query_len, seq_len=seq_len: Paged.draw(draw, shape, 1, query_len, seq_len),  # type: ignore[misc]
            lambda paged: paged.attend(paged_prefill),
            lambda paged: paged.error(paged_prefill),
            ROUNDED,
        )
        if name == "causal":
            yield _torch_attention(shape, query_len, size, draw)
    for sequences, context in (*((count, sizes.context) for count in sizes.decode), (1, sizes.long_context)):
        yield Case(
            "paged_decode",
            f"{shape.name}, {sequences} at {context}",
            sequences * _attention_bytes(shape, 1, context),
            4 * sequences * context * shape.heads * shape.head_dim,
            lambda sequences=sequences, context=context: Paged.draw(draw, shape, sequences, 1, context),  # type: ignore[misc]
            lambda paged: paged.attend(paged_decode),
            lambda paged: paged.error(paged_decode),
            ROUNDED,
        )


def _torch_attention(shape: ModelShape, tokens: int, size: str, draw: Draw) -> Case:
    """Time of torch's own attention for the same tokens over contiguous keys and values."""

    def attend(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    return Case(
        "(torch's attention)",
        size,
        _attention_bytes(shape, tokens, tokens),
        2 * tokens * (tokens + 1) * shape.heads * shape.head_dim,
        lambda: Paged.draw(draw, shape, 1, tokens, tokens).contiguous(),
        attend,
        lambda _: 0.0,
        0.0,
    )


def _attention_bytes(shape: ModelShape, query_len: int, seq_len: int) -> int:
    return 4 * shape.head_dim * (query_len * shape.heads + seq_len * shape.kv_heads)


@dataclass(frozen=True, slots=True)
class Stored:
    """Tokens whose packed query, key and value go to scattered slots of an empty cache."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor

    @classmethod
    def draw(cls, draw: Draw, shape: ModelShape, tokens: int) -> Stored:
        packed = draw.normal(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        angles = draw.normal(tokens, shape.head_dim // 2, dtype=torch.float32).repeat(1, 2)
        cache = (2 * (tokens // BLOCK_SIZE + 1), shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        query, key, value = packed.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        return cls(
            query,
            key,
            value,
            angles.cos(),
            angles.sin(),
            draw.nothing(*cache),
            draw.nothing(*cache),
            draw.permutation(cache[0] * BLOCK_SIZE)[:tokens],
        )

    def store(self) -> None:
        store_kv(self.key, self.value, self.key_cache, self.value_cache, self.slots)

    def rope_and_store(self) -> Tensor:
        return rope_and_store(
            self.query, self.key, self.value, self.cos, self.sin, self.key_cache, self.value_cache, self.slots
        )

    def store_error(self) -> float:
        self.store()
        keys, values = self.empty_caches()
        REFERENCE.store_kv(self.key.double(), self.value.double(), keys, values, self.slots)
        return relative_error(torch.cat((self.key_cache, self.value_cache)), torch.cat((keys, values)))

    def rope_and_store_error(self) -> float:
        query = self.rope_and_store()
        keys, values = self.empty_caches()
        expected = REFERENCE.rope_and_store(
            self.query.double(),
            self.key.double(),
            self.value.double(),
            self.cos.double(),
            self.sin.double(),
            keys,
            values,
            self.slots,
        )
        pairs = ((query, expected), (self.key_cache, keys), (self.value_cache, values))
        return max(relative_error(mine, other) for mine, other in pairs)

    def empty_caches(self) -> tuple[Tensor, Tensor]:
        keys = torch.full_like(self.key_cache, torch.nan, dtype=torch.float64)
        return keys, keys.clone()


def store_cases(shape: ModelShape, sizes: Sizes, draw: Draw) -> Iterator[Case]:
    for tokens in sizes.pointwise:
        size = f"{shape.name}, {tokens} tokens"
        moved = 2 * 2 * tokens * shape.kv_heads * shape.head_dim * 2
        turned = 2 * 2 * tokens * shape.heads * shape.head_dim + 4 * tokens * shape.head_dim

        def drawn(tokens: int = tokens) -> Stored:
            return Stored.draw(draw, shape, tokens)

        yield Case("store_kv", size, moved, 0, drawn, Stored.store, Stored.store_error, 0.0)
        yield Case(
            "rope_and_store",
            size,
            moved + turned,
            0,
            drawn,
            Stored.rope_and_store,
            Stored.rope_and_store_error,
            ROUNDED,
        )


def pointwise_cases(shape: ModelShape, sizes: Sizes, draw: Draw) -> Iterator[Case]:
    hidden, eps = shape.hidden, shape.eps
    for tokens in sizes.pointwise:
        size = f"{shape.name}, {tokens} tokens"

        def stream(tokens: int = tokens) -> tuple[Tensor, Tensor, Tensor]:
            """Return the residual stream, the update that is added to it, and the norm's weight."""
            wide = draw.normal(tokens, hidden, dtype=torch.float32)
            return wide, draw.normal(tokens, hidden), draw.normal(hidden, dtype=torch.float32)

        yield Case(
            "rms_norm",
            size,
            tokens * hidden * 6,
            0,
            stream,
            lambda x: rms_norm(x[0], x[2], eps, torch.bfloat16),
            lambda x: relative_error(
                rms_norm(x[0], x[2], eps, torch.bfloat16), REFERENCE.rms_norm(x[0].double(), x[2], eps)
            ),
            ROUNDED,
            "F.rms_norm to bfloat16",
            lambda x: functional.rms_norm(x[0], (hidden,), x[2], eps).bfloat16(),
        )
        yield Case(
            "add_rms_norm",
            size,
            tokens * hidden * 12,
            0,
            stream,
            lambda x: add_rms_norm(x[0], x[1], x[2], eps, torch.bfloat16),
            lambda x: _add_rms_norm_error(x[0], x[1], x[2], eps),
            ROUNDED,
        )
        for name, function in (("silu_and_mul", silu_and_mul), ("gelu_and_mul", gelu_and_mul)):
            yield Case(
                name,
                size,
                tokens * shape.intermediate * 6,
                0,
                lambda tokens=tokens: draw.normal(tokens, 2 * shape.intermediate),  # type: ignore[misc]
                function,
                lambda x, name=name, function=function: relative_error(  # type: ignore[misc]
                    function(x), getattr(REFERENCE, name)(x.double())
                ),
                ROUNDED,
            )


def _add_rms_norm_error(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> float:
    pairs = zip(
        add_rms_norm(residual, x, weight, eps, torch.bfloat16),
        REFERENCE.add_rms_norm(residual.double(), x, weight, eps, torch.float64),
        strict=True,
    )
    return max(relative_error(mine, other) for mine, other in pairs)


def matmul_cases(shape: ModelShape, sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Batch-invariant product with three of the model's weights; the head multiplies only rows that are drawn from."""
    weights = {
        "gate and up": (2 * shape.intermediate, shape.hidden, sizes.tokens),
        "down": (shape.hidden, shape.intermediate, sizes.tokens),
        "head": (shape.vocab, shape.hidden, sizes.rows),
    }
    for name, (n, k, counts) in weights.items():
        for tokens in counts:

            def drawn(tokens: int = tokens, n: int = n, k: int = k) -> tuple[Tensor, Tensor]:
                return draw.normal(tokens, k), draw.normal(n, k)

            yield Case(
                "matmul",
                f"{shape.name} {name}, {tokens} rows",
                2 * (tokens * k + n * k + tokens * n),
                2 * tokens * n * k,
                drawn,
                lambda x: matmul(*x),
                lambda x: relative_error(matmul(*x), x[0].double() @ x[1].double().T),
                ROUNDED,
                "F.linear",
                lambda x: functional.linear(*x),
            )


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rows of logits as peaked as a model's, each with its own seed."""

    logits: Tensor
    rows: list[RowSampling]
    prepared: PreparedSampling
    tensors: dict[str, Tensor]
    last_tokens: Tensor

    @classmethod
    def draw(cls, draw: Draw, shape: ModelShape, count: int, options: dict[str, Any]) -> Sampled:
        logits = 4 * draw.normal(count, shape.vocab, dtype=torch.float32)
        rows = [_row_sampling(draw, shape.vocab, seed, options) for seed in range(count)]
        prepared = KERNELS.prepare_sampling(rows, shape.vocab)
        tensors = {name: torch.from_numpy(array).to(draw.device) for name, array in prepared.arrays.items()}
        return cls(logits, rows, prepared, tensors, draw.integers([-1] * count))

    def sample(self) -> Tensor:
        return self.prepared.draw(self.logits, self.tensors, self.last_tokens).token_ids

    def error(self) -> float:
        """Return the largest distance of a row's uniform number from its token's part of the distribution."""
        pairs = zip(self.sample().tolist(), self.logits.cpu().double(), self.rows, strict=True)
        return max(_draw_error(token, logits, row) for token, logits, row in pairs)


def _row_sampling(draw: Draw, vocab: int, seed: int, options: dict[str, Any]) -> RowSampling:
    row = RowSampling(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=seed, stream=0, position=seed + 7)
    row = replace(row, **options)
    if row.repetition_penalty != 1:
        seen = draw.permutation(vocab)[: min(200, vocab)].sort().values.cpu().numpy()
        row = replace(row, seen=seen, generated=seen[::2], counts=np.ones_like(seen[::2]))
    return row


def _draw_error(token: int, logits: Tensor, row: RowSampling) -> float:
    scores = process_logits(logits, row)
    if row.temperature == 0:
        return 0.0 if token == int(scores.argmax()) else float("inf")
    if token < 0:
        return float("inf")
    mass = torch.softmax(scores, dim=-1).cumsum(-1)
    uniform = philox_uniform(row.seed, row.stream, row.position) * float(mass[-1])
    below = float(mass[token - 1]) if token else 0.0
    return max(below - uniform, uniform - float(mass[token]), 0.0)


SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p": {"top_p": 0.95},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
}


def logits_cases(shape: ModelShape, sizes: Sizes, draw: Draw) -> Iterator[Case]:
    for count in sizes.rows:
        size = f"{shape.name}, {count} rows"
        nbytes = 4 * count * shape.vocab

        def logits(count: int = count) -> Tensor:
            return draw.normal(count, shape.vocab, dtype=torch.float32)

        def with_ids(count: int = count) -> tuple[Tensor, Tensor]:
            return draw.normal(count, shape.vocab, dtype=torch.float32), draw.ids(count, 1, below=shape.vocab)

        for name, options in SAMPLED.items():

            def drawn(count: int = count, options: dict[str, Any] = options) -> Sampled:
                return Sampled.draw(draw, shape, count, options)

            yield Case(
                "sample",
                f"{size}, {name}",
                nbytes + 4 * count,
                0,
                drawn,
                Sampled.sample,
                Sampled.error,
                DRAWN,
            )
        yield Case(
            "top_k_logits",
            f"{size}, {sizes.top_k}",
            nbytes + 12 * count * sizes.top_k,
            0,
            logits,
            lambda x: KERNELS.top_k_logits(x, sizes.top_k),
            lambda x: _top_k_error(x, sizes.top_k),
            0.0,
            "torch.topk",
            lambda x: torch.topk(x, sizes.top_k, dim=-1),
        )
        yield Case(
            "gather_logits",
            size,
            nbytes + 16 * count,
            0,
            with_ids,
            lambda x: KERNELS.gather_logits(*x),
            lambda x: _gather_error(*x),
            SUMMED,
            "gather and logsumexp",
            lambda x: (x[0].gather(-1, x[1]), torch.logsumexp(x[0], dim=-1)),
        )


def _top_k_error(logits: Tensor, k: int) -> float:
    (ids, values), (true_ids, true_values) = (
        kernels.top_k_logits(logits, k) for kernels in (KERNELS, REFERENCE)
    )
    return 0.0 if torch.equal(ids, true_ids) and torch.equal(values, true_values) else float("inf")


def _gather_error(logits: Tensor, ids: Tensor) -> float:
    values, logsumexp = KERNELS.gather_logits(logits, ids)
    true_values, true_logsumexp = REFERENCE.gather_logits(logits.double(), ids)
    return max(relative_error(values, true_values), relative_error(logsumexp, true_logsumexp))
