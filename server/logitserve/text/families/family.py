"""How a family of models writes its thinking and its calls, as its file declares it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from logitserve.text.families.own_template import OwnTemplate
from logitserve.text.families.readers import CallReader, GemmaReader, NamedReader, ObjectReader, XmlReader
from logitserve.text.message_parser import MessageParser, mistral_id, openai_id
from logitserve.text.regions import Kind, Opening, Region, RegionSyntax
from logitserve.text.stop_strings import ThinkingGate

if TYPE_CHECKING:
    from logitserve.text.tools import Tool


class _Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what a family's file declares: a name that is not known is an error."""


class Borders(_Declaration, frozen=True):
    """A region's borders for reading, where the strings that the model should write do not say them all.

    Each side is a list of strings or a regular expression. A region without a close runs to the end of the answer.
    """

    open: tuple[str, ...] = ()
    open_pattern: str = ""
    close: tuple[str, ...] = ()
    close_pattern: str = ""
    at_start: bool = False

    @property
    def strings(self) -> tuple[str, ...]:
        return (*self.open, *self.close)


class ReasoningSyntax(_Declaration, frozen=True):
    """Strings around the thinking, as the model or its chat template writes them.

    Attributes:
        anywhere: whether the thinking may open behind other text, as the strings are control tokens.
        answer: what opens the answer proper, where more than the thinking stands before it.
        borders: borders for reading.
    """

    open: str
    close: str
    anywhere: bool = False
    answer: str = ""
    borders: Borders | None = None


class CallSyntax(_Declaration, frozen=True):
    """How one answer's calls are written, with the white space that the model itself writes.

        begin open … close between open … close end

    A reader is more lenient than that about white space.

    Attributes:
        form: what stands between ``open`` and ``close``. "object": ``{"name": NAME, "arguments": {…}}``. "list": objects
            of that kind, with commas; ``open`` and ``close`` stand once around all of them. "named": NAME middle ``{…}``.
            "xml": ``<function=NAME>`` and ``<parameter=KEY>`` elements. "gemma": ``call:NAME{KEY:VALUE,…}``.
        middle_pattern: regular expression of all middles that a reader takes.
        quote: what stands around strings instead of quotation marks ("gemma").
        listed_names: whether only calls of tools that the request lists are calls, as JSON may be an answer too.
        ends_with_answer: whether the end of the answer closes a call, as the closing string is a stop token.
        borders: borders for reading.
    """

    form: Literal["object", "list", "named", "xml", "gemma"]
    open: str
    close: str
    begin: str = ""
    end: str = ""
    between: str = ""
    middle: str = ""
    middle_pattern: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    quote: str = ""
    listed_names: bool = False
    ends_with_answer: bool = False
    borders: Borders | None = None


class Detection(_Declaration, frozen=True):
    """Signs of a family: all strings of one of the lists stand in the chat template, or the model's architecture."""

    templates: tuple[tuple[str, ...], ...] = ()
    architectures: tuple[str, ...] = ()


