"""A model in two parts that the engine runs separately: a decoder over the paged cache, and a head over chosen rows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from logitkernels import Kernels
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from logitengine.run.batch import DeviceBatch
from logitengine.run.kv_cache import PagedKVCache

Decoder = Callable[[DeviceBatch], Tensor]
"""Stores a batch's keys and values in the cache that it is bound to, and returns the last hidden states [T, H]."""

Head = Callable[[Tensor], Tensor]
"""Maps hidden states to raw logits: [R, H] -> [R, V]."""


class Network(ABC):
    """A model in executable form.

    Attributes:
        head: maps hidden states to raw logits.
        is_fused: whether every operation is one of the kernels'.
    """

    head: Head
    is_fused: bool

    @abstractmethod
    def decoder(self, kv_cache: PagedKVCache) -> Decoder:
        """Return the decoder that keeps its keys and values in ``kv_cache``."""


class TransformersNetwork(Network):
    """A model of transformers' own modules, with the project's attention function."""

    is_fused = False

    def __init__(self, model: PreTrainedModel, kernels: Kernels) -> None:
        self.head = TransformersHead(model)
        self._module: Any = getattr(model, model.base_model_prefix)
        self._kernels = kernels

    def decoder(self, kv_cache: PagedKVCache) -> Decoder:
        def decode(batch: DeviceBatch) -> Tensor:
            positions = batch.position_ids
            output = self._module(
                **self._inputs(batch),
                position_ids=positions[None] if positions.ndim == 1 else positions[:, None],
                use_cache=False,
                kv_cache=kv_cache,
                attention_metadata=batch.metadata,
                kernels=self._kernels,
            )
            hidden: Tensor = output.last_hidden_state[0]
            return hidden

        return decode

    def _inputs(self, batch: DeviceBatch) -> dict[str, Any]:
        """Return the module's inputs: token ids, or embeddings where some are those of images."""
        if not batch.features:
            return {"input_ids": batch.input_ids[None]}
        embeddings = self._module.get_input_embeddings()(batch.input_ids)
        for rows, features in batch.features:
            embeddings[rows] = features[:, 0].to(embeddings.dtype)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings[None]}
        deeper = torch.cat([features[:, 1:] for _, features in batch.features]).to(embeddings.dtype)
        if deeper.shape[1]:
            is_image = torch.zeros(1, len(embeddings), dtype=torch.bool, device=embeddings.device)
            for rows, _ in batch.features:
                is_image[:, rows] = True
            inputs |= {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(deeper.unbind(1))}
        return inputs


class TransformersHead:
    """Head of a model, including its class's transform of the logits (softcap, scaling)."""

    def __init__(self, model: PreTrainedModel) -> None:
        # A second shell around the same submodules: no weight is copied.
        self._shell = copy.copy(model)
        self._shell._modules = dict(model._modules)  # noqa: SLF001 - nn.Module has no public way to make such a shell
        setattr(self._shell, model.base_model_prefix, _HiddenStatesThrough())

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._shell(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _HiddenStatesThrough(nn.Module):
    """Replaces the decoder under the head, so that the head's own transform runs."""

    def forward(
        self,
        input_ids: None = None,
        *,
        inputs_embeds: Tensor,
        use_cache: bool | None = None,
        **unset: object,
    ) -> MoeModelOutputWithPast:
        """Return ``inputs_embeds`` as hidden states.

        Heads pass many options to their decoder; none of them may be set.
        """
        asked = [name for name, value in unset.items() if value is not None and value is not False]
        if asked:
            raise TypeError(f"the head asks its decoder for {', '.join(asked)}")
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
