"""A packed linear layer in the place of a module's own."""

from __future__ import annotations

from logitkernels import Linear
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """A linear layer of the kernels."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N]."""
        return self._linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
