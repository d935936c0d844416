"""Functions that a request lets the model call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """One function.

    Attributes:
        parameters: JSON Schema of the arguments' object; None where the function takes any.
        strict: whether the model may write only arguments that follow ``parameters``.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False
