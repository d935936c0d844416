"""What a model's JSON files say of its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class ImageModelError(Exception):
    """The model's images cannot be prepared; the message says why."""


class ModelFiles:
    """The JSON files in a model's directory. Raises ImageModelError for what they lack.

    Args:
        config: config.json with defaults of the model's configuration class, in place of the file alone.

    Attributes:
        config: config.json.
        vision: config.json's part on the image encoder.
        processor: processor_config.json, or nothing.
        image_processor: the image processor's own settings.
    """

    def __init__(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.config = self._read("config.json") if config is None else config
        self.vision: dict[str, Any] = self.config.get("vision_config") or {}
        self.processor = self._read("processor_config.json", needed=False)
        self.image_processor: dict[str, Any] = self.processor.get("image_processor") or self._read(
            "preprocessor_config.json", needed=False
        )
        self._tokenizer = self._read("tokenizer_config.json", needed=False)

    def number(self, name: str, default: float) -> float:
        """Return a number above 0 of config.json."""
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ImageModelError(f"config.json's {name} is {value!r}, not a number above 0")
        return value

    def patch_sides(self) -> tuple[int, int]:
        """Return the height and the width of the image encoder's patches in pixels."""
        return _two_sides("patch_size", self.vision.get("patch_size"))

    def special_token(self, name: str, default: str) -> str:
        """Return a token that tokenizer_config.json may rename."""
        extra = self._tokenizer.get("extra_special_tokens")
        extra = extra if isinstance(extra, dict) else {}
        token = self._tokenizer.get(name) or extra.get(name) or default
        return str(token["content"] if isinstance(token, dict) else token)

    def _read(self, name: str, *, needed: bool = True) -> dict[str, Any]:
        path = self.directory / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            if needed:
                raise ImageModelError(f"the model has no {name}") from error
            return {}
        except (OSError, ValueError) as error:
            raise ImageModelError(f"the model's {name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ImageModelError(f"the model's {name} is not a JSON object")
        return content


def _two_sides(name: str, value: object) -> tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else [value, value]
    match sides:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case _:
            raise ImageModelError(f"config.json's vision_config has a {name} of {value!r}")
