"""Loading of a model by its options: kernels, weights, network, cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from logitkernels import Kernels, Linear
from logitkernels.backend import load_kernels
from logitkernels.cpu.errors import BuildError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.link.messages import EncoderInfo, ModelInfo
from logitengine.model.checkpoint.resolve import Checkpoint, resolve_checkpoint
from logitengine.model.cpus import num_usable_cpus
from logitengine.model.fingerprint import WeightsDigest, digest_of_config, fingerprint
from logitengine.model.gguf.model import GgufModel
from logitengine.model.image_text.encoder import ImageEncoder
from logitengine.model.image_text.families import FAMILIES
from logitengine.model.image_text.text_part import take_text_part
from logitengine.model.int4.model import Int4Model
from logitengine.model.network.fuse import Packer, fuse, is_known
from logitengine.model.network.layer_shapes import LayerShape, probe_layers
from logitengine.model.network.network import Network, TransformersNetwork
from logitengine.model.network.packing import modules_to_pack, pack_modules
from logitengine.model.network.value_heads import value_heads_of
from logitengine.model.parameter_names import HEAD_PARAMETER
from logitengine.model.pretrained import MISFITS, eos_token_ids, load_pretrained, max_positions, model_type
from logitengine.model.skeleton import StoredModel
from logitengine.model.weight_sources import Int4Weights, Int8Weights, ModelWeights, WeightSource
from logitengine.run.devices import Device, choose_device
from logitengine.run.kv_cache import bytes_per_block
from logitengine.run.rows import TORCH_DTYPES
from logitengine.run.runner import ModelRunner
from logitengine.run.sizing import RunnerFactory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rounding:
    """A block format that the weights of any model can be rounded to, and the source that rounds them."""

    format: str
    source: Callable[[WeightSource], WeightSource]


ROUNDED = {"int8": Rounding("Q8_0", Int8Weights), "int4": Rounding("INT4_32", Int4Weights)}
"""Values of ``weights`` that round."""


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
    except (ValueError, BuildError) as error:
        raise CheckpointError(str(error)) from error
    if config.dtype == "float16" and kernels.name == "cpu":
        raise CheckpointError(
            "the native CPU kernels compute in bfloat16 or float32; use kernels=reference for float16"
        )
    dtype = torch.bfloat16 if config.dtype == "auto" else TORCH_DTYPES[config.dtype]
    stored = _stored_model(checkpoint, dtype, device.torch_device)
    _check_weights_option(config, checkpoint, kernels, is_stored=stored is not None)
    if stored is not None:
        digest = WeightsDigest(stored.paths, stored.members)
        weights = _stored_weights(config, stored, kernels)
        loaded = prepare(config, checkpoint, stored.skeleton, kernels, device, weights, digest, stored=stored)
    else:
        digest = WeightsDigest.of_directory(checkpoint.path)
        model = load_pretrained(checkpoint, dtype, device.torch_device)
        whole: PreTrainedModel | None = None
        family: str | None = None
        if model.config.model_type in FAMILIES and model.get_output_embeddings() is not None:
            model, whole, family = take_text_part(model), model, model_type(checkpoint)
        own: WeightSource = ModelWeights(model)
        weights = ROUNDED[config.weights].source(own) if config.weights in ROUNDED else own
        loaded = prepare(config, checkpoint, model, kernels, device, weights, digest, whole, family)
    logger.info("loaded %s", config.model, extra={"seconds": round(time.monotonic() - started, 1)})
    return loaded


def prepare(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    kernels: Kernels,
    device: Device,
    weights: WeightSource,
    digest: WeightsDigest | None = None,
    whole: PreTrainedModel | None = None,
    family: str | None = None,
    stored: StoredModel | None = None,
) -> LoadedModel:
    """Fuse a model on ``device`` that uses the project's attention function, and size the KV cache for it.

    The model cannot be used afterwards, because fused parts are taken out of it. Its linear layers use the
    weights of ``weights``. ``digest`` is the checkpoint's; without one, as for a model that was built in
    memory, the fingerprint knows the config alone. ``whole`` is the image-text model that the model was taken out of,
    and ``family`` its checkpoint's ``model_type`` if it is not the config's.
    ``stored`` fills the model if it is a skeleton whose weights stay in files.

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
        packer = Packer(kernels, weights, exact=dtype == torch.float32)
        is_fused = is_known(model)
        shares_head = stored is not None and stored.ties_head and config.weights not in ROUNDED
        if not is_fused:
            _complete(model, packer, stored, shares_head=shares_head)
        shapes = _probe(model, kernels)
        if stored is not None and is_fused:
            stored.fill_small(torch.float32 if kernels.block_formats else dtype)
        heads = value_heads_of(
            model, config.value_head, kernels, device.torch_device, is_classifier=not can_generate
        )
        network: Network
        if is_fused:
            depth = 0 if encoder is None else encoder.info.depth
            embedding = (
                None if stored is None else partial(_embedding, stored, kernels, shares_head=shares_head)
            )
            network = fuse(model, packer, shapes, depth, embedding)
        else:
            network = TransformersNetwork(model, kernels)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{architecture} cannot be served: {error}") from error
    if config.batch_invariant and not network.is_fused:
        raise CheckpointError(
            f"batch_invariant was asked for, but {architecture} runs through transformers' own modules, which do "
            "not offer it"
        )
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
    stored_as = _stored_as(config, packer)
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


