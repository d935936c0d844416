"""Where the model runs. The device is chosen once, by name; nothing else in the engine asks which it is."""

from logitengine.run.devices.device import Device, choose_device

__all__ = ["Device", "choose_device"]
