"""Where images stand in a model's prompts: the token that its chat template writes, and the one that stands for pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from logitserve.text.tokenizer import ModelTokenizer

PLACEHOLDERS = {"internvl_chat": "<IMG_CONTEXT>"}
"""Placeholder tokens of families whose config.json does not name theirs."""

OWN_MARKS = {"gemma3": ("boi_token_index", "<start_of_image>")}
"""Families whose template writes another token than the placeholder: its member of config.json, and its usual text."""


@dataclass(frozen=True, slots=True)
class ImageMark:
    """Tokens that stand for images.

    Attributes:
        text: what the chat template writes for an image.
        placeholder: token whose copies the model replaces by an image's features.
        in_template: whether the chat template writes marks at all.
    """

    text: str
    placeholder: str
    placeholder_id: int
    in_template: bool


def find_mark(family: str, directory: Path, tokenizer: ModelTokenizer) -> ImageMark:
    """Return the mark of a model with an image encoder, whose config.json is in ``directory``.

    Raises OSError, or ValueError where no token of the tokenizer is known to stand for images.
    """
    config: dict[str, Any] = orjson.loads((directory / "config.json").read_bytes())
    placeholder = PLACEHOLDERS.get(family)
    if placeholder is None:
        token_id = config.get("image_token_id", config.get("image_token_index"))
        placeholder = _control_token(token_id, tokenizer)
    placeholder_id = tokenizer.control_token_id(placeholder or "")
    if placeholder is None or placeholder_id is None:
        msg = f"no token of the tokenizer stands for images, as {placeholder or 'image_token_id'} of a {family} model should"
        raise ValueError(msg)
    text = placeholder
    if family in OWN_MARKS:
        member, usual = OWN_MARKS[family]
        text = _control_token(config.get(member), tokenizer) or usual
    return ImageMark(text, placeholder, placeholder_id, tokenizer.writes_images(text))


def _control_token(token_id: Any, tokenizer: ModelTokenizer) -> str | None:
    return tokenizer.token_strings([token_id])[0] or None if isinstance(token_id, int) else None
