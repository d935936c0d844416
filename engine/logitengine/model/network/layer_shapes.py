"""Storage shapes of a model's attention layers, found by running one token through the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from logitkernels import Kernels
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Properties of a layer's attention: its storage per token, sliding window (None: unlimited) and softcap.

    In some architectures keys and values have different sizes.
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
    """Replaces the cache in one forward pass and records what each layer would have stored."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def record(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """Record a layer; ``key`` and ``value`` are [1, Hkv, T, D]. Raises ValueError for a number that is not above 0."""
        numbers = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"the attention of layer {layer} has {name} {number}")
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], sliding_window, softcap)

    def in_order(self) -> list[LayerShape]:
        """Return the shapes by layer. Raises ValueError if a layer did not use the project's attention function."""
        if sorted(self.shapes) != list(range(len(self.shapes))) or not self.shapes:
            raise ValueError(
                "this architecture has layers that do not use the attention interface "
                f"(attention layers seen: {sorted(self.shapes)})"
            )
        return [self.shapes[layer] for layer in range(len(self.shapes))]


@torch.inference_mode()
def probe_layers(model: PreTrainedModel, kernels: Kernels) -> list[LayerShape]:
    """Return the shape of each layer, found by running one token through transformers' own model.

    The model may lie on the meta device. Raises TypeError or ValueError if the architecture needs an attention feature that is not supported, and
    whatever transformers' modules raise for a config whose numbers do not fit each other.
    """
    probe = ShapeProbe()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    getattr(model, model.base_model_prefix)(
        input_ids=token,
        position_ids=token,
        # Without a cache transformers looks at the positions' numbers, and there are none on the meta device.
        past_key_values=DynamicCache() if model.device.type == "meta" else None,
        use_cache=False,
        kv_cache=probe,
        attention_metadata=None,
        kernels=kernels,
    )
    return probe.in_order()
