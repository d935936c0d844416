"""A host device that the engine treats like a GPU: results need a wait, and steps are recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from logitengine.run.devices.cpu import CpuDevice
from logitengine.run.devices.device import Device
from torch import Tensor


class LoopbackDevice(CpuDevice):
    """Device on the host whose fetched tensors hold garbage until somebody waits for a later mark.

    A replay of a recorded function calls the function again.
    """

    upload = Device.upload

    def __init__(self) -> None:
        super().__init__()
        self.overlaps = True
        self.captures = True
        self.num_captures = 0
        self.num_replays = 0
        self._on_the_way: list[tuple[Tensor, Tensor]] = []

    def fetch(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, memory_format=torch.contiguous_format).fill_(77)
        self._on_the_way.append((host, tensor.clone()))
        return host

    def mark(self) -> Callable[[], None]:
        before = list(self._on_the_way)
        self._on_the_way.clear()

        @torch.inference_mode()
        def wait() -> None:
            for host, tensor in before:
                host.copy_(tensor)

        return wait

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        function()

        def replay() -> None:
            self.num_replays += 1
            function()

        return replay
