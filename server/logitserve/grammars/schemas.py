"""Removal of what constrains nothing from a JSON Schema, so that nobody is refused for it.

llguidance refuses keywords that it does not implement, whatever their values. Clients send some with values that allow
everything, and formats that JSON Schema does not define.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from logitengine.grammar.vocabulary import GrammarError

DEEPEST = 100
"""Schemas nested in each other; llguidance reads 128 levels of JSON."""

STANDARD_FORMATS = frozenset({
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
    *("uri", "uri-reference", "iri", "iri-reference", "uri-template", "uuid", "regex"),
    *("json-pointer", "relative-json-pointer"),
})  # fmt: skip
"""Formats of draft 2020-12. All others, as OpenAPI's int32 or password, are notes."""

ONE = ("additionalProperties", "additionalItems", "contains", "else", "if", "items", "not", "propertyNames", "then",
       "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
"""Keywords that hold a schema; ``items`` may hold a list in older drafts."""

LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def drop_idle(schema: Any, depth: int = 0) -> Any:
    """Return the schema without keywords that constrain nothing. Raises GrammarError."""
    if depth > DEEPEST:
        raise GrammarError(f"its schemas are nested more than {DEEPEST} deep")
    if not isinstance(schema, dict):
        return schema
    if "x-guidance" in schema:
        raise GrammarError('the keyword "x-guidance" is not taken from clients')
    kept = {key: value for key, value in schema.items() if not _is_idle(key, value, schema)}
    for key, value in kept.items():
        if isinstance(value, dict) and key in MAPS:
            kept[key] = {name: drop_idle(member, depth + 1) for name, member in value.items()}
        elif isinstance(value, list) and key in LISTS:
            kept[key] = [drop_idle(member, depth + 1) for member in value]
        elif key in ONE:
            kept[key] = drop_idle(value, depth + 1)
    return kept


def _is_idle(key: str, value: Any, schema: dict[str, Any]) -> bool:
    test = IDLE.get(key)
    return test is not None and test(value, schema)


def _allows_all(value: Any, _schema: dict[str, Any]) -> bool:
    return value is True or value == {}


def _is_foreign(value: Any, _schema: dict[str, Any]) -> bool:
    return isinstance(value, str) and value not in STANDARD_FORMATS


IDLE: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "uniqueItems": lambda value, schema: (
        value is False or (value is True and schema.get("maxItems") in (0, 1))
    ),
    "format": _is_foreign,
    "unevaluatedProperties": _allows_all,
    "unevaluatedItems": _allows_all,
    "propertyNames": _allows_all,
    "not": lambda value, _schema: value is False,
    "if": lambda _value, schema: not ("then" in schema or "else" in schema),
    "then": lambda value, schema: "if" not in schema or _allows_all(value, schema),
    "else": lambda value, schema: "if" not in schema or _allows_all(value, schema),
    "dependentRequired": lambda value, _schema: isinstance(value, dict) and not any(value.values()),
    "dependentSchemas": lambda value, schema: (
        isinstance(value, dict) and all(_allows_all(member, schema) for member in value.values())
    ),
    "contains": lambda _value, schema: schema.get("minContains") == 0 and "maxContains" not in schema,
    "minContains": lambda value, schema: (
        "contains" not in schema or (value == 0 and "maxContains" not in schema)
    ),
    "maxContains": lambda _value, schema: "contains" not in schema,
}
"""Keywords that llguidance does not implement, or not with all values, and when they allow everything."""
