"""From a GGUF file's metadata to the configuration of transformers' model. Free of torch.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the conversion scripts of llama.cpp for what
they leave out because llama.cpp knows it by the architecture's name.
"""

from __future__ import annotations

import math

from logitengine.errors import CheckpointError
from logitengine.model.gguf.architectures import CONFIGS
from logitengine.model.gguf.config_parts import Config
from logitengine.model.gguf.deepseek import latent_heads
from logitengine.model.gguf.header import Header, StringArray
from logitengine.model.gguf.keys import Keys

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def model_config(header: Header) -> Config:
    """Return the members of transformers' config. Raises CheckpointError for what is not supported, by its name."""
    keys = Keys(header)
    if keys.architecture not in CONFIGS:
        raise CheckpointError(
            f"{header.path} cannot be served: architecture {keys.architecture} is not among {', '.join(sorted(CONFIGS))}"
        )
    config = _common(keys, header) | {"rope_parameters": _rope(keys)}
    config |= (latent_heads if keys.architecture == "deepseek2" else _heads)(keys, config)
    config |= CONFIGS[keys.architecture](keys, config)
    keys.check_all_read()
    return config


def _common(keys: Keys, header: Header) -> Config:
    """Return what all architectures have."""
    hidden, heads, layers = (
        keys.size(key) for key in ("embedding_length", "attention.head_count", "block_count")
    )
    if layers > len(header.tensors):
        raise keys.damaged(f"it counts {layers} layers and has {len(header.tensors)} tensors")
    keys.must_be("attention.causal", True)
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": keys.size("context_length"),
        "vocab_size": _vocab_size(keys, header, hidden),
        "tie_word_embeddings": HEAD not in header.tensors,
        "bos_token_id": keys.token_id("bos_token_id"),
        "eos_token_id": _end_token_ids(keys),
        "pad_token_id": None,
    }


def _heads(keys: Keys, config: Config) -> Config:
    """Return the shape of attention whose keys and values are of one size."""
    heads = config["num_attention_heads"]
    kv_heads = keys.size("attention.head_count_kv", heads)
    head_dim = keys.size("attention.key_length", config["hidden_size"] // heads)
    if heads % kv_heads or head_dim % 2:
        raise keys.damaged(
            f"it counts {heads} heads and {kv_heads} for keys, with {head_dim} dimensions each"
        )
    keys.must_be("attention.value_length", head_dim)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _vocab_size(keys: Keys, header: Header, hidden: int) -> int:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise CheckpointError(f"{header.path} is damaged: it has no {EMBEDDING} with rows of {hidden}")
    rows = embedding.shape[0]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray) or len(tokens) != rows:
        found = len(tokens) if isinstance(tokens, StringArray) else "none"
        raise CheckpointError(
            f"{header.path} is damaged: tokenizer.ggml.tokens has {found}, and {EMBEDDING} has {rows} rows"
        )
    keys.must_be("vocab_size", rows)
    return rows


def _end_token_ids(keys: Keys) -> list[int]:
    """Return the ids that end an answer: of a text, of a turn, of a message."""
    found = (keys.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return sorted({token_id for token_id in found if token_id is not None})


def _rope(keys: Keys) -> Config:
    """Return the parameters of the rotary embedding, with its scaling."""
    rope: Config = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    keys.integer("rope.scaling.original_context_length", 0)  # of no consequence without YaRN
    if kind == "none" and keys.has("rope.scale_linear"):
        kind = "linear"
    if kind == "linear" and factor != 1:
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | _yarn(keys, factor)
    if kind != "linear":
        keys.must_be("rope.scaling.type", "none")
    if kind == "none":
        keys.must_be("rope.scaling.factor", 1.0, 0.0)
    return rope


def _yarn(keys: Keys, factor: float) -> Config:
    keys.must_be("rope.scaling.yarn_ext_factor", 1.0)
    scale = keys.number("rope.scaling.attn_factor", keys.number("rope.scaling.yarn_attn_factor", 1.0))
    original = keys.size("rope.scaling.original_context_length")
    if not keys.has("rope.scaling.factor"):
        raise keys.damaged("its rotary embedding is scaled by YaRN, and has no rope.scaling.factor")
    if factor < 1:
        keys.must_be("rope.scaling.factor", 1.0)
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if scale != 1:
        found["attention_factor"] = scale * (0.1 * math.log(factor) + 1)
    return found
