"""Times the native CPU kernels on the shape of SmolLM2-135M: every layer with its own, cold weights.

    python benchmarks/kernels_cpu.py [--rounds 5] [--json kernels_cpu.json]

It reports medians of interleaved rounds in milliseconds for one step of all layers: the linear layers alone,
the attention alone, the whole decoder in one call, and the head. Then each block format on larger weights, which
superblocks of 256 divide: products and packing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from logitkernels import (
    AttentionMetadata,
    AttentionOptions,
    BlockWeight,
    DecoderLayerWeights,
    DenseWeight,
    Weight,
)
from logitkernels.cpu import CpuKernels, GgufType
from logitkernels.cpu.linear import STORED, CpuLinear
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 30, 9, 3, 64, 49152
BLOCK_SIZE = 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def metadata_of(query_lens: list[int], seq_lens: list[int]) -> AttentionMetadata:
    """Return metadata of sequences whose blocks are in order."""
    width = -(-max(seq_lens) // BLOCK_SIZE)
    tables = torch.arange(len(seq_lens) * width, dtype=torch.int32).view(len(seq_lens), width)
    slots = [
        int(tables[s, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for s, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(seq_len - query_len, seq_len)
    ]
    return AttentionMetadata(
        query_start=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (1,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (1, 3)),
    "Q2_K": (81, 83),
    "Q3_K": (109,),
    "Q6_K": (209,),
    "MXFP4": (0,),
}
"""Bytes of a block that make its scales finite and small if they are 0x20."""


def random_blocks(gguf_type: GgufType, n: int, k: int) -> BlockWeight:
    """Return a weight of random integers with small scales."""
    block, size = STORED[gguf_type]
    raw = torch.randint(0, 256, (n * k // block, size), dtype=torch.uint8)
    raw[:, SCALES[gguf_type.name]] = 0x20
    return BlockWeight("random", raw, gguf_type.name, (n, k))


class Decoder:
    """Random weights of the model's shape, and caches for a batch."""

    def __init__(self, kernels: CpuKernels, gguf_type: GgufType | None = None, *, exact: bool) -> None:
        self.kernels = kernels
        self.gguf_type = gguf_type
        self.exact = exact
        self.layers = [self._layer() for _ in range(LAYERS)]
        self.head = self._linear(VOCAB, HIDDEN)

    def _linear(self, n: int, k: int) -> CpuLinear:
        return self.kernels.pack([self._weight(n, k)], exact=self.exact)

    def _weight(self, n: int, k: int) -> Weight:
        if self.gguf_type is None:
            return DenseWeight("random", (torch.randn(n, k) * k**-0.5).bfloat16())
        return random_blocks(self.gguf_type, n, k)

    def _layer(self) -> DecoderLayerWeights:
        return DecoderLayerWeights(
            input_norm=torch.ones(HIDDEN),
            qkv=self._linear(QKV, HIDDEN),
            q_norm=None,
            k_norm=None,
            output=self._linear(HIDDEN, HIDDEN),
            post_attention_norm=torch.ones(HIDDEN),
            gate_up=self._linear(2 * INTERMEDIATE, HIDDEN),
            down=self._linear(HIDDEN, INTERMEDIATE),
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            eps=1e-5,
            attention=AttentionOptions(HEAD_DIM**-0.5),
        )

    def linears(self, rows: int) -> Callable[[], None]:
        narrow, wide = torch.randn(rows, HIDDEN), torch.randn(rows, INTERMEDIATE)

        def run() -> None:
            for layer in self.layers:
                for linear in (layer.qkv, layer.output, layer.gate_up):
                    linear(narrow)
                layer.down(wide)

        return run

    def run_head(self, rows: int) -> Callable[[], None]:
        hidden = torch.randn(rows, HIDDEN)
        return lambda: void(self.head(hidden))

    def caches(self, metadata: AttentionMetadata) -> list[Tensor]:
        """Return keys and values in turn, with the keys transposed as in the engine."""
        blocks = int(metadata.block_tables.max()) + 1

        def cache(*block: int) -> Tensor:
            return torch.randn(blocks, KV_HEADS, *block).bfloat16()

        pairs = [
            (cache(HEAD_DIM, BLOCK_SIZE).transpose(2, 3), cache(BLOCK_SIZE, HEAD_DIM)) for _ in range(LAYERS)
        ]
        return [tensor for pair in pairs for tensor in pair]

    def attention(self, query_lens: list[int], seq_lens: list[int]) -> Callable[[], None]:
        metadata = metadata_of(query_lens, seq_lens)
        caches = self.caches(metadata)
        query, options = torch.randn(sum(query_lens), HEADS, HEAD_DIM), AttentionOptions(HEAD_DIM**-0.5)

        def run() -> None:
            for layer in range(LAYERS):
                self.kernels.paged_attention(
                    query, caches[2 * layer], caches[2 * layer + 1], metadata, options
                )

        return run

    def step(self, query_lens: list[int], seq_lens: list[int]) -> Callable[[], None]:
        metadata = metadata_of(query_lens, seq_lens)
        caches = self.caches(metadata)
        tokens = sum(query_lens)
        hidden, cos, sin = (
            torch.randn(tokens, HIDDEN),
            torch.rand(tokens, HEAD_DIM),
            torch.rand(tokens, HEAD_DIM),
        )
        layers = self.kernels.bind_layers(self.layers, caches[::2], caches[1::2])
        return lambda: void(layers(hidden, cos, sin, metadata))


