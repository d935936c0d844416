"""The decoder and head of an image-text model, as a language model of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class PlainTextPart(PreTrainedModel):
    """A decoder and a linear head, for text configs of which transformers has no language model."""

    base_model_prefix = "model"
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__(config)
        self.model = decoder
        self.lm_head = head

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.lm_head
        return head

    def forward(self, inputs_embeds: Tensor, *, use_cache: bool = False) -> CausalLMOutputWithPast:
        """Return logits of hidden states that ``model`` passes through: [1, R, H] -> [1, R, V]."""
        hidden = self.model(inputs_embeds=inputs_embeds, use_cache=use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def take_text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Take the decoder out of an image-text model, and return it with the head as a language model.

    What is left of the model computes image features. No weight is copied.
    """
    base = getattr(model, model.base_model_prefix)
    decoder: nn.Module = base.get_decoder()
    name = next(name for name, child in base.named_children() if child is decoder)
    config = model.config.get_text_config()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text: PreTrainedModel
    if model_class is None:
        text = PlainTextPart(config, decoder, model.lm_head)
    else:
        with torch.device("meta"):
            text = model_class(config)
        setattr(text, text.base_model_prefix, decoder)
        text.lm_head = model.lm_head
    text.generation_config = model.generation_config
    setattr(base, name, None)
    text.eval()
    return text
