"""What every program asks for: an object that ends soon, whatever the model thinks of fruit."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODEL = "smollm2"
QUESTION = "Describe a ripe banana."
MESSAGES = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 96
TOO_LONG = "word " * 9000
"""More tokens than the model's context holds."""


class Fruit(BaseModel):
    """A fruit of the market."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=16)
    colour: Literal["red", "green", "yellow"]
    grams: int = Field(ge=1, le=5000)
    tags: list[Literal["sweet", "sour", "round"]] = Field(max_length=2)


def base_url() -> str:
    """Return the API's base URL: the first argument is the server's address."""
    return f"{sys.argv[1]}/v1"


def report(found: dict[str, Any]) -> None:
    """Print what the client found, as the last line."""
    print(json.dumps(found))
