"""Runs a transformers model over flattened batches, and its head over the rows that were asked for."""

from __future__ import annotations

import copy

import torch
from logitkernels import Kernels
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from logitengine.batch import Batch
from logitengine.kv_cache import LayerShape, PagedKVCache, ShapeProbe


class _HiddenStatesThrough(nn.Module):
    """Takes the decoder's place under the head, so that the head's own transform (softcap, scaling) is what runs."""

    def forward(
        self, input_ids: None = None, *, inputs_embeds: Tensor, use_cache: bool | None = None, **unset: object
    ) -> MoeModelOutputWithPast:
        """``inputs_embeds`` are the hidden states. Heads pass down many options of their decoder; none may be set."""
        asked = [name for name, value in unset.items() if value is not None and value is not False]
        if asked:
            raise TypeError(f"the head asks its decoder for {', '.join(asked)}")
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class ModelRunner:
    """``run`` gives hidden states for a batch; ``head`` gives raw logits for rows of them."""

    def __init__(self, model: PreTrainedModel, kernels: Kernels) -> None:
        self._decoder: nn.Module = getattr(model, model.base_model_prefix)
        # A second shell around the same submodules: no weight is copied.
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)  # noqa: SLF001 - nn.Module has no public way to make such a shell
        setattr(self._head, model.base_model_prefix, _HiddenStatesThrough())
        self._kernels = kernels
        self.device = model.device

    @torch.inference_mode()
    def run(self, batch: Batch, kv_cache: PagedKVCache) -> Tensor:
        """Compute the batch and store its keys and values: the last hidden states, [T, H]."""
        output = self._decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            kv_cache=kv_cache,
            attention_metadata=batch.metadata,
            kernels=self._kernels,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of some hidden states: [R, H] -> float32 [R, V]."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()


@torch.inference_mode()
def probe_layers(model: PreTrainedModel, kernels: Kernels) -> list[LayerShape]:
    """What each layer stores per token, found by running one token through the model as transformers has it.

    Raises TypeError or ValueError if the architecture asks for something of its attention that is not served.
    """
    probe = ShapeProbe()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    getattr(model, model.base_model_prefix)(
        input_ids=token,
        position_ids=token,
        use_cache=False,
        kv_cache=probe,
        attention_metadata=None,
        kernels=kernels,
    )
    return probe.in_order()
