"""The image encoder of a model, which pauses between its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isqrt
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from logitkernels import DenseWeight, Kernels
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitengine.link.messages import Array, EncoderInfo, PromptItem
from logitengine.model.image_text.families import SHUFFLING_FAMILIES, encoder_info
from logitengine.model.network.fused_linear import FusedLinear


class Encoding:
    """An item's way through the encoder.

    It runs on a stack of its own and in the caller's thread, so that the encoder's modules need not know that they pause.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._stack = greenlet(compute)

    def advance(self) -> Tensor | None:
        """Compute up to the next layer. Returns the output, [tokens, 1 + depth, H], when it is complete."""
        output: Tensor = self._stack.switch()
        return output if self._stack.dead else None

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to compute, also because it failed."""
        return bool(self._stack.dead)

    def abandon(self) -> None:
        """Give it up."""
        self._stack.throw()


class ImageEncoder:
    """Vision tower and projector: everything of a model that turns pixels into embeddings.

    An item is computed alone and in its own shape, so that its output does not depend on what is computed beside it. On the
    CPU linear layers are the kernels' and all else is float32.

    Attributes:
        info: what the encoder reads. Its depth is that of Qwen3-VL's DeepStack; others add to embeddings alone.
    """

    def __init__(
        self, model: PreTrainedModel, family: str, kernels: Kernels, *, exact: bool, max_tokens: int
    ) -> None:
        """Take over a model without its decoder.

        Args:
            family: the ``model_type`` of the checkpoint, which in the original InternVL format is not the model's.
            exact: whether linear layers do not round their inputs.
            max_tokens: most tokens of an item, where the encoder reads any resolution.

        Raises ValueError for an encoder that is not served.
        """
        self.info: EncoderInfo = encoder_info(model.config, family, max_tokens)
        self._model: Any = model
        self._device = model.device
        if self._device.type == "cpu":
            _pack_linears(model, kernels, exact=exact)
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()
        for part in _parts(model):
            part.register_forward_pre_hook(_pause)

    def begin(self, item: PromptItem) -> Encoding:
        """Return the encoding of an item, of which nothing is computed yet."""
        return Encoding(lambda: self.encode(item))

    def largest_item(self) -> PromptItem:
        """Return a grey item of the only size, or of the largest that is read."""
        shape, grid, num_tokens = self.info.pixels_shape, None, self.info.num_tokens
        if not num_tokens:
            side = isqrt(self.info.max_tokens)
            patches = side * self.info.merge_size
            shape, grid, num_tokens = (patches**2, *shape), (1, patches, patches), side**2
        pixels = Array("float32", shape, np.full(shape, 0.5, dtype="<f4").tobytes())
        return PromptItem(start=0, stop=num_tokens, digest=b"", pixels=pixels, grid=grid)

    def encode(self, item: PromptItem) -> Tensor:
        """Return the output of an item, [tokens, 1 + depth, H]."""
        array = item.pixels
        pixels = torch.from_numpy(np.frombuffer(array.data, dtype="<f4").reshape(array.shape).copy()).to(
            self._device
        )
        if item.grid is not None:
            grid = torch.tensor([item.grid], device=self._device)
            output = self._model.get_image_features(pixels, image_grid_thw=grid, return_dict=True)
        else:
            if self.info.family in SHUFFLING_FAMILIES:
                if not pixels.any():
                    pixels.view(-1)[0] = torch.finfo(
                        torch.float32
                    ).tiny  # transformers takes zeros for padding
                pixels = pixels[None]  # a batch of lists of images
            output = self._model.get_image_features(pixel_values=pixels[None], return_dict=True)
        deeper = getattr(output, "deepstack_features", None) or ()
        return torch.stack([_one(features) for features in (output.pooler_output, *deeper)], dim=1)


def _one(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return an only image's features: [tokens, H]."""
    tensor = features if isinstance(features, Tensor) else features[0]
    return tensor.reshape(-1, tensor.shape[-1])


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what is computed between two pauses: the layers, and beside the tower what projects its output."""
    yield from model.children()
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList):
            yield from layers


def _pause(_layer: nn.Module, _inputs: tuple[Any, ...]) -> None:
    """Give control back to whoever advances the encoding."""
    caller = getcurrent().parent
    if caller is not None:
        caller.switch()


def _pack_linears(module: nn.Module, kernels: Kernels, *, exact: bool) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            bias = None if child.bias is None else child.bias.detach().float()
            packed = kernels.pack([DenseWeight(name, child.weight.detach())], bias, exact=exact)
            setattr(module, name, FusedLinear(packed))
        else:
            _pack_linears(child, kernels, exact=exact)
