"""Chat templates of models that read images, where these are not with the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

TEMPLATES = Path(__file__).parents[1] / "text" / "templates"


def template_for_images(family: str, directory: Path) -> str | None:
    """Return the chat template of the processor in ``directory``; None where it is that of the tokenizer.

    Older checkpoints keep it in chat_template.json. Original InternVL checkpoints hold none and name it in config.json; it
    is None for a name that is not known. Raises OSError or ValueError for a file that is damaged.
    """
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if family == "internvl_chat":
        name = _read(directory / "config.json").get("template")
        paths = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
        return paths[name].read_text(encoding="utf-8") if name in paths else None
    path = directory / "chat_template.json"
    template = _read(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(path.read_bytes())
    return document
