"""Where the model runs. Nothing else in the engine asks which device it is."""

from logitengine.run.devices.choose import choose_device
from logitengine.run.devices.device import Device

__all__ = ["Device", "choose_device"]