def format_cases(kernels: CpuKernels) -> dict[str, Callable[[], None]]:
    """Return products with each block format, and the packing of one weight; six weights keep them cold."""
    n = k = 2048
    cases: dict[str, Callable[[], None]] = {}

    def product(linears: list[CpuLinear], rows: int) -> Callable[[], None]:
        x = torch.randn(rows, k)
        return lambda: void([linear(x) for linear in linears])

    for gguf_type in GgufType:
        weights = [random_blocks(gguf_type, n, k) for _ in range(6)]
        linears = [kernels.pack([weight]) for weight in weights]
        for rows in (1, 2, 4, 16, 64):
            cases[f"6 of 2048 x 2048 in {gguf_type.name}, {rows} rows"] = product(linears, rows)
        cases[f"packing 2048 x 2048 in {gguf_type.name}"] = partial(
            lambda weight: void(kernels.pack([weight])), weights[0]
        )
    return cases


def void(_: object) -> None:
    """Drop a result."""


def measure(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return median and least milliseconds of each case; the cases alternate."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(values[1:]), min(values[1:])) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    decoders = {
        f"{name}{' exact' if exact else ''}": Decoder(CpuKernels(), gguf_type, exact=exact)
        for name, gguf_type in (("bf16", None), ("q4_1", GgufType.Q4_1), ("q8_0", GgufType.Q8_0))
        for exact in (False, True)
    }
    cases: dict[str, Callable[[], None]] = {}
    for kind, decoder in decoders.items():
        for rows in (1, 4, 16, 64, 512):
            cases[f"{kind}: linears, {rows} rows"] = decoder.linears(rows)
        for rows in (1, 16):
            cases[f"{kind}: head, {rows} rows"] = decoder.run_head(rows)
        for streams, context in ((1, 256), (16, 256), (1, 2000), (16, 2000)):
            cases[f"{kind}: step, {streams} streams at {context}"] = decoder.step(
                [1] * streams, [context] * streams
            )
        cases[f"{kind}: prefill 512"] = decoder.step([512], [512])
    decoder = decoders["bf16"]
    for streams, context in ((1, 256), (16, 256), (1, 2000), (16, 2000)):
        cases[f"attention, {streams} streams at {context}"] = decoder.attention(
            [1] * streams, [context] * streams
        )
    cases["attention, prefill 512"] = decoder.attention([512], [512])
    cases |= format_cases(CpuKernels())
    cases = {name: run for name, run in cases.items() if options.only in name}
    results = measure(cases, options.rounds)
    for name, value in results.items():
        print(f"{name:40} {value[0]:9.2f} ms, at best {value[1]:9.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
