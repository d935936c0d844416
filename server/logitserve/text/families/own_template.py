"""A tokenizer's own response_template, which says how transformers reads the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_parsing.response_templates import load_response_template

from logitserve.text.families.readers import CallReader, TemplateReader
from logitserve.text.regions import Kind, Opening, Region

if TYPE_CHECKING:
    from logitserve.text.tools import Tool

_KINDS: Mapping[str, Kind] = {
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "tool_calls": "call",
}
"""What fields of templates are for, by their names. All others are content."""

_OPENS = ("open", "open_pattern")

_CLOSES = ("close", "close_pattern")


class OwnTemplate:
    """A response_template. Raises ValueError for one that transformers does not take."""

    def __init__(self, template: dict[str, Any]) -> None:
        self._loaded = load_response_template(template)
        self._template = template
        # A field without an opening takes what is left, which is content here in any case.
        self._fields = {name: field for name, field in template["fields"].items() if _borders(field, _OPENS)}
        self.regions = [
            Region(
                name,
                _KINDS.get(name, "content"),
                _borders(field, _OPENS),
                _borders(field, _CLOSES),
                # JSON is the only content that tells whether it is whole.
                ends_with_answer=field.get("content") == "json",
            )
            for name, field in self._fields.items()
        ]

    @property
    def has_calls(self) -> bool:
        return any(region.kind == "call" for region in self.regions)

    @property
    def delimiters(self) -> list[str]:
        """The borders' strings; those of regular expressions as they are written there."""
        found: list[str] = []
        for field in self._fields.values():
            for border in _borders(field, (*_OPENS, *_CLOSES)).values():
                found += [border] if isinstance(border, str) else border
        return [text.replace("\\", "") for text in found]

    def turn(self, prompt: str) -> str:
        """Return what the prompt has of the assistant's turn."""
        turn: str = self._loaded.truncate_past_last_anchor(prompt)
        return "" if turn == prompt else turn

    def reader(self, opening: Opening, tools: Sequence[Tool]) -> CallReader:
        """Return a reader of a call."""
        name = opening.region.name
        field = {**self._fields[name], "optional": True}
        declared = [
            {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters or {}}}
            for tool in tools
        ]
        template = {"start_anchor_pattern": r"\A", "fields": {name: field}}
        return TemplateReader(template, opening.text, declared)


def _borders(field: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: field[name] for name in names if name in field}
