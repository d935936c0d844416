"""Write a GGUF file of Llama 3 8B's shape in Q4_K_M, with random weights.

    python benchmarks/random_gguf.py /tmp/llama-3-8b.gguf              # 4.9 GB
    python benchmarks/random_gguf.py /tmp/small.gguf --layers 2        # a small one, to try it

The formats of its tensors are those that llama.cpp chooses for Q4_K_M. The vocabulary is made of bytes and of what pairs of
them merge to, so that both this project and llama.cpp can read it. The weights make no sense; their sizes do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 4096, 14_336, 32, 32, 8
VOCABULARY = 128_256
CONTEXT = 8192
SCALE = 2e-4
"""Mean of the float16 scales of the blocks, which keeps activations finite."""

FLOAT16_AT = {"Q4_K": (0, 2), "Q6_K": (208,)}
"""Offsets of the float16 scales in a block."""


@dataclass(frozen=True)
class RandomTensor:
    name: str
    shape: tuple[int, ...]
    kind: str = "F32"

    @property
    def nbytes(self) -> int:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return prod(self.shape) // weights * size

    def numbers(self) -> NDArray[np.generic]:
        """Return ones for a norm, else blocks of random bytes between finite scales."""
        if self.kind == "F32":
            return np.ones(self.shape, np.float32)
        _, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        generator = np.random.default_rng(prod(self.shape))
        blocks = generator.integers(0, 256, (self.nbytes // size, size), np.uint8)
        for offset in FLOAT16_AT[self.kind]:
            scales = generator.normal(0, SCALE, (len(blocks), 1)).astype(np.float16)
            blocks[:, offset : offset + 2] = scales.view(np.uint8)
        return blocks.reshape(*self.shape[:-1], -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    write_random_gguf(arguments.path, arguments.layers)
    print(f"{arguments.path}: {arguments.path.stat().st_size / 1e9:.2f} GB")


def write_random_gguf(path: Path, num_layers: int) -> None:
    """Write the file, one tensor in memory at a time."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    add_vocabulary(writer)
    tensors = list(tensors_of(num_layers))
    for tensor in tensors:
        raw_dtype = GGMLQuantizationType[tensor.kind]
        shape = (
            tensor.shape if tensor.kind == "F32" else (*tensor.shape[:-1], tensor.nbytes // tensor.shape[0])
        )
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.numbers())
    writer.close()


def tensors_of(num_layers: int) -> Iterator[RandomTensor]:
    kv = HIDDEN // HEADS * KV_HEADS
    yield RandomTensor("token_embd.weight", (VOCABULARY, HIDDEN), "Q4_K")
    for layer in range(num_layers):
        finer = "Q6_K" if has_finer_blocks(layer, num_layers) else "Q4_K"
        yield RandomTensor(f"blk.{layer}.attn_norm.weight", (HIDDEN,))
        yield RandomTensor(f"blk.{layer}.attn_q.weight", (HIDDEN, HIDDEN), "Q4_K")
        yield RandomTensor(f"blk.{layer}.attn_k.weight", (kv, HIDDEN), "Q4_K")
        yield RandomTensor(f"blk.{layer}.attn_v.weight", (kv, HIDDEN), finer)
        yield RandomTensor(f"blk.{layer}.attn_output.weight", (HIDDEN, HIDDEN), "Q4_K")
        yield RandomTensor(f"blk.{layer}.ffn_norm.weight", (HIDDEN,))
        yield RandomTensor(f"blk.{layer}.ffn_gate.weight", (INTERMEDIATE, HIDDEN), "Q4_K")
        yield RandomTensor(f"blk.{layer}.ffn_up.weight", (INTERMEDIATE, HIDDEN), "Q4_K")
        yield RandomTensor(f"blk.{layer}.ffn_down.weight", (HIDDEN, INTERMEDIATE), finer)
    yield RandomTensor("output_norm.weight", (HIDDEN,))
    yield RandomTensor("output.weight", (VOCABULARY, HIDDEN), "Q6_K")


def has_finer_blocks(layer: int, num_layers: int) -> bool:
    """Whether the layer's values and its last matrix are in Q6_K: the first and last eighth, and each third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= num_layers - eighth or (layer - eighth) % 3 == 2


def add_vocabulary(writer: GGUFWriter) -> None:
    """Add bytes, pairs of bytes and triples, each with the merge that makes it, and two control tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    pairs = list(product(alphabet, repeat=2))
    triples = islice(product(map("".join, pairs), alphabet), VOCABULARY - 2 - len(alphabet) - len(pairs))
    merges = [*pairs, *triples]
    tokens = [*alphabet, *map("".join, merges), "<|begin_of_text|>", "<|end_of_text|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 2) + [3] * 2)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)


if __name__ == "__main__":
    main()
