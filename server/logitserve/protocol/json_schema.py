"""JSON Schema of the rules beyond the types of fields: for the OpenAPI document, never for validation."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

BOUNDED_TYPES = {"maximum": ("integer", "number"), "maxItems": ("array",), "maxProperties": ("object",)}
"""Keywords and the types that they bound.

A keyword's value is an option's name where a server's option is the bound.
"""


def with_options(schema: Any, options: object) -> Any:
    """Return the schema with options' names replaced by their values."""
    if isinstance(schema, list):
        return [with_options(item, options) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: getattr(options, value)
        if key in BOUNDED_TYPES and isinstance(value, str)
        else with_options(value, options)
        for key, value in schema.items()
    }


def bounded(schema: Schema, keyword: str, bound: int | str) -> Schema:
    """Return the schema with a bound on the alternatives that it fits.

    The bound is a number or an option's name.
    """
    if "anyOf" in schema:
        return {**schema, "anyOf": [bounded(choice, keyword, bound) for choice in schema["anyOf"]]}
    return {**schema, keyword: bound} if schema.get("type") in BOUNDED_TYPES[keyword] else schema


def nullable(schema: Schema) -> Schema:
    """Return a field's schema that takes null too. A null field counts as absent."""
    choices = schema.get("anyOf")
    if choices is None:
        notes: Schema = {key: schema[key] for key in ("default", "description") if key in schema}
        kept = {key: value for key, value in schema.items() if key not in notes}
        return {"anyOf": [kept, {"type": "null"}], **notes} if kept else schema
    return schema if {"type": "null"} in choices else {**schema, "anyOf": [*choices, {"type": "null"}]}


def any_of(values: tuple[Any, ...]) -> Schema:
    """Return the schema of a field that may hold one of these values, or null."""
    strings = [value for value in values if isinstance(value, str)]
    choices = [exactly(value) for value in values if not isinstance(value, str)]
    if strings:
        choices.insert(0, {"type": "string", "enum": strings})
    return {"anyOf": [*choices, {"type": "null"}]} if choices else {"type": "null"}


def exactly(value: Any) -> Schema:
    """Return the schema of one value, in words that generators of clients know (they take no ``const`` of a list)."""
    match value:
        case str():
            return {"type": "string", "enum": [value]}
        case bool():
            return {"type": "boolean", "enum": [value]}
        case list():
            items = exactly(value[0]) if value else {}
            return {"type": "array", "items": items, "minItems": len(value), "maxItems": len(value)}
        case dict():
            return {
                "type": "object",
                "properties": {name: exactly(member) for name, member in value.items()},
                "required": list(value),
                "additionalProperties": False,
            }
        case _:
            raise TypeError(type(value).__name__)
