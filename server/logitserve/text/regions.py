"""Regions of a model's text: its thinking, its calls, and what lies between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

OUTSIDE = "outside"
"""Name of the field that takes what lies outside of all regions."""

_ENTRY = "\x00"
"""Opening of the region that an inner parser begins in."""

_RENEWED_AFTER = 2048
"""Characters after which a parser is made anew, since the library's keeps all text and copies it with each piece."""

Kind = Literal["content", "reasoning", "call", "mark"]
"""What a region holds. A mark holds nothing: its opening stands alone."""


@dataclass(frozen=True)
class Region:
    """How a region begins and ends. Either may be literal strings or a regular expression.

    Attributes:
        opens: members "open" or "open_pattern" of a response template's field.
        closes: members "close" or "close_pattern"; none where the region runs to the end of the answer.
        at_start: whether only white space may stand before the region.
        ends_with_answer: whether the end of the answer closes the region as its closing does.
    """

    name: str
    kind: Kind
    opens: Mapping[str, Any]
    closes: Mapping[str, Any] = field(default_factory=dict)
    at_start: bool = False
    ends_with_answer: bool = False

    @cached_property
    def inner(self) -> Stretch:
        """What a text within the region is searched for."""
        template = _template({self.name: {"open": _ENTRY, **self.closes}})
        return Stretch(template, _ENTRY, [self.closes])


class Stretch:
    """What a text is searched for, up to the next border of a region.

    Args:
        entry: text that begins the region in which the stretch lies.
        borders: borders that may end it.

    Attributes:
        signs: finds characters with which a border may begin; None where any may.
    """

    def __init__(self, template: ResponseTemplate, entry: str, borders: Iterable[Mapping[str, Any]]) -> None:
        self.template = template
        self.signs: re.Pattern[str] | None = None
        self._entry = entry
        literals = [
            text for border in borders for key, value in border.items() for text in _literals(key, value)
        ]
        if "" not in literals:
            firsts = "".join({re.escape(text[0]) for text in literals})
            self.signs = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def parser(self) -> ResponseParser:
        return ResponseParser(self.template, prefix=self._entry)


def _literals(key: str, value: str | list[str]) -> list[str]:
    """Return a border's strings; an empty one for a regular expression."""
    if key.endswith("_pattern"):
        return [""]
    return [value] if isinstance(value, str) else value


def _outside(regions: Sequence[Region]) -> Stretch:
    opens = {region.name: region.opens for region in regions}
    return Stretch(_template({OUTSIDE: {}, **opens}), "", opens.values())


class RegionSyntax:
    """All regions of a family's text. Safe to share."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = {region.name: region for region in regions}
        self.first = _outside(regions)
        self.outer = _outside([region for region in regions if not region.at_start])


@dataclass(frozen=True, slots=True)
class Text:
    """Text in the open region, or outside of all."""

    text: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A region's opening string."""

    region: Region
    text: str


@dataclass(frozen=True, slots=True)
class Closing:
    """The closing string of the region that was open."""

    region: Region
    text: str


Event = Text | Opening | Closing


class Regions:
    """Cuts text at the borders of regions, as transformers' ResponseParser finds them, and loses no character.

    A parser of the library serves for one stretch, outside or inside of a region. What it has not given back by the
    border is read by the next one.
    """

    def __init__(self, syntax: RegionSyntax) -> None:
        self._syntax = syntax
        self._input = ""
        self._unread = ""
        self._num_read = 0
        self._events: list[dict[str, Any]] = []
        self._is_ended = False
        self._is_start = True
        self.open: Region | None = None
        self._renew()

    @property
    def is_start(self) -> bool:
        """Whether there was only white space so far."""
        return self._is_start

    def push(self, text: str) -> None:
        """Append text."""
        self._input += text

    def next(self, *, final: bool) -> Event | None:
        """Return what comes next. None where that needs more text, or where ``final`` and there is no more."""
        while True:
            while self._events:
                event = self._next_of_library()
                if event is not None:
                    return event
            if self._input:
                text, self._input = self._input, ""
                if not self._unread and self._signs is not None and not self._signs.search(text):
                    return self._text(text)
                if self._num_read > _RENEWED_AFTER:
                    text = self._unread + text
                    self._renew()
                self._unread += text
                self._num_read += len(text)
                self._events = self._parser.feed(text)
            elif final and not self._is_ended:
                self._is_ended = True
                self._events = self._parser.finalize()[1]
            else:
                return None

    def leave(self, text: str = "") -> None:
        """End the open region before ``text``, which was its latest, and all that follows."""
        self._input = text + self._unread + self._input
        self.open = None
        self._renew()

    def stay(self, region: Region) -> None:
        """Go on within a region that was closed by the latest event."""
        self.open = region
        self._renew()

    def forget_unread(self) -> None:
        """Drop text that may become a border."""
        self._renew()

    def _renew(self) -> None:
        """Begin a parser where the text is."""
        if self.open is not None:
            stretch = self.open.inner
        else:
            stretch = self._syntax.first if self._is_start else self._syntax.outer
        self._parser = stretch.parser()
        self._signs = stretch.signs
        self._unread, self._num_read, self._events, self._is_ended = "", 0, [], False

    def _next_of_library(self) -> Event | None:
        event = self._events.pop(0)
        match event["type"]:
            case "region_chunk":
                return self._text(event["text"])
            case "region_open" if event["field"] != OUTSIDE:
                return self._opening(self._syntax.regions[event["field"]])
            case "region_close" if event["field"] != OUTSIDE:
                return self._closing()
            case _:
                return None

    def _text(self, text: str) -> Text:
        self._unread = self._unread[len(text) :]
        if self._is_start and self.open is None and not text.isspace():
            # Whatever may only stand at the start was looked for in the text behind this as well.
            self._is_start = False
            self.leave()
        return Text(text)

    def _opening(self, region: Region) -> Opening:
        opening = self._syntax.first.template.fields[region.name].open_re.match(self._unread).group()
        self._is_start = False
        self.open = None if region.kind == "mark" else region
        self._move_past(opening)
        return Opening(region, opening)

    def _closing(self) -> Closing | None:
        """Return the closing string; None where the region was closed by the end of the text alone."""
        assert self.open is not None  # noqa: S101 - closings are told of open regions alone
        pattern = self.open.inner.template.fields[self.open.name].close_re
        found = None if pattern is None else pattern.match(self._unread)
        if found is None:
            return None
        region, self.open = self.open, None
        self._move_past(found.group())
        return Closing(region, found.group())

    def _move_past(self, border: str) -> None:
        self._input = self._unread[len(border) :] + self._input
        self._renew()


def _template(fields: Mapping[str, Mapping[str, Any]]) -> ResponseTemplate:
    """Return a template of fields whose texts stay as they are, so that no text is an error."""
    # The library wants what regular expressions capture to be used; it need not be.
    as_text = {
        "content": "text",
        "content_args": {"strip": False},
        "repeats": True,
        "transform": "{content}",
    }
    return load_response_template(
        {
            "start_anchor_pattern": r"\A",
            "fields": {name: {**borders, **as_text} for name, borders in fields.items()},
        }
    )
