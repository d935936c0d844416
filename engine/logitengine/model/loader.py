"""Loads a model and everything that is sized by it: kernels, KV cache, limits."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from logitkernels import BlockWeight, Kernels
from logitkernels.backend import load_kernels
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from logitengine.config import EngineConfig
from logitengine.link.messages import ModelInfo
from logitengine.model.attention import ATTENTION_NAME, register_attention
from logitengine.model.checkpoint import Checkpoint, CheckpointError, resolve_checkpoint
from logitengine.model.fuse import Packer, fuse
from logitengine.model.network import Network
from logitengine.model.value_heads import ValueHead, load_value_head
from logitengine.model.weight_sources import (
    Int8Weights,
    ModelWeights,
    StoredWeights,
    WeightSource,
    load_stored_blocks,
)
from logitengine.run.devices import Device, choose_device
from logitengine.run.kv_cache import LayerShape, PagedKVCache, bytes_per_block
from logitengine.run.profiling import largest_step
from logitengine.run.rows import TORCH_DTYPES
from logitengine.run.runner import ModelRunner, probe_layers

logger = logging.getLogger(__name__)

CLASSIFIER_HEAD = "score"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    info: ModelInfo
    runner: ModelRunner
    kernels: Kernels
    device: Device


def load(
    config: EngineConfig, device: Device | None = None, checkpoint: Checkpoint | None = None
) -> LoadedModel:
    """Load what ``config`` names, onto ``device`` in place of the one that it names if one is given.

    ``checkpoint`` is the model's, where it has been resolved.

    Raises CheckpointError for a model that cannot be served, with the reason.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    checkpoint = checkpoint or resolve_checkpoint(config.model)
    try:
        device = device or choose_device(config.device)
        kernels = load_kernels(
            config.kernels, device.torch_device.type, batch_invariant=config.batch_invariant
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if config.dtype == "float16" and kernels.name == "cpu":
        raise CheckpointError(
            "the native CPU kernels compute in bfloat16 or float32; use kernels=reference for float16"
        )
    blocks = _stored_blocks(config, checkpoint, kernels)
    model = _load_model(checkpoint, _dtype(config.dtype), device.torch_device)
    weights: WeightSource = ModelWeights(model)
    if config.weights == "int8":
        weights = Int8Weights(model)
    elif blocks is not None:
        weights = StoredWeights(blocks, weights)
    return prepare(config, checkpoint, model, kernels, device, weights)


def prepare(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    kernels: Kernels,
    device: Device,
    weights: WeightSource | None = None,
) -> LoadedModel:
    """Fuse a model that lies on ``device`` and uses our attention function, and size the KV cache for it.

    The model is used up: what is fused is taken out of it, its linear layers with the weights of ``weights`` if given.

    Raises CheckpointError for a model that cannot be served, with the reason.
    """
    try:
        shapes = probe_layers(model, kernels)
        can_generate = model.get_output_embeddings() is not None
        heads = _heads(config, model, kernels, is_classifier=not can_generate)
        dtype = model.dtype
        own = ModelWeights(model)
        network = fuse(model, Packer(kernels, own, weights or own, exact=dtype == torch.float32), shapes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{type(model).__name__} cannot be served: {error}") from error
    only_fused = {
        "batch_invariant": config.batch_invariant,
        f"weights={config.weights}": config.weights in {"stored", "int8"},
    }
    for option, is_asked in only_fused.items():
        if is_asked and not network.is_fused:
            raise CheckpointError(
                f"{option} was asked for, but {type(model).__name__} runs through transformers' own modules, "
                "which do not offer it"
            )
    logger.info(
        "%s on %s with %s kernels, %s",
        type(model).__name__,
        device.torch_device,
        kernels.name,
        "fused" if network.is_fused else "through transformers' modules",
    )
    longest = _longest(config, model.config)
    vocab_size = model.config.get_text_config().vocab_size
    servable = _Servable(
        config, network, heads, dtype, kernels, device, shapes, longest, vocab_size, can_generate=can_generate
    )
    num_blocks = config.num_blocks or servable.affordable_blocks()
    runner = servable.runner(num_blocks)
    if can_generate:
        _check_head(runner, model, dtype, device)
    if device.captures:
        # Kernels compile here, not in somebody's request.
        largest_step(runner, config, longest=longest, vocab_size=vocab_size, can_generate=can_generate)
        if can_generate:
            runner.record_steps()
    return LoadedModel(
        info=ModelInfo(
            model_path=str(checkpoint.path),
            tokenizer_path=str(checkpoint.tokenizer_path),
            architecture=type(model).__name__,
            vocab_size=vocab_size,
            max_model_len=_max_model_len(config, longest, num_blocks),
            eos_token_ids=_eos_token_ids(model),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device.torch_device),
            kernels=kernels.name,
            batch_invariant=kernels.batch_invariant and network.is_fused,
            block_size=config.block_size,
            num_blocks=num_blocks,
            hidden_size=model.config.get_text_config().hidden_size,
            can_generate=can_generate,
            heads={name: head.num_outputs for name, head in heads.items()},
        ),
        runner=runner,
        kernels=kernels,
        device=device,
    )


@dataclass(frozen=True, slots=True)
class _Servable:
    """A network with all that a runner needs but the KV cache."""

    config: EngineConfig
    network: Network
    value_heads: dict[str, ValueHead]
    dtype: torch.dtype
    kernels: Kernels
    device: Device
    shapes: list[LayerShape]
    longest: int | None
    vocab_size: int
    can_generate: bool

    def runner(self, num_blocks: int) -> ModelRunner:
        kv_cache = PagedKVCache.allocate(
            self.shapes,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            dtype=self.dtype,
            device=self.device.torch_device,
            transposes_keys=self.kernels.transposes_keys and self.config.block_size % 16 == 0,
            joins_layers=self.kernels.reads_strided_caches,
        )
        return ModelRunner(
            self.network,
            self.kernels,
            self.device,
            kv_cache,
            value_heads=self.value_heads,
            max_num_seqs=self.config.max_num_seqs,
            vocab_size=self.vocab_size,
        )

    def affordable_blocks(self) -> int:
        """As many as the memory for the cache holds."""
        budget = self.config.kv_cache_bytes or self.device.kv_cache_bytes(
            self.config.memory_fraction,
            lambda: largest_step(
                self.runner(1),
                self.config,
                longest=self.longest,
                vocab_size=self.vocab_size,
                can_generate=self.can_generate,
            ),
        )
        num_blocks = budget // bytes_per_block(self.shapes, self.config.block_size, self.dtype)
        if num_blocks < 2:
            raise CheckpointError(
                f"the KV cache has {budget} bytes, which hold {max(num_blocks, 0)} blocks; at least 2 are needed: "
                "raise kv_cache_bytes or memory_fraction, or lower max_num_seqs or max_num_batched_tokens"
            )
        return num_blocks


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    register_attention()
    try:
        model_config = AutoConfig.from_pretrained(checkpoint.path)
        _refuse_unsupported(model_config)
        model: PreTrainedModel = _auto_class(model_config).from_pretrained(
            checkpoint.path,
            config=model_config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.name} could not be loaded: {error}") from error
    nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return model


def _stored_blocks(
    config: EngineConfig, checkpoint: Checkpoint, kernels: Kernels
) -> dict[str, BlockWeight] | None:
    if config.weights == "dense":
        return None
    if config.weights == "int8":
        if "Q8_0" not in kernels.block_formats:
            raise CheckpointError(
                f"the {kernels.name} kernels do not multiply weights=int8; the native CPU kernels do"
            )
        return None
    stored = load_stored_blocks(checkpoint.path) if kernels.block_formats else None
    if stored is None and config.weights == "stored":
        raise CheckpointError(
            f"weights=stored needs a GGUF file and kernels that multiply its blocks; {checkpoint.name} with the "
            f"{kernels.name} kernels has neither or one of them"
        )
    return stored


def _check_head(runner: ModelRunner, model: PreTrainedModel, dtype: torch.dtype, device: Device) -> None:
    """Run the head once: what it cannot do must show while the model is loaded, not in somebody's request."""
    config = model.config.get_text_config()
    try:
        logits = runner.head(torch.zeros(1, config.hidden_size, dtype=dtype, device=device.torch_device))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the head of {type(model).__name__} cannot be served: {error}") from error
    if logits.shape != (1, config.vocab_size):
        raise CheckpointError(
            f"the head of {type(model).__name__} gives {logits.shape[-1]} logits for a vocabulary of {config.vocab_size}"
        )


def _auto_class(model_config: PretrainedConfig) -> Any:
    """What the checkpoint says that it is; anything but a sequence classifier is read as a language model."""
    architecture = (model_config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM


def _heads(
    config: EngineConfig, model: PreTrainedModel, kernels: Kernels, *, is_classifier: bool
) -> dict[str, ValueHead]:
    """The heads that were attached by name, and a classifier's own under the name `score`."""
    hidden_size = model.config.get_text_config().hidden_size
    heads = {
        name: load_value_head(name, path, hidden_size, kernels, model.device)
        for name, path in config.value_head.items()
    }
    if is_classifier:
        score = getattr(model, CLASSIFIER_HEAD, None)
        if not isinstance(score, nn.Linear):
            raise CheckpointError(
                f"{type(model).__name__} has neither a language-model head nor a linear score"
            )
        heads.setdefault(
            CLASSIFIER_HEAD, ValueHead.from_weights(score.weight, score.bias, kernels, model.device)
        )
    return heads


def _refuse_unsupported(model_config: PretrainedConfig) -> None:
    """Name what the attention function cannot see in its kwargs and would otherwise get silently wrong."""
    config = model_config.get_text_config()
    rope_types = _rope_types(getattr(config, "rope_parameters", None) or {})
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = sorted(layer_types - {"full_attention", "sliding_attention"})
    reasons = {
        f"layers of type {', '.join(unknown)}": bool(unknown),
        # Their frequencies follow the longest sequence of the batch, so a neighbour would change a request's logits.
        f"{', '.join(sorted(rope_types))} rotary embeddings": not rope_types.isdisjoint(
            {"dynamic", "longrope"}
        ),
        "chunked attention": bool(getattr(config, "attention_chunk_size", None)),
        "bidirectional attention": getattr(config, "is_causal", True) is False
        or bool(getattr(config, "use_bidirectional_attention", False)),
        "an encoder": bool(getattr(config, "is_encoder_decoder", False)),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{model_config.model_type} has {reason}, which is not supported")


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """The types of a model's rotary embeddings, of which some models have one for each type of layer."""
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return {part.get("rope_type", "default") for part in nested or [parameters]}


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "auto" else TORCH_DTYPES[name]


def _longest(config: EngineConfig, model_config: PretrainedConfig) -> int | None:
    """The model's own limit or a shorter one that was asked for; None where there is neither."""
    own: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if config.max_model_len is not None and own is not None and config.max_model_len > own:
        raise CheckpointError(f"max_model_len={config.max_model_len} exceeds the model's own {own} positions")
    return own if config.max_model_len is None else config.max_model_len


def _max_model_len(config: EngineConfig, longest: int | None, num_blocks: int) -> int:
    """``longest``, and no more than one sequence can have of the cache."""
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise CheckpointError(
            f"max_model_len={config.max_model_len} needs more than the {capacity} tokens of the KV cache; "
            "raise kv_cache_bytes"
        )
    return capacity if longest is None else min(longest, capacity)


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The generation config's, else the model config's; either may be one id, several or none."""
    generation_config = getattr(model, "generation_config", None)  # a classifier has none
    generation = generation_config.eos_token_id if generation_config is not None else None
    found = generation if generation is not None else model.config.get_text_config().eos_token_id
    if found is None:
        return []
    return sorted(found) if isinstance(found, list) else [int(found)]
