"""Types of options, with the words that stand for their values in ``--help``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "B": 1,
}

_UNITS_BY_LOWER_CASE = {unit.lower(): size for unit, size in UNITS.items()}
_PLAIN = re.compile(r"\s*[+-]?[\d_]+\s*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Word:
    """The word that stands for an option's value.

    As metadata of a type, the word is used by all options of that type.
    """

    text: str


def read_size(value: Any) -> Any:
    """Convert ``2GiB`` or ``500MB`` to a number of bytes. A number stays as it is.

    A bare ``2G`` is refused, because some programs mean 2 GiB by it and others 2 GB.
    """
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return value
    size = _SIZE.fullmatch(value.strip())
    unit = _UNITS_BY_LOWER_CASE.get(size[2].lower()) if size else None
    if size is None or unit is None:
        msg = f"should be a number of bytes, or a size in one of the units {', '.join(UNITS)}, such as 512MiB"
        raise ValueError(msg)
    return int(Decimal(size[1]) * unit)


def write_size(nbytes: int) -> str:
    """Return the bytes in the largest binary unit that divides them, in the form that ``read_size`` reads."""
    for unit, size in UNITS.items():
        if "i" in unit and nbytes and nbytes % size == 0:
            return f"{nbytes // size}{unit}"
    return str(nbytes)


Bytes = Annotated[int, BeforeValidator(read_size), Word("BYTES")]
"""A number of bytes, written as a number or as a size like ``2GiB``."""

Seconds = Annotated[float, Word("SECONDS")]
