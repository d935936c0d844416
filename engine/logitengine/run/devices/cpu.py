"""The host as the device: nothing is copied and nothing waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logitengine.run.devices.device import Device
from logitengine.run.staging import Arrays

DEFAULT_KV_CACHE_BYTES = 2 << 30


class CpuDevice(Device):
    """The CPU cores that torch uses."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.overlaps = False
        self.captures = False

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def upload(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor

    def mark(self) -> Callable[[], None]:
        return _nothing

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        return function

    def kv_cache_bytes(self, fraction: float, largest_step: Callable[[], None]) -> int:  # noqa: ARG002
        return DEFAULT_KV_CACHE_BYTES


def _nothing() -> None:
    """Wait for nothing: everything is already there."""
