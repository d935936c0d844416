"""Parts of configs that several architectures have. Free of torch."""

from __future__ import annotations

from typing import Any

from logitengine.model.gguf.keys import Keys

Config = dict[str, Any]
"""Members of transformers' config."""


def whole_rotary(keys: Keys, config: Config) -> None:
    """Check that all dimensions of a head rotate."""
    keys.must_be("rope.dimension_count", config["head_dim"])


def partial_rotary(keys: Keys, config: Config) -> Config:
    """Return the share of a head's dimensions that rotate."""
    head_dim = config["head_dim"]
    rotary = keys.size("rope.dimension_count", head_dim)
    if rotary > head_dim or rotary % 2:
        raise keys.damaged(f"{rotary} of the {head_dim} dimensions of a head rotate")
    return {"rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": rotary / head_dim}}


SOFTMAX, SIGMOID, SOFTMAX_OF_USED = 1, 2, 3
"""Values of ``expert_gating_func``: what makes the experts' weights of the router's outputs."""


def check_experts(keys: Keys, gating: int = SOFTMAX) -> None:
    """Check that the weights of experts are ``gating``'s, normed and unscaled, and that no expert is shared."""
    keys.must_be("expert_gating_func", gating)
    keys.must_be("expert_weights_norm", True)
    keys.must_be("expert_weights_scale", 1.0)
    keys.must_be("expert_shared_count", 0)
    keys.must_be("expert_shared_feed_forward_length", 0)


def used_experts(keys: Keys) -> int:
    """Return how many experts a token takes."""
    experts, used = keys.size("expert_count"), keys.size("expert_used_count")
    if used > experts:
        raise keys.damaged(f"a token takes {used} of {experts} experts")
    return used


def rms(keys: Keys) -> Config:
    """Return the epsilon of RMS norms."""
    return {"rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")}


def softcap(keys: Keys, key: str, default: float = 0.0) -> float | None:
    """Return the bound that logits are squashed into; None if the file has 0, or nothing and ``default`` is 0."""
    return keys.number(key, default) or None


def layer_types(keys: Keys, config: Config, period: int) -> list[str]:
    """Return the layers' kinds: the last of each ``period`` sees everything, unless the file lists them."""
    layers = config["num_hidden_layers"]
    listed = keys.array("attention.sliding_window_pattern")
    if listed is not None:
        is_sliding = [bool(value) for value in listed]
        if len(is_sliding) != layers:
            keys.must_be("attention.sliding_window_pattern")
    else:
        period = keys.integer("attention.sliding_window_pattern", period)
        is_sliding = [period > 0 and (layer + 1) % period > 0 for layer in range(layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
