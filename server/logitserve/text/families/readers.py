"""Readers of one call region's text, a form each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.content_parsers import parse_content

from logitserve.text.families.json_text import JsonScanner, items, members, object_text, string
from logitserve.text.families.plain_text import listed_texts, may_be_text

Call = tuple[str, str]
"""A function's name, and its arguments as a JSON object's text."""

_LONGEST_HEAD = 256
"""Characters of a region in which a reader looks for a sign that it is no call."""


class CallReader(Protocol):
    """Reads a region as it comes. What it says depends on the text alone, not on how that was cut."""

    @property
    def is_refuted(self) -> bool:
        """Whether the region certainly is no call, whatever follows."""

    @property
    def in_string(self) -> bool:
        """Whether a closing string that follows would be a part of an argument."""

    def push(self, text: str) -> int | None:
        """Read on. Return where in ``text`` the region ended, if it ends by itself."""

    def calls(self) -> list[Call] | None:
        """Return the calls, or None where the region is none: they are malformed or not whole."""


class ObjectReader:
    """``{"name": …, "arguments": {…}}``, several of them, or a list of them.

    Args:
        listed: names of which the function must be one; None where it may have any name.
        separators: characters that may stand between two objects, beside white space.
        ends_itself: whether the first object or list is all of the region.
    """

    def __init__(
        self,
        name_key: str,
        arguments_key: str,
        *,
        listed: Collection[str] | None,
        separators: str,
        ends_itself: bool,
    ) -> None:
        self._keys = (name_key, arguments_key)
        self._listed = listed
        self._scanner = JsonScanner(separators, only_first=ends_itself)
        self._pieces: list[str] = []
        self._head: str | None = ""

    @property
    def is_refuted(self) -> bool:
        return self._scanner.is_refuted

    @property
    def in_string(self) -> bool:
        return self._scanner.in_string

    def push(self, text: str) -> int | None:
        end = self._scanner.push(text)
        self._pieces.append(text)
        if self._head is not None:
            self._check_head(text)
        return end

    def calls(self) -> list[Call] | None:
        if self.is_refuted or not self._scanner.is_between:
            return None
        text = "".join(self._pieces)
        calls: list[Call] = []
        for start, end in self._scanner.spans:
            value = text[start:end]
            objects = items(value) if value.startswith("[") else [value]
            for one in objects or [""]:
                call = self._call(one)
                if call is None:
                    return None
                calls.append(call)
        return calls or None

    def _call(self, text: str) -> Call | None:
        found = members(text)
        if found is None:
            return None
        name_key, arguments_key = self._keys
        name = string(found.get(name_key, ""))
        # JSON that may as well be an answer needs both members to be a call.
        none_given = "" if self._listed is not None else "{}"
        arguments = found.get(arguments_key, none_given)
        arguments_text = object_text(none_given if arguments == "null" else arguments)
        if not name or arguments_text is None or not (self._listed is None or name in self._listed):
            return None
        return name, arguments_text

    def _check_head(self, text: str) -> None:
        """Refute a region that begins as no object does, or whose first member is none of a listed function's call."""
        self._head = head = ((self._head or "") + text)[:_LONGEST_HEAD]
        first = _FIRST_MEMBER.match(head)
        if first is None:
            self._scanner.is_refuted |= _NO_OBJECT.match(head) is not None
            if len(head) == _LONGEST_HEAD:
                self._head = None  # what it is the whole region says
            return
        key, name = first.groups()
        if self._listed is None or (key != self._keys[0] and key in {"type", "id", self._keys[1]}):
            self._head = None
        elif key != self._keys[0]:
            self._scanner.is_refuted = True
        elif name is not None:
            self._head = None
            self._scanner.is_refuted |= string(name) not in self._listed


_NO_OBJECT = re.compile(r"""\s*+(?:\[\s*+[^\s{]|\[?\s*+\{\s*+[^\s"])""")

_FIRST_MEMBER = re.compile(r'\s*+\[?\s*+\{\s*+"((?:[^"\\]|\\.)*+)"\s*+:\s*+("(?:[^"\\]|\\.)*+")?', re.DOTALL)


class NamedReader:
    """NAME, a middle, and ``{…}``.

    Args:
        middle: regular expression of what stands between the name and the arguments, white space aside.
        ends_itself: whether the object is the end of the region.
    """

    def __init__(self, middle: str, *, ends_itself: bool) -> None:
        self._header = re.compile(rf"\s*+([^\s<>\[\]{{}}()\"']++)\s*+(?:{middle})\s*+", re.DOTALL)
        self._scanner = JsonScanner(only_first=ends_itself)
        self._head = ""
        self._name: str | None = None
        self._pieces: list[str] = []
        self._is_refuted = False

    @property
    def is_refuted(self) -> bool:
        return self._is_refuted or self._scanner.is_refuted

    @property
    def in_string(self) -> bool:
        return self._scanner.in_string

    def push(self, text: str) -> int | None:
        if self._name is not None:
            return self._push_arguments(text)
        before = len(self._head)
        self._head += text
        start = self._head.find("{", 0, _LONGEST_HEAD)
        if start < 0:
            self._is_refuted = len(self._head) >= _LONGEST_HEAD
            return None
        found = self._header.fullmatch(self._head, 0, start)
        self._is_refuted = found is None
        if found is None:
            return None
        self._name = found.group(1)
        end = self._push_arguments(self._head[start:])
        return None if end is None else end + start - before

    def calls(self) -> list[Call] | None:
        if self.is_refuted or self._name is None or not self._scanner.spans:
            return None
        start, end = self._scanner.spans[0]
        arguments = object_text("".join(self._pieces)[start:end])
        if arguments is None or len(self._scanner.spans) > 1 or not self._scanner.is_between:
            return None
        return [(self._name, arguments)]

    def _push_arguments(self, text: str) -> int | None:
        self._pieces.append(text)
        return self._scanner.push(text)


