"""Values that stand in a call as plain text, without quotation marks: what the grammar writes and the reader reads alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def listed_texts(schema: Mapping[str, Any]) -> list[str] | None:
    """Return the only texts that the schema allows, where it lists them and nothing else."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return None
    return values


def may_be_text(schema: Mapping[str, Any]) -> bool:
    """Return whether a value may be any string, as far as the schema says without references."""
    if "enum" in schema or "const" in schema or "$ref" in schema:
        return False
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return any(may_be_text(member) for member in schema[key] if isinstance(member, Mapping))
    kinds = schema.get("type", "string")
    return "string" in kinds if isinstance(kinds, list) else kinds == "string"
