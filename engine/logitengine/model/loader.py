"""Loading of a model by its options: kernels, weights, network, cache."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from logitkernels import Kernels
from logitkernels.backend import load_kernels
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.link.messages import EncoderInfo, ModelInfo
from logitengine.model.checkpoint import Checkpoint, resolve_checkpoint
from logitengine.model.cpus import num_usable_cpus
from logitengine.model.fingerprint import WeightsDigest, digest_of_config, fingerprint
from logitengine.model.fuse import Packer, fuse, is_known
from logitengine.model.gguf.model import GgufModel
from logitengine.model.image_encoder import ImageEncoder
from logitengine.model.image_families import FAMILIES
from logitengine.model.layer_shapes import probe_layers
from logitengine.model.network import Network
from logitengine.model.pretrained import eos_token_ids, load_pretrained, max_positions, model_type
from logitengine.model.text_part import take_text_part
from logitengine.model.value_heads import value_heads_of
from logitengine.model.weight_sources import Int8Weights, ModelWeights, WeightSource
from logitengine.run.devices import Device, choose_device
from logitengine.run.kv_cache import bytes_per_block
from logitengine.run.rows import TORCH_DTYPES
from logitengine.run.runner import ModelRunner
from logitengine.run.sizing import RunnerFactory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    info: ModelInfo
    runner: ModelRunner
    kernels: Kernels
    device: Device


def load(
    config: EngineConfig, device: Device | None = None, checkpoint: Checkpoint | None = None
) -> LoadedModel:
    """Load the model that ``config`` names, onto ``device`` if given, else onto the device that ``config`` names.

    ``checkpoint`` is the model's checkpoint, if it is already resolved.

    Raises CheckpointError for a model that cannot be served, with the reason.
    """
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.num_threads or num_usable_cpus())
    checkpoint = checkpoint or resolve_checkpoint(config.model, config.prepared)
    try:
        device = device or choose_device(config.device)
        kernels = load_kernels(
            config.kernels,
            device.torch_device.type,
            batch_invariant=config.batch_invariant,
            prebuilt=config.prepared_kernels,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if config.dtype == "float16" and kernels.name == "cpu":
        raise CheckpointError(
            "the native CPU kernels compute in bfloat16 or float32; use kernels=reference for float16"
        )
    _check_weights_option(config, checkpoint, kernels)
    dtype = torch.bfloat16 if config.dtype == "auto" else TORCH_DTYPES[config.dtype]
    if checkpoint.is_gguf:
        gguf = GgufModel(checkpoint.path, dtype, device.torch_device)
        digest = WeightsDigest(gguf.paths, gguf.members)
        weights = _gguf_weights(config, gguf, kernels)
        loaded = prepare(config, checkpoint, gguf.skeleton, kernels, device, weights, digest, gguf=gguf)
    else:
        digest = WeightsDigest.of_directory(checkpoint.path)
        model = load_pretrained(checkpoint, dtype, device.torch_device)
        whole: PreTrainedModel | None = None
        family: str | None = None
        if model.config.model_type in FAMILIES and model.get_output_embeddings() is not None:
            model, whole, family = take_text_part(model), model, model_type(checkpoint)
        own = ModelWeights(model)
        rounded = Int8Weights(own) if config.weights == "int8" else None
        loaded = prepare(config, checkpoint, model, kernels, device, rounded, digest, whole, family)
    logger.info("loaded %s", config.model, extra={"seconds": round(time.monotonic() - started, 1)})
    return loaded


def prepare(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    kernels: Kernels,
    device: Device,
    weights: WeightSource | None = None,
    digest: WeightsDigest | None = None,
    whole: PreTrainedModel | None = None,
    family: str | None = None,
    gguf: GgufModel | None = None,
) -> LoadedModel:
    """Fuse a model on ``device`` that uses the project's attention function, and size the KV cache for it.

    The model cannot be used afterwards, because fused parts are taken out of it. Its linear layers use the
    weights of ``weights`` if given. ``digest`` is the checkpoint's; without one, as for a model that was built in
    memory, the fingerprint knows the config alone. ``whole`` is the image-text model that the model was taken out of,
    and ``family`` its checkpoint's ``model_type`` if it is not the config's.
    ``gguf`` fills the model if it is the skeleton of a GGUF file.

    Raises CheckpointError for a model that cannot be served, with the reason.
    """
    architecture = type(whole or model).__name__
    dtype, can_generate = model.dtype, model.get_output_embeddings() is not None
    text_config = model.config.get_text_config()
    encoder: ImageEncoder | None = None
    try:
        if whole is not None:
            image_part = getattr(whole, whole.base_model_prefix)
            format_name = family or whole.config.model_type
            encoder = ImageEncoder(
                image_part,
                format_name,
                kernels,
                exact=dtype == torch.float32,
                max_tokens=config.max_image_tokens,
            )
            missing = _why_no_images(encoder.info, config, kernels)
            if missing is not None:
                logger.info("images are not read: %s", missing)
                encoder = None
        is_skeleton = gguf is not None and is_known(model)
        if gguf is not None and not is_skeleton:
            gguf.fill()
        shapes = probe_layers(model, kernels)
        if gguf is not None and is_skeleton:
            gguf.fill_small(torch.float32 if kernels.block_formats else dtype)
        heads = value_heads_of(
            model, config.value_head, kernels, device.torch_device, is_classifier=not can_generate
        )
        own: WeightSource = ModelWeights(model) if gguf is None else gguf.weights()
        packer = Packer(kernels, own, weights or own, exact=dtype == torch.float32)
        depth = 0 if encoder is None else encoder.info.depth
        network = fuse(model, packer, shapes, depth, None if gguf is None else gguf.embedding)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{architecture} cannot be served: {error}") from error
    _refuse_unfused(config, model, network)
    if can_generate:
        _check_head(network, model, dtype, device)
    way = "fused" if network.is_fused else "through transformers' modules"
    logger.info("%s on %s with %s kernels, %s", architecture, device.torch_device, kernels.name, way)
    factory = RunnerFactory(
        config=config,
        network=network,
        value_heads=heads,
        encoder=encoder,
        kernels=kernels,
        device=device,
        shapes=shapes,
        dtype=dtype,
        vocab_size=text_config.vocab_size,
        longest=_longest(config, max_positions(model)),
        can_generate=can_generate,
    )
    runner = factory.runner()
    stored_as = _stored_as(config, packer, is_fused=network.is_fused)
    dtype_name = str(dtype).removeprefix("torch.")
    info = ModelInfo(
        model_path=str(checkpoint.path),
        tokenizer_path=str(checkpoint.tokenizer_path),
        architecture=architecture,
        vocab_size=text_config.vocab_size,
        max_model_len=factory.max_model_len(runner.kv_cache.num_blocks),
        eos_token_ids=eos_token_ids(model),
        dtype=dtype_name,
        device=str(device.torch_device),
        kernels=kernels.name,
        weights=stored_as,
        batch_invariant=kernels.batch_invariant and network.is_fused,
        block_size=config.block_size,
        num_blocks=runner.kv_cache.num_blocks,
        kv_cache_bytes=runner.kv_cache.num_blocks * bytes_per_block(shapes, config.block_size, dtype),
        hidden_size=text_config.hidden_size,
        can_generate=can_generate,
        heads={name: head.num_outputs for name, head in heads.items()},
        encoder=None if encoder is None else encoder.info,
        fingerprint=fingerprint(
            digest.result() if digest is not None else digest_of_config(model.config.to_dict()),
            stored_as,
            dtype_name,
            kernels,
            device,
            is_fused=network.is_fused,
            reads_images=encoder is not None,
        ),
    )
    return LoadedModel(info, runner, kernels, device)


def _why_no_images(encoder: EncoderInfo, config: EngineConfig, kernels: Kernels) -> str | None:
    """Return why images of this model cannot be read, if the tokens of an image attend to each other."""
    if not encoder.joins_tokens:
        return None
    if not kernels.honours_key_ends:
        return f"the tokens of an image attend to each other, which the {kernels.name} kernels do not compute"
    longest = min(config.max_prefill_chunk or config.max_num_batched_tokens, config.max_num_batched_tokens)
    if encoder.num_tokens + config.max_num_seqs <= longest:
        return None
    return (
        f"the {encoder.num_tokens} tokens of an image are computed in one step, beside those of {config.max_num_seqs} other "
        f"sequences, and a step has {longest}: raise --max-num-batched-tokens or --max-prefill-chunk, or lower --max-num-seqs"
    )


def _stored_as(config: EngineConfig, packer: Packer, *, is_fused: bool) -> str:
    """Return how the linear layers store their weights, as /v1/models shows it."""
    blocks = sorted(packer.formats - {"dense"})
    if not is_fused or not blocks:
        return "dense"
    if config.weights == "int8":
        return "int8 (Q8_0)"
    return f"stored ({', '.join(blocks)})" + (", dense" if "dense" in packer.formats else "")


def _gguf_weights(config: EngineConfig, gguf: GgufModel, kernels: Kernels) -> WeightSource:
    if config.weights == "int8":
        return Int8Weights(gguf.weights(dtype=torch.float32))
    return gguf.weights(frozenset() if config.weights == "dense" else kernels.block_formats)


def _check_weights_option(config: EngineConfig, checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Refuse a form of weights that cannot be had. Raises CheckpointError."""
    if config.weights == "int8" and "Q8_0" not in kernels.block_formats:
        raise CheckpointError(
            f"the {kernels.name} kernels do not multiply weights=int8; the native CPU kernels do"
        )
    if config.weights == "stored" and not (checkpoint.is_gguf and kernels.block_formats):
        raise CheckpointError(
            f"weights=stored needs a GGUF file and kernels that multiply its blocks; {checkpoint.name} with the "
            f"{kernels.name} kernels has neither or one of them"
        )


def _refuse_unfused(config: EngineConfig, model: PreTrainedModel, network: Network) -> None:
    """Refuse options that only fused networks honour. Raises CheckpointError."""
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


@torch.inference_mode()
def _check_head(network: Network, model: PreTrainedModel, dtype: torch.dtype, device: Device) -> None:
    """Run the head once, so that an unsupported head fails while the model is loaded and not in a request."""
    config = model.config.get_text_config()
    try:
        logits = network.head(torch.zeros(1, config.hidden_size, dtype=dtype, device=device.torch_device))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the head of {type(model).__name__} cannot be served: {error}") from error
    if logits.shape != (1, config.vocab_size):
        raise CheckpointError(
            f"the head of {type(model).__name__} gives {logits.shape[-1]} logits for a vocabulary of {config.vocab_size}"
        )


def _longest(config: EngineConfig, own: int | None) -> int | None:
    """Return the model's own limit or a shorter one from the options; None if there is neither."""
    if config.max_model_len is not None and own is not None and config.max_model_len > own:
        raise CheckpointError(
            f"--max-model-len {config.max_model_len} exceeds the model's own {own} positions"
        )
    return own if config.max_model_len is None else config.max_model_len
