"""Interface of a device to the engine: uploads, downloads, memory, and recorded steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from logitengine.run.staging import Arrays, Layout


class Device(ABC):
    """One device. It runs its work in order.

    Attributes:
        torch_device: device of its tensors.
        overlaps: whether the host continues while the device computes. The next step is then prepared and
            launched before the step before it has been read.
        captures: whether a function that launches work can be recorded once and replayed at little cost.
    """

    torch_device: torch.device
    overlaps: bool
    captures: bool

    @abstractmethod
    def host_buffer(self, nbytes: int) -> Tensor:
        """Return an uninitialised uint8 host tensor of the kind that the device copies from fastest."""

    def upload(self, arrays: Arrays) -> dict[str, Tensor]:
        """Copy the arrays to the device as tensors, in one copy."""
        layout = Layout(arrays)
        staged = self.host_buffer(layout.nbytes)
        layout.pack(arrays, staged)
        return layout.views(staged.to(self.torch_device, non_blocking=True))

    @abstractmethod
    def fetch(self, tensor: Tensor) -> Tensor:
        """Start to copy a tensor to the host. The result may be read after the wait of a later `mark`.

        The tensor itself may be dropped at once, but must not be written again.
        """

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """Return a function that waits until everything fetched so far has arrived."""

    @abstractmethod
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record the work that ``function`` launches; the result launches it again, on the same tensors."""

    @abstractmethod
    def kv_cache_bytes(self, fraction: float, largest_step: Callable[[], None]) -> int:
        """Return the memory for the KV cache if the user named none.

        A device with its own memory runs ``largest_step`` to measure a step's needs beside the cache. It
        leaves that much and the share of its memory beyond ``fraction`` free.
        """
