"""Choice of a backend by name."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from logitkernels.interface import Kernels
from logitkernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)


def load_kernels(
    name: str, device: str, *, batch_invariant: bool = False, prebuilt: Path | None = None
) -> Kernels:
    """Return the backend called ``name`` for a device ("cpu" or "cuda").

    "auto" takes the fastest backend that works here and logs a warning when that is the reference. With
    ``batch_invariant`` the backend must keep a row's bits independent of the batch and the chunking, even at
    a cost in speed. The native CPU kernels come from the directory ``prebuilt`` if it is given.

    Raises ValueError for a name that is unknown or cannot run on the device, for a directory without kernels
    that fit and load, and for a backend that is not batch invariant when ``batch_invariant`` is set. Raises
    RuntimeError when a backend requested by name does not build.
    """
    kernels = _load(name, device, batch_invariant=batch_invariant, prebuilt=prebuilt)
    if batch_invariant and not kernels.batch_invariant:
        raise ValueError(f"batch_invariant was asked for, but the {kernels.name} kernels do not hold it")
    return kernels


def _load(name: str, device: str, *, batch_invariant: bool, prebuilt: Path | None) -> Kernels:
    if name == "reference":
        return ReferenceKernels()
    if name == "cpu" and device == "cpu":
        return _native(prebuilt)
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels=triton on device 'cpu' runs only in Triton's interpreter, for tests: set TRITON_INTERPRET=1"
        )
    if name == "triton" or (name == "auto" and device == "cuda"):
        if importlib.util.find_spec("triton") is None:
            raise ValueError("kernels=triton needs the package triton, which torch's CUDA builds bring along")
        from logitkernels.triton import TritonKernels

        return TritonKernels(batch_invariant=batch_invariant)
    if name == "auto" and device == "cpu":
        return _native_or_reference(prebuilt)
    raise ValueError(f"kernels={name!r} cannot run on device {device!r}")


def _native_or_reference(prebuilt: Path | None) -> Kernels:
    from logitkernels.cpu.errors import BuildError

    try:
        return _native(prebuilt)
    except BuildError as error:
        logger.warning("native CPU kernels are not available, using the torch reference: %s", error)
        return ReferenceKernels()


def _native(prebuilt: Path | None) -> Kernels:
    from logitkernels.cpu import CpuKernels

    return CpuKernels(prebuilt=prebuilt)
