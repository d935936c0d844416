"""Devices that run the model. The rest of the engine does not depend on which device it is."""

from logitengine.run.devices.choose import choose_device
from logitengine.run.devices.device import Device

__all__ = ["Device", "choose_device"]