def _probe(model: PreTrainedModel, kernels: Kernels) -> list[LayerShape]:
    """Return the shapes of the layers. Raises TypeError, ValueError or AttributeError where the model cannot compute a token."""
    try:
        return probe_layers(model, kernels)
    except (TypeError, ValueError, AttributeError):
        raise
    except MISFITS as error:
        raise ValueError(f"its layers compute no token: {error}") from error


def _complete(
    model: PreTrainedModel, packer: Packer, stored: StoredModel | None, *, shares_head: bool
) -> None:
    """Pack what transformers' modules multiply, if blocks are among it, and fill the rest of a skeleton."""
    modules = modules_to_pack(model, packer.source)
    if stored is not None:
        stored.fill(packer.kernels, modules)
    pack_modules(model, modules, packer)
    head = packer.linears.get(HEAD_PARAMETER)
    if stored is not None and shares_head and head is not None:
        stored.embed_through(packer.kernels, head)


def _embedding(
    stored: StoredModel, kernels: Kernels, head: Linear | None, *, shares_head: bool
) -> Callable[[Tensor], Tensor]:
    return stored.embedding(kernels, head if shares_head else None)


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


def _stored_as(config: EngineConfig, packer: Packer) -> str:
    """Return how the linear layers store their weights, as /v1/models shows it."""
    blocks = sorted(packer.formats - {"dense"})
    if not blocks:
        return "dense"
    if config.weights in ROUNDED:
        return f"{config.weights} ({ROUNDED[config.weights].format})"
    return f"stored ({', '.join(blocks)})" + (", dense" if "dense" in packer.formats else "")


def _stored_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> StoredModel | None:
    """Return the model of a GGUF file or of packed layers; None for a directory of floating-point numbers."""
    if checkpoint.is_gguf:
        return GgufModel(checkpoint.path, dtype, device)
    packed = checkpoint.packed
    return None if packed is None else Int4Model(checkpoint.path, packed, dtype, device)


def _stored_weights(config: EngineConfig, stored: StoredModel, kernels: Kernels) -> WeightSource:
    if config.weights in ROUNDED:
        return ROUNDED[config.weights].source(stored.weights(dtype=torch.float32))
    return stored.weights(frozenset() if config.weights == "dense" else kernels.block_formats)


def _check_weights_option(
    config: EngineConfig, checkpoint: Checkpoint, kernels: Kernels, *, is_stored: bool
) -> None:
    """Refuse a form of weights that cannot be had. Raises CheckpointError."""
    if config.weights in ROUNDED and ROUNDED[config.weights].format not in kernels.block_formats:
        raise CheckpointError(
            f"the {kernels.name} kernels do not multiply weights={config.weights}; the native CPU kernels do"
        )
    if config.weights == "stored" and not (is_stored and kernels.block_formats):
        raise CheckpointError(
            "weights=stored needs a GGUF file, or packed int4 layers, and kernels that multiply blocks; "
            f"{checkpoint.name} with the {kernels.name} kernels has neither or one of them"
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
    if not logits.isfinite().all():
        raise CheckpointError(
            f"the head of {type(model).__name__} is damaged: its logits of zeros are not finite"
        )


def _longest(config: EngineConfig, own: int | None) -> int | None:
    """Return the model's own limit or a shorter one from the options; None if there is neither."""
    if config.max_model_len is not None and own is not None and config.max_model_len > own:
        raise CheckpointError(
            f"--max-model-len {config.max_model_len} exceeds the model's own {own} positions"
        )
    return own if config.max_model_len is None else config.max_model_len
