"""Models whose shapes are measured, and the sizes of the batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers of a model's published config.json that determine its speed."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    eps: float
    is_qwen: bool
    ties_embeddings: bool

    def config(self) -> PreTrainedConfig:
        """Return the config of the model's own architecture, without an end token."""
        options: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.ties_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        return Qwen2Config(**options) if self.is_qwen else LlamaConfig(**options, head_dim=self.head_dim)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


LLAMA_8B = ModelShape(
    "Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256, 8192, 5e5, 1e-5, is_qwen=False, ties_embeddings=False
)
QWEN_05B = ModelShape(
    "Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64, 151936, 32768, 1e6, 1e-6, is_qwen=True, ties_embeddings=True
)
TINY_LLAMA = ModelShape(
    "tiny Llama", 64, 96, 2, 4, 2, 16, 300, 256, 1e4, 1e-5, is_qwen=False, ties_embeddings=False
)
TINY_QWEN = ModelShape(
    "tiny Qwen", 32, 48, 1, 2, 1, 16, 300, 256, 1e4, 1e-6, is_qwen=True, ties_embeddings=True
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Amounts that are computed at once. ``tiny`` is for trying the benchmark in Triton's interpreter.

    Attributes:
        causal: tokens of a prompt that is read whole; ``chunk`` of them at the end of ``chunk_end``.
        context, long_context: tokens in the cache of each decoding sequence, and of a lone one.
        decode: numbers of decoding sequences; those in ``invariant`` are also measured with batch_invariant.
        tokens: rows of a matrix product.
        pointwise: tokens of norms, activations and stores.
        rows: rows of logits.
        top_k: logits returned per row.
        prompt, answer: tokens of each request of a whole model. A step holds ``budget`` tokens of the
            ``prefill`` prompts of ``prefill_prompt`` tokens.
    """

    causal: int = 4096
    chunk: int = 512
    chunk_end: int = 8192
    context: int = 2048
    long_context: int = 32768
    decode: tuple[int, ...] = (1, 8, 64, 256)
    invariant: tuple[int, ...] = (1, 64)
    tokens: tuple[int, ...] = (1, 64, 512, 4096)
    pointwise: tuple[int, ...] = (64, 4096)
    rows: tuple[int, ...] = (1, 64)
    top_k: int = 20
    prompt: int = 128
    answer: int = 128
    prefill: int = 16
    prefill_prompt: int = 1024
    budget: int = 4096


TINY_SIZES = Sizes(
    causal=20,
    chunk=5,
    chunk_end=40,
    context=20,
    long_context=40,
    decode=(1, 3),
    invariant=(1,),
    tokens=(1, 5),
    pointwise=(3,),
    rows=(1, 2),
    top_k=5,
    prompt=5,
    answer=3,
    prefill=2,
    prefill_prompt=8,
    budget=16,
)
