"""The family of the model that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from logitserve.text.families.family import Family

FOLDER = Path(__file__).parent


def load_family(path: Path) -> Family:
    """Return what a file declares. Raises OSError and msgspec.ValidationError."""
    return msgspec.json.decode(path.read_bytes(), type=Family)


def choose_family(
    chat_template: str | None,
    response_template: dict[str, Any] | None,  # noqa: ARG001
    architecture: str,  # noqa: ARG001
    override: str | None,
) -> Family | None:
    """Return the family of a model; None where nothing tells it."""
    if override is not None:
        path = FOLDER / f"{override}.json"
        return load_family(path if path.is_file() else Path(override))
    return load_family(FOLDER / "hermes.json") if "<tool_call>" in (chat_template or "") else None
