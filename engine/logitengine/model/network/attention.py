"""The project's attention function, in the signature that transformers' models call.

It is registered under the name `logitserve`. It receives the paged cache, the metadata and the kernels as
forward kwargs. An unknown kwarg is a TypeError, because an ignored attention option would silently give wrong
logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from logitkernels import AttentionMetadata, AttentionOptions, Kernels
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from logitengine.model.network.layer_shapes import ShapeProbe
from logitengine.run.kv_cache import PagedKVCache

ATTENTION_NAME = "logitserve"


def register_attention() -> None:
    """Register the function with transformers. Registering twice is harmless."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, causal_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    kv_cache: PagedKVCache | ShapeProbe,
    attention_metadata: AttentionMetadata,
    kernels: Kernels,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
) -> tuple[Tensor, None]:
    """Store this step's keys and values, then attend over the paged cache.

    ``query`` is [1, Hq, T, D], ``key`` and ``value`` [1, Hkv, T, D]; returns [1, T, Hq, Dv]. Every model
    passes the last three kwargs down; the metadata already holds their information.
    """
    if attention_mask is not None or dropout or output_attentions or is_causal is False:
        raise ValueError("only causal attention without a mask, dropout or returned weights is served")
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError(f"{type(module).__name__} does not say which layer it is")
    if isinstance(kv_cache, ShapeProbe):
        kv_cache.record(layer, key, value, scaling, sliding_window, softcap)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    key_cache, value_cache = kv_cache.keys[layer], kv_cache.values[layer]
    kernels.store_kv(keys, values, key_cache, value_cache, attention_metadata.slot_mapping)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    attended = kernels.paged_attention(queries, key_cache, value_cache, attention_metadata, options)
    return attended[None], None


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    dtype: torch.dtype,
    config: PreTrainedConfig,
    use_vmap: bool,
    device: torch.device,
    local_size: int | None = None,
) -> None:
    """Return no mask: the metadata implies causality.

    The attention function receives a sliding window (``local_size`` here) too.

    Raises ValueError for a padding mask and for a model that overlays its own mask (image blocks, for
    example). Such a mask would otherwise be dropped.
    """
    if attention_mask is not None or use_vmap:
        raise ValueError(f"{config.model_type} asks for an attention mask that is not plainly causal")