class Family(_Declaration, frozen=True, dict=True):
    """A family of models.

    Attributes:
        call_id: the ids of its calls: "openai" is ``call_`` and 24 characters, "mistral" 9 letters and digits.
        turn: strings behind which chat templates leave the word to the assistant: they open its turn, or close a tool's result.
        also: further ways in which its models write calls at times. They are only read.
        content: borders of the answer proper, where it has some.
        control: further strings that delimit something, which are special tokens in some tokenizers.
        response_template: the tokenizer's own, which then says all about reading.
    """

    name: str
    detect: Detection = Detection()
    turn: tuple[str, ...] = ()
    reasoning: ReasoningSyntax | None = None
    calls: CallSyntax | None = None
    call_id: Literal["openai", "mistral"] = "openai"
    also: tuple[CallSyntax, ...] = ()
    content: Borders | None = None
    control: tuple[str, ...] = ()
    response_template: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise ValueError for borders that are no regular expressions, or that are missing."""
        assert self._syntax_without_calls  # noqa: S101 - compiles all of them

    @property
    def reads_calls(self) -> bool:
        """Whether a parser finds calls."""
        return self.calls is not None or (self._own is not None and self._own.has_calls)

    @property
    def reads_reasoning(self) -> bool:
        """Whether a parser finds thinking."""
        return any(region.kind == "reasoning" for region in self._syntax.regions.values())

    @cached_property
    def delimiters(self) -> tuple[str, ...]:
        """Strings that a parser must see, though they be special tokens."""
        found = list(self.control)
        for declared in (self.reasoning, self.calls, *self.also):
            if declared is not None:
                texts = msgspec.structs.asdict(declared)
                names = ("open", "close", "answer", "begin", "end", "between", "middle", "quote")
                found += [texts[name] for name in names if name in texts]
                found += declared.borders.strings if declared.borders is not None else ()
        found += self.content.strings if self.content is not None else ()
        if self._own is not None:
            found += self._own.delimiters
        return tuple(dict.fromkeys(text.strip() for text in found if text.strip()))

    def parser(
        self,
        prompt: str,
        *,
        tools: Sequence[Tool],
        parses_calls: bool,
        hidden: frozenset[str] = frozenset(),
    ) -> MessageParser:
        """Return a parser of one choice's text.

        Args:
            prompt: the prompt's text, since a template may open the thinking; "" where it is unknown.
            hidden: special tokens that the parser sees and that content does not show.
        """
        return MessageParser(
            self._syntax if parses_calls else self._syntax_without_calls,
            self._turn(prompt),
            reader=lambda opening: self._reader(opening, tools),
            new_id=openai_id if self.call_id == "openai" else mistral_id,
            hidden=hidden,
        )

    def thinking_gate(self, prompt: str) -> ThinkingGate | None:
        """Return a gate that keeps stop strings from the thinking; None where no thinking can come."""
        if self.reasoning is None:
            return None
        parser = self.parser(prompt, tools=(), parses_calls=False)
        if not parser.in_reasoning and not parser.is_start:
            return None
        if self.reasoning.answer:
            return ThinkingGate(self.reasoning.open, self.reasoning.answer, is_open=True)
        return ThinkingGate(
            self.reasoning.open.strip(), self.reasoning.close.strip(), is_open=parser.in_reasoning
        )

    @cached_property
    def _own(self) -> OwnTemplate | None:
        return None if self.response_template is None else OwnTemplate(self.response_template)

    @cached_property
    def _syntax(self) -> RegionSyntax:
        return RegionSyntax(self._own.regions if self._own is not None else self._regions())

    @cached_property
    def _syntax_without_calls(self) -> RegionSyntax:
        return RegionSyntax(
            [region for region in self._syntax.regions.values() if region.kind not in {"call", "mark"}]
        )

    def _regions(self) -> list[Region]:
        regions = []
        if self.reasoning is not None:
            regions.append(_region("reasoning", "reasoning", _reasoning_borders(self.reasoning)))
        for name, calls in self._call_syntaxes.items():
            borders = calls.borders or _call_borders(calls)
            regions.append(_region(name, "call", borders, ends_with_answer=calls.ends_with_answer))
        if self.calls is not None and self.calls.end:
            regions.append(_region("end", "mark", Borders(open=(self.calls.end.strip(),))))
        if self.content is not None:
            regions.append(_region("content", "content", self.content))
        return regions

    @cached_property
    def _call_syntaxes(self) -> dict[str, CallSyntax]:
        """The ways to write a call, by the names of their regions."""
        first = () if self.calls is None else (self.calls,)
        return {f"call{number}": calls for number, calls in enumerate((*first, *self.also))}

    def _turn(self, prompt: str) -> str:
        """Return what the prompt has of the assistant's turn, as far as that can be told."""
        if self._own is not None:
            return self._own.turn(prompt)
        start = max(
            (prompt.rfind(opening) + len(opening) for opening in self.turn if opening in prompt), default=-1
        )
        if start >= 0:
            return prompt[start:]
        thinking = "" if self.reasoning is None else self.reasoning.open.strip()
        return thinking if prompt.rstrip().endswith(thinking) else ""

    def _reader(self, opening: Opening, tools: Sequence[Tool]) -> CallReader:
        if self._own is not None:
            return self._own.reader(opening, tools)
        calls = self._call_syntaxes[opening.region.name]
        listed: set[str] | None = None
        if calls.listed_names:
            # The grammar of a strict tool knows the family's first way to write a call only.
            listed = {tool.name for tool in tools if calls is self.calls or not tool.strict}
        match calls.form:
            case "object" | "list":
                return ObjectReader(
                    calls.name_key,
                    calls.arguments_key,
                    listed=listed,
                    separators=calls.between.strip(),
                    ends_itself=calls.form == "list",
                )
            case "named":
                middle = calls.middle_pattern or re.escape(calls.middle.strip())
                return NamedReader(middle, ends_itself=not calls.close)
            case "xml":
                return XmlReader({tool.name: _properties(tool) for tool in tools})
            case "gemma":
                return GemmaReader(calls.quote)


def _reasoning_borders(reasoning: ReasoningSyntax) -> Borders:
    return reasoning.borders or Borders(
        open=(reasoning.open.strip(),), close=(reasoning.close.strip(),), at_start=not reasoning.anywhere
    )


def _call_borders(calls: CallSyntax) -> Borders:
    begin, opening, closing = calls.begin.strip(), calls.open.strip(), calls.close.strip()
    return Borders(
        open=(begin + opening, opening) if begin else (opening,), close=(closing,) if closing else ()
    )


def _region(name: str, kind: Kind, borders: Borders, *, ends_with_answer: bool = False) -> Region:
    opens = {"open_pattern": borders.open_pattern} if borders.open_pattern else {"open": list(borders.open)}
    closes: dict[str, Any] = {"close": list(borders.close)} if borders.close else {}
    if borders.close_pattern:
        closes = {"close_pattern": borders.close_pattern}
    return Region(name, kind, opens, closes, at_start=borders.at_start, ends_with_answer=ends_with_answer)


def _properties(tool: Tool) -> Mapping[str, Any]:
    properties = (tool.parameters or {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}
