"""What each attention layer of a model stores, found by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from logitkernels import Kernels
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer stores per token, how far back it looks (None: to the beginning), and how it caps its scores.

    The sizes of a key and of a value differ in some architectures.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def numel_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(slots=True)
class ShapeProbe:
    """Stands in for the cache in one forward pass and records what each layer would have stored."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def record(
        self, layer: int, key: Tensor, value: Tensor, sliding_window: int | None, softcap: float | None
    ) -> None:
        """``key`` and ``value`` are [1, Hkv, T, D]."""
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], sliding_window, softcap)

    def in_order(self) -> list[LayerShape]:
        """Raises ValueError if some layer did not come through our attention function."""
        if sorted(self.shapes) != list(range(len(self.shapes))) or not self.shapes:
            raise ValueError(
                "this architecture has layers that do not use the attention interface "
                f"(attention layers seen: {sorted(self.shapes)})"
            )
        return [self.shapes[layer] for layer in range(len(self.shapes))]


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
