"""A model in the two parts that the engine runs apart: a decoder over the paged cache, and a head over chosen rows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

from logitkernels import Kernels
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from logitengine.run.batch import DeviceBatch
from logitengine.run.kv_cache import PagedKVCache

Decoder = Callable[[DeviceBatch], Tensor]
"""Stores a batch's keys and values in the cache that it was made for; gives the last hidden states [T, H]."""

Head = Callable[[Tensor], Tensor]
"""Raw logits of hidden states: [R, H] -> [R, V]."""


class Network(ABC):
    """What runs a model.

    Attributes:
        head: the raw logits of hidden states.
        is_fused: every operation is one of the kernels'.
    """

    head: Head
    is_fused: bool

    @abstractmethod
    def decoder(self, kv_cache: PagedKVCache) -> Decoder:
        """The decoder, keeping its keys and values in ``kv_cache``."""


class TransformersNetwork(Network):
    """A model as transformers has it, with our attention function."""

    is_fused = False

    def __init__(self, model: PreTrainedModel, kernels: Kernels) -> None:
        self.head = TransformersHead(model)
        self._module: nn.Module = getattr(model, model.base_model_prefix)
        self._kernels = kernels

    def decoder(self, kv_cache: PagedKVCache) -> Decoder:
        def decode(batch: DeviceBatch) -> Tensor:
            output = self._module(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                kv_cache=kv_cache,
                attention_metadata=batch.metadata,
                kernels=self._kernels,
            )
            hidden: Tensor = output.last_hidden_state[0]
            return hidden

        return decode


class TransformersHead:
    """The head of a model with whatever its class does to the logits (softcap, scaling)."""

    def __init__(self, model: PreTrainedModel) -> None:
        # A second shell around the same submodules: no weight is copied.
        self._shell = copy.copy(model)
        self._shell._modules = dict(model._modules)  # noqa: SLF001 - nn.Module has no public way to make such a shell
        setattr(self._shell, model.base_model_prefix, _HiddenStatesThrough())

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._shell(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _HiddenStatesThrough(nn.Module):
    """Takes the decoder's place under the head, so that the head's own transform is what runs."""

    def forward(
        self,
        input_ids: None = None,
        *,
        inputs_embeds: Tensor,
        use_cache: bool | None = None,
        **unset: object,
    ) -> MoeModelOutputWithPast:
        """``inputs_embeds`` are the hidden states. Heads pass down many options of their decoder; none may be set."""
        asked = [name for name, value in unset.items() if value is not None and value is not False]
        if asked:
            raise TypeError(f"the head asks its decoder for {', '.join(asked)}")
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
