"""Files of pictures, and the parts of messages that hold them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

IMAGE_MODEL_NAME = "OpenGVLab/InternVL2-1B"
"""Name under which tests serve a tiny model of InternVL2's format."""


def picture(seed: int, width: int = 90, height: int = 60) -> bytes:
    """Return a PNG of random blocks."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def image_part(file: bytes, **options: Any) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file).decode()}", **options},
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
