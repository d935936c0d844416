"""A checkpoint as transformers' own model, and facts from its configuration."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import CONFIG
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.checkpoint.safetensors_files import COPIED_BUFFERS, some
from logitengine.model.image_text.families import FAMILIES, INTERNVL_CHAT
from logitengine.model.image_text.internvl_chat import load_internvl_chat
from logitengine.model.network.attention import ATTENTION_NAME, register_attention

logger = logging.getLogger(__name__)

MISFITS = (
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)
"""Errors of transformers where a config makes no model or the weights do not fit it."""

POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "logits_scaling",
    "max_position_embeddings",
)
POSITIVE_IN_ROPE = ("rope_theta", "factor")
"""Members of a config, and of its rotary parameters, that are above 0 in every model."""

IMAGE_MODEL_ATTENTION = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}


def load_pretrained(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model onto ``device``, with the project's attention function. Raises CheckpointError if unsupported."""
    register_attention()
    try:
        model = _from_files(checkpoint, dtype)
    except (*MISFITS, OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.name} could not be loaded: {error}") from error
    nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return model


def _from_files(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel
    if model_type(checkpoint) == INTERNVL_CHAT:
        model = load_internvl_chat(checkpoint.path, dtype, {**IMAGE_MODEL_ATTENTION})
        refuse_unsupported(model.config)
        return model
    model_config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    refuse_unsupported(model_config)
    attention: str | dict[str, str] = ATTENTION_NAME
    if model_config.model_type in FAMILIES:
        attention = {**IMAGE_MODEL_ATTENTION}
    # Tensors that are missing would be drawn at random, with a table of them in the log.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, found = _auto_class(model_config).from_pretrained(
            checkpoint.path,
            config=model_config,
            quantization_config=_dequantisation(model_config),
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    _refuse_misfits(model, found)
    return model


def _dequantisation(model_config: PretrainedConfig) -> Mxfp4Config | None:
    """Return what makes transformers dequantise MXFP4 on every machine; else it runs kernels from the hub on some GPUs."""
    holders = (model_config, model_config.get_text_config())
    is_quantised = any(getattr(holder, "quantization_config", None) is not None for holder in holders)
    return Mxfp4Config(dequantize=True) if is_quantised else None


def _refuse_misfits(model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ValueError for weights that are missing, do not fit the model, or would change the output of its layers.

    Others that it has no place for, such as a draft head, are told in a warning.
    """
    for name, own, needed in sorted(found["mismatched_keys"]):
        raise ValueError(f"{name} is {list(own)}, and by {CONFIG} it is {list(needed)}")
    if missing := found["missing_keys"]:
        raise ValueError(f"its files lack {some(missing)}")
    unused = {name for name in found["unexpected_keys"] if not COPIED_BUFFERS.fullmatch(name)}
    if changing := _within_layers(model, unused):
        raise ValueError(f"its files hold {some(changing)}, which {type(model).__name__} does not have")
    if unused:
        logger.warning("weights are left out, for which the model has no place: %s", some(unused))


def _within_layers(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return the names that lie in layers of the model, or beside the parameters of one of its modules."""
    modules = dict(model.named_modules())
    places = {name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))}
    stacks = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    layers = {name for name in modules if name.rpartition(".")[0] in stacks}

    def is_within(name: str) -> bool:
        parts = name.split(".")
        parents = [".".join(parts[:length]) for length in range(1, len(parts))]
        return bool(parents) and (parents[-1] in places or not layers.isdisjoint(parents))

    # Files of a bare decoder leave out its prefix.
    return [name for name in names if is_within(name) or is_within(f"{model.base_model_prefix}.{name}")]


def model_type(checkpoint: Checkpoint) -> str:
    """Return the ``model_type`` of the checkpoint's config."""
    config = json.loads((checkpoint.path / CONFIG).read_bytes())
    return str(config.get("model_type", ""))


def _auto_class(model_config: PretrainedConfig) -> Any:
    """Return the class named by the checkpoint; anything but a sequence classifier is loaded as a language model."""
    architecture = (model_config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if model_config.model_type in FAMILIES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def refuse_unsupported(model_config: PretrainedConfig) -> None:
    """Refuse features that do not reach the attention function's kwargs and would silently be wrong.

    Raises ValueError.
    """
    config = model_config.get_text_config()
    rope_types = _rope_types(getattr(config, "rope_parameters", None) or {})
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = sorted(layer_types - {"full_attention", "sliding_attention"})
    reasons = {
        f"layers of type {', '.join(unknown)}": bool(unknown),
        # Their frequencies follow the longest sequence of the batch, so another request would change a
        # request's logits. Dynamic ones do only beyond max_position_embeddings, and no sequence is longer.
        f"{', '.join(sorted(rope_types))} rotary embeddings": "longrope" in rope_types
        or ("dynamic" in rope_types and not getattr(config, "max_position_embeddings", None)),
        "chunked attention": bool(getattr(config, "attention_chunk_size", None)),
        "bidirectional attention": getattr(config, "is_causal", True) is False
        or bool(getattr(config, "use_bidirectional_attention", False)),
        "an encoder": bool(getattr(config, "is_encoder_decoder", False)),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{model_config.model_type} has {reason}, which is not supported")
    _refuse_numbers(config)


def _refuse_numbers(config: PretrainedConfig) -> None:
    """Refuse numbers under a root or a bar that are not above 0, which make NaN of rows, and shares above 1, for which
    transformers makes a table of any size. Raises ValueError.
    """
    ropes = _rope_parts(getattr(config, "rope_parameters", None) or {})
    numbers = [(name, getattr(config, name, None)) for name in POSITIVE]
    numbers += [(name, rope.get(name)) for rope in ropes for name in POSITIVE_IN_ROPE]
    for name, number in numbers:
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            raise ValueError(f"{config.model_type} has {name} {number!r}, which is no number above 0")
    for rope in ropes:
        share = rope.get("partial_rotary_factor")
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise ValueError(f"{config.model_type} has partial_rotary_factor {share!r}, which is no share")


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Return the types of a model's rotary embeddings; some models have one per type of layer."""
    return {part.get("rope_type", "default") for part in _rope_parts(parameters)}


def _rope_parts(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in parameters.values() if isinstance(part, dict)] or [parameters]


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """Return the generation config's EOS ids, else the model config's; either may hold one id, several or none.

    Ids beyond the vocabulary are left out, with a warning. Raises CheckpointError for what is no id.
    """
    generation_config = getattr(model, "generation_config", None)  # a classifier has none
    generation = generation_config.eos_token_id if generation_config is not None else None
    found = generation if generation is not None else model.config.get_text_config().eos_token_id
    listed = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token_id) is int for token_id in listed):
        raise CheckpointError(f"{type(model).__name__} cannot be served: its eos_token_id is {found!r}")
    num_tokens = model.config.get_text_config().vocab_size
    if unknown := [token_id for token_id in listed if not 0 <= token_id < num_tokens]:
        logger.warning("eos_token_id %s is beyond the %d tokens, and ends no answer", unknown, num_tokens)
    return sorted(set(listed) - set(unknown))


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model was made for; None if its config names none."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest
