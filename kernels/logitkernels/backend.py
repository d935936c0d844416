"""The backend is chosen once, by name."""

from __future__ import annotations

import logging

from logitkernels.interface import Kernels
from logitkernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)


def load_kernels(name: str, device: str) -> Kernels:
    """The backend called ``name`` for a device ("cpu" or "cuda").

    "auto" takes the fastest one that works here and says in the log when that is the reference. Raises ValueError for
    a name that is unknown or cannot run on the device, RuntimeError when a backend asked for by name does not build.
    """
    if name == "reference":
        return ReferenceKernels()
    if name == "cpu" and device == "cpu":
        return _native()
    if name == "auto" and device == "cpu":
        from logitkernels.cpu.build import BuildError

        try:
            return _native()
        except BuildError as error:
            logger.warning("native CPU kernels are not available, using the torch reference: %s", error)
            return ReferenceKernels()
    if name == "auto":
        return ReferenceKernels()
    raise ValueError(f"kernels={name!r} cannot run on device {device!r}")


def _native() -> Kernels:
    from logitkernels.cpu import CpuKernels

    return CpuKernels()
