"""Grammars of one call: its function's name, and arguments in the form that the model's family writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson
from logitengine.grammar.vocabulary import GrammarError

from logitserve.grammars.lark import Pieces, Rules, quoted, symbols, text_until
from logitserve.text.families.family import CallSyntax
from logitserve.text.families.plain_text import listed_texts, may_be_text

ANY_OBJECT: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

NOTES = frozenset(
    {"type", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
"""Keywords that allow every text where the type is string."""

KEY = "[a-zA-Z0-9_.-]{1,64}"
"""Names of arguments where no quotation marks stand around them."""


def call_body(
    syntax: CallSyntax,
    strings: Mapping[str, Pieces],
    name: str,
    parameters: dict[str, Any] | None,
    rules: Rules,
    *,
    free: bool,
) -> str:
    """Return what stands between a call's opening and closing string.

    Args:
        strings: those of the syntax, in pieces.
        parameters: schema of the arguments, or None for none.
        free: whether the arguments are any object, whatever the schema.

    Raises GrammarError for a schema that cannot be honoured in this form.
    """
    schema = _object_schema(parameters)
    try:
        match syntax.form:
            case "xml":
                return _xml(name, schema, rules, free=free)
            case "gemma":
                arguments = _Gemma(strings["quote"], rules).arguments(schema, free=free)
                return f"{quoted(f'call:{name}')} {arguments}"
            case "named":
                arguments = rules.json(ANY_OBJECT if free else schema)
                return f"{quoted(name)} {symbols(strings['middle'])} {arguments}"
            case "object" | "list":
                arguments = rules.json(ANY_OBJECT if free else schema)
                head = [f'{{"{syntax.name_key}":', f'"{name}",', f'"{syntax.arguments_key}":']
                return f'{" / ?/ ".join(map(quoted, head))} / ?/ {arguments} "}}"'
    except GrammarError as error:
        raise GrammarError(f"the parameters of {name}: {error}") from error


def _object_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    if parameters is None:
        return NO_ARGUMENTS
    return {"type": "object", **parameters}


def _properties(schema: dict[str, Any], form: str) -> dict[str, tuple[dict[str, Any], bool]]:
    """Return each property's schema, and whether it is required. Raises GrammarError for objects with other rules."""
    known = NOTES | {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}
    others = schema.keys() - known
    properties = schema.get("properties", {})
    if others or not isinstance(properties, dict):
        raise GrammarError(f"{form} cannot follow {', '.join(sorted(others)) or 'properties'} of an object")
    for name in properties:
        if re.fullmatch(KEY, name) is None:
            raise GrammarError(f"{form} cannot write the name {name[:50]!r}")
    required = schema.get("required", [])
    return {
        name: (value if isinstance(value, dict) else {}, name in required)
        for name, value in properties.items()
    }


def _xml(name: str, schema: dict[str, Any], rules: Rules, *, free: bool) -> str:
    """Return Qwen 3.5's elements. Texts stand in them as they are, other values as JSON."""
    end: Pieces = [("\n</parameter>\n", None)]
    if free:
        parameters = f'("<parameter=" /{KEY}/ ">\\n" {text_until(end, rules)})*'
    else:
        definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        elements = []
        for key, (value, is_required) in _properties(schema, "the XML of this model's calls").items():
            element = f"{quoted(f'<parameter={key}>' + chr(10))} {_xml_value(value, definitions, end, rules)}"
            elements.append(element if is_required else f"({element})?")
        parameters = " ".join(elements)
    return f'{quoted(f"<function={name}>" + chr(10))} {parameters} "</function>"'


def _xml_value(schema: dict[str, Any], definitions: dict[str, Any], end: Pieces, rules: Rules) -> str:
    texts = listed_texts(schema)
    if texts is not None:
        return f"({' | '.join(map(quoted, texts))}) {symbols(end)}"
    if may_be_text(schema):
        _check_any_text(schema, "the XML of this model's calls")
        return text_until(end, rules)
    return f"{rules.json({**schema, **definitions})} {symbols(end)}"


def _check_any_text(schema: dict[str, Any], form: str) -> None:
    """Refuse rules of strings in a form that has no quotation marks. Raises GrammarError."""
    others = schema.keys() - NOTES - {"anyOf", "oneOf", "format"}
    if others:
        raise GrammarError(f"{form} cannot follow {', '.join(sorted(others))} of a string")


class _Gemma:
    """Gemma's objects: names without quotation marks, in the order of the alphabet, and strings in quotes of their own."""

    FORM = "the form of this model's calls"

    def __init__(self, quote: Pieces, rules: Rules) -> None:
        self._quote = quote
        self._rules = rules
        self._any: str | None = None

    def arguments(self, schema: dict[str, Any], *, free: bool) -> str:
        return self._any_object() if free else self._object(schema)

    def _object(self, schema: dict[str, Any]) -> str:
        if "properties" not in schema and schema.get("additionalProperties") is not False:
            return self._any_object()
        properties = sorted(_properties(schema, self.FORM).items())
        # What follows the members that are there, by whether any is.
        first, later = '"}"', '"}"'
        for name, (value, is_required) in reversed(properties):
            member = f"{quoted(name + ':')} {self._value(value)}"
            rest = self._rules.add(later)
            with_member, after_another = f"{member} {rest}", f'"," {member} {rest}'
            first = with_member if is_required else f"{with_member} | {self._rules.add(first)}"
            later = after_another if is_required else f"{after_another} | {rest}"
        return f'"{{" {self._rules.add(first)}'

    def _value(self, schema: dict[str, Any]) -> str:
        texts = listed_texts(schema)
        quote = symbols(self._quote)
        if texts is not None:
            return f"{quote} ({' | '.join(map(quoted, texts))}) {quote}"
        match schema.get("type"):
            case "string":
                _check_any_text(schema, self.FORM)
                return f"{quote} {text_until(self._quote, self._rules)}"
            case "integer" | "number" | "boolean" | "null":
                return self._rules.json(schema)
            case "object":
                return self._object(schema)
            case "array" if not schema.keys() - NOTES - {"items"}:
                item = self._rules.add(self._value(schema.get("items", {})))
                return f'"[" ({item} ("," {item})*)? "]"'
            case None if not schema.keys() - NOTES:
                return self._any_value()
        raise GrammarError(f"{self.FORM} cannot follow {orjson.dumps(schema).decode()[:100]}")

    def _any_value(self) -> str:
        if self._any is None:
            quote = symbols(self._quote)
            # Rules may name those that follow: the value's own name is known before its members are.
            value = self._any = self._rules.reserve()
            text = f"{quote} {text_until(self._quote, self._rules)}"
            number = self._rules.json({"type": ["number", "boolean", "null"]})
            pair = self._rules.add(f'/{KEY}/ ":" {value}')
            members = f'"{{" ({pair} ("," {pair})*)? "}}"'
            items = f'"[" ({value} ("," {value})*)? "]"'
            self._rules.define(value, f"{text} | {number} | {members} | {items}")
        return self._any

    def _any_object(self) -> str:
        pair = self._rules.add(f'/{KEY}/ ":" {self._any_value()}')
        return f'"{{" ({pair} ("," {pair})*)? "}}"'