class _Beginning:
    """Looks whether a text begins as it must, white space aside."""

    def __init__(self, expected: str) -> None:
        self._expected = expected
        self._head = ""
        self.is_refuted = False

    def push(self, text: str) -> None:
        if len(self._head) < len(self._expected):
            self._head = (self._head + text).lstrip()[: len(self._expected)]
            self.is_refuted = not self._expected.startswith(self._head)


class XmlReader:
    """``<function=NAME>`` with a ``<parameter=KEY>`` for each argument.

    Args:
        schemas: the parameters' schema of each tool, which says what is no string.
    """

    in_string = False

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._pieces: list[str] = []
        self._beginning = _Beginning("<function=")

    @property
    def is_refuted(self) -> bool:
        return self._beginning.is_refuted

    def push(self, text: str) -> int | None:
        self._pieces.append(text)
        self._beginning.push(text)
        return None

    def calls(self) -> list[Call] | None:
        text = "".join(self._pieces)
        if not _is_closed(text, "<function=", "</function>"):
            return None
        calls, end = [], 0
        for element in _FUNCTION_ELEMENT.finditer(text):
            arguments = self._arguments(*element.groups())
            if arguments is None or text[end : element.start()].strip():
                return None
            calls.append((element.group(1), arguments))
            end = element.end()
        return None if text[end:].strip() else calls or None

    def _arguments(self, name: str, body: str) -> str | None:
        if not _is_closed(body, "<parameter=", "</parameter>"):
            return None
        properties = self._schemas.get(name, {})
        arguments, end = {}, 0
        for element in _PARAMETER_ELEMENT.finditer(body):
            key, value = element.groups()
            if body[end : element.start()].strip():
                return None
            arguments[key] = _typed(value, properties.get(key))
            end = element.end()
        return None if body[end:].strip() else _json(arguments)


_FUNCTION_ELEMENT = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)

_PARAMETER_ELEMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _is_closed(text: str, opening: str, closing: str) -> bool:
    """Return whether a closing string follows every opening one, lest each of them looks for it to the end."""
    return text.rfind(opening) <= text.rfind(closing)


def _typed(text: str, schema: Any) -> Any:
    """Return a parameter's value: the text where the schema has it plain or where it is no JSON, else what JSON says."""
    if not isinstance(schema, Mapping) or may_be_text(schema) or listed_texts(schema) is not None:
        return text
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _refuse(constant: str) -> None:
    msg = f"{constant} is no JSON"
    raise ValueError(msg)


class GemmaReader:
    """``call:NAME{KEY:VALUE,…}``, with strings between quotes of the family's own."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._pieces: list[str] = []
        self._beginning = _Beginning("call:")

    @property
    def is_refuted(self) -> bool:
        return self._beginning.is_refuted

    @property
    def in_string(self) -> bool:
        return "".join(self._pieces).count(self._quote) % 2 == 1

    def push(self, text: str) -> int | None:
        self._pieces.append(text)
        self._beginning.push(text)
        return None

    def calls(self) -> list[Call] | None:
        found = _GEMMA_CALL.fullmatch("".join(self._pieces))
        if found is None:
            return None
        quotes = {"unquoted_keys": True, "string_delims": [[self._quote, self._quote]]}
        try:
            value = parse_content(found.group(2), "json", quotes)
        except (ValueError, RecursionError):
            return None
        arguments = _json(value)
        return None if arguments is None else [(found.group(1), arguments)]


_GEMMA_CALL = re.compile(r"\s*call:([^\s{]+)\s*(\{.*\})\s*", re.DOTALL)


class TemplateReader:
    """A call as a tokenizer's own response_template reads it.

    Args:
        template: a response_template of the call's field alone.
        opening: the region's opening string.
        tools: the request's tools, as chat templates take them, for the types of arguments.
    """

    in_string = False
    is_refuted = False

    def __init__(self, template: dict[str, Any], opening: str, tools: Sequence[dict[str, Any]]) -> None:
        self._template = template
        self._tools: list[dict[str, Any] | Callable[..., Any]] = list(tools)
        self._pieces = [opening]

    def push(self, text: str) -> int | None:
        self._pieces.append(text)
        return None

    def calls(self) -> list[Call] | None:
        try:
            message = parse_response("".join(self._pieces), self._template, prefix="", tools=self._tools)
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        calls = [_call_of(one) for value in message.values() for one in _flat(value)]
        return [call for call in calls if call is not None] if calls and None not in calls else None


def _flat(value: Any) -> list[Any]:
    """Return the items of lists within lists, since a field that repeats may hold lists of calls."""
    return [one for inner in value for one in _flat(inner)] if isinstance(value, list) else [value]


def _call_of(value: Any) -> Call | None:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else _json(arguments)
    found = object_text(text or "")
    return None if found is None else (function["name"], found)


def _json(value: Any) -> str | None:
    """Return a value as JSON; None where JSON cannot say it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails on half of a character, which an escape may have made
    except (TypeError, ValueError, RecursionError):
        return None
    return text
