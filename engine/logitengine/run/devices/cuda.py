"""One CUDA GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from logitengine.run.devices.device import Device

WARM_UPS = 2
"""Runs before a capture, so that kernels compile and libraries allocate their workspaces outside the recording."""


class CudaDevice(Device):
    """The current CUDA device.

    Results are copied on a separate stream, so that copying a step's rows to the host overlaps with the next
    step. Host buffers are pinned by torch. Its caching host allocator reuses a buffer only when all copies on
    it are done and nothing holds it. So a row is never overwritten before the sender has sent it.
    """

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.overlaps = True
        self.captures = True
        self._copies = torch.cuda.Stream(self.torch_device)
        self._graph_pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def fetch(self, tensor: Tensor) -> Tensor:
        source = tensor.contiguous()
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._copies):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
        source.record_stream(self._copies)
        return host

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(self._copies)
        return event.synchronize

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a CUDA graph. All graphs share one memory pool: replaying one invalidates the results of another."""
        side = torch.cuda.Stream(self.torch_device)
        side.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream(self.torch_device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool):
            function()
        return graph.replay

    def kv_cache_bytes(self, fraction: float, largest_step: Callable[[], None]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        largest_step()
        gc.collect()  # the runner of that step may hold a recorded step
        torch.cuda.synchronize(self.torch_device)
        step = torch.cuda.max_memory_allocated(self.torch_device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - step - (1 - fraction) * total)
