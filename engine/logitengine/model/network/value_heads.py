"""Linear heads on the hidden states: value heads of reward models, and sequence classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from logitkernels import DenseWeight, Kernels, Linear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitengine.errors import CheckpointError

CLASSIFIER_HEAD = "score"

WEIGHT_NAMES = ("v_head.summary.weight", "summary.weight", "score.weight", "weight")
"""Weight names: TRL's for a value head, TRL's without prefix, transformers' for a classifier, a plain linear's."""


@dataclass(frozen=True, slots=True)
class ValueHead:
    """Linear head; ``apply`` maps hidden states [R, H] to float32 values [R, outputs]."""

    linear: Linear

    @classmethod
    def from_weights(
        cls, weight: Tensor, bias: Tensor | None, kernels: Kernels, device: torch.device
    ) -> ValueHead:
        """Make a head from ``weight`` [outputs, H] and ``bias`` [outputs].

        It is computed on ``device``, in float32 whatever the model's dtype.
        """
        tensors = [weight] if bias is None else [weight, bias]
        placed, *biases = (tensor.detach().to(device, torch.float32) for tensor in tensors)
        return cls(
            kernels.pack([DenseWeight("value_head", placed)], biases[0] if biases else None, exact=True)
        )

    @property
    def num_outputs(self) -> int:
        return self.linear.out_features

    @torch.inference_mode()
    def apply(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float())


def load_value_head(
    name: str, path: Path, hidden_size: int, kernels: Kernels, device: torch.device
) -> ValueHead:
    """Read a head from a safetensors file, onto the model's device.

    Raises CheckpointError, which names the head and the problem. Only dense tensors of declared shape are
    ever read: the library checks the safetensors header against the file's size, and this function checks the
    shapes.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"value head {name!r}: {path} could not be read as safetensors: {error}"
        ) from error
    for weight_name in WEIGHT_NAMES:
        if weight_name in tensors:
            weight, bias = tensors[weight_name], tensors.get(weight_name.removesuffix("weight") + "bias")
            break
    else:
        raise CheckpointError(f"value head {name!r}: {path} holds none of {', '.join(WEIGHT_NAMES)}")
    if weight.dim() != 2 or weight.shape[1] != hidden_size or not weight.is_floating_point():
        raise CheckpointError(
            f"value head {name!r}: the weight is {weight.dtype} {list(weight.shape)}, "
            f"but the model needs a floating-point [outputs, {hidden_size}]"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise CheckpointError(f"value head {name!r}: the bias is {bias.dtype} {list(bias.shape)}")
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise CheckpointError(f"value head {name!r}: {path} holds numbers that are not finite")
    return ValueHead.from_weights(weight, bias, kernels, device)


def value_heads_of(
    model: PreTrainedModel,
    attached: Mapping[str, Path],
    kernels: Kernels,
    device: torch.device,
    *,
    is_classifier: bool,
) -> dict[str, ValueHead]:
    """Return the attached heads by name, and a classifier's own head under `score`. Raises CheckpointError."""
    hidden_size = model.config.get_text_config().hidden_size
    heads = {
        name: load_value_head(name, path, hidden_size, kernels, device) for name, path in attached.items()
    }
    if is_classifier:
        score = getattr(model, CLASSIFIER_HEAD, None)
        if not isinstance(score, nn.Linear):
            raise CheckpointError(
                f"{type(model).__name__} has neither a language-model head nor a linear score"
            )
        heads.setdefault(CLASSIFIER_HEAD, ValueHead.from_weights(score.weight, score.bias, kernels, device))
    return heads
