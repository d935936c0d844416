"""The family of the model that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from logitserve.text.families.family import Detection, Family

FOLDER = Path(__file__).parent


def family_names() -> list[str]:
    """Return the names of the families that are known."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_family(name: str) -> Family:
    """Return a family by its name or by its file's path.

    Raises ValueError where there is neither, or where the file does not declare a family.
    """
    path = FOLDER / f"{name}.json" if name in family_names() else Path(name)
    try:
        family = msgspec.json.decode(path.read_bytes(), type=Family)
        family.check()
    except OSError as error:
        known = ", ".join(family_names())
        raise ValueError(f"{name!r} is neither a file that can be read nor one of {known}.") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ValueError(f"{name!r} does not declare a family of models: {error}") from error
    return family


def choose_family(
    chat_template: str | None,
    response_template: dict[str, Any] | None,
    architecture: str,
    override: str | None,
) -> Family | None:
    """Return the family of a model; None where nothing tells it.

    What the tokenizer's own ``response_template`` says about reading is taken, and about writing what is known of the
    family that the chat template tells.

    Args:
        override: a family's name, or the path of a file that declares one, which then is taken.

    Raises ValueError for an ``override`` or a ``response_template`` that cannot be read.
    """
    if override is not None:
        return load_family(override)
    families = [load_family(name) for name in family_names()]
    signs = [(_strength(family.detect, chat_template or "", architecture), family) for family in families]
    strength, family = max(signs, key=lambda sign: sign[0])
    found = family if strength else None
    if response_template is None:
        return found
    own = msgspec.structs.replace(
        found or Family(name="response_template"), response_template=response_template
    )
    own.check()
    return own


def _strength(detect: Detection, chat_template: str, architecture: str) -> int:
    """Return how much tells of a family: strings of the chat template count more than an architecture."""
    counts = [len(signs) for signs in detect.templates if all(sign in chat_template for sign in signs)]
    return 2 * max(counts, default=0) + (architecture in detect.architectures)
