"""Choice of the device by name."""

from __future__ import annotations

import torch

from logitengine.run.devices.device import Device


def choose_device(name: str) -> Device:
    """Return the device called ``name``: "cpu", "cuda", or "auto" for CUDA if torch sees it.

    Raises ValueError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        from logitengine.run.devices.cpu import CpuDevice

        return CpuDevice()
    if not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, but torch sees no CUDA device")
    from logitengine.run.devices.cuda import CudaDevice

    return CudaDevice()
