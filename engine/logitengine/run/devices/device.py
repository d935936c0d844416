"""What the engine asks of a device: inputs there, results back, memory, and recorded steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from logitengine.run.staging import Arrays, Layout


class Device(ABC):
    """One device. Work that is given to it runs in order.

    Attributes:
        torch_device: where its tensors live.
        overlaps: the host goes on while the device computes, so that the next step is prepared, and launched, before
            the step before has been read.
        captures: a function that launches work can be recorded once and replayed at little cost.
    """

    torch_device: torch.device
    overlaps: bool
    captures: bool

    @abstractmethod
    def host_buffer(self, nbytes: int) -> Tensor:
        """A uint8 host tensor of the kind that the device copies from fastest; uninitialised."""

    def upload(self, arrays: Arrays) -> dict[str, Tensor]:
        """The arrays as tensors on the device, moved by one copy."""
        layout = Layout(arrays)
        staged = self.host_buffer(layout.nbytes)
        layout.pack(arrays, staged)
        return layout.views(staged.to(self.torch_device, non_blocking=True))

    @abstractmethod
    def fetch(self, tensor: Tensor) -> Tensor:
        """Start to bring a tensor to the host. The result may be read once the wait of a later `mark` is over.

        The tensor itself may be dropped at once, but must not be written again.
        """

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """A function that waits until everything fetched so far is there."""

    @abstractmethod
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what ``function`` launches; the result launches it again, on the same tensors."""

    @abstractmethod
    def kv_cache_bytes(self, fraction: float, largest_step: Callable[[], None]) -> int:
        """Memory for the KV cache where the user named none.

        A device with its own memory runs ``largest_step`` to see what a step needs beside the cache, and leaves that
        and the share of its memory beyond ``fraction`` free.
        """
