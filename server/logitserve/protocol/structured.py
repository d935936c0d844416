"""What an answer's text must follow: OpenAI's ``response_format``, and ``structured_outputs`` as vLLM has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BeforeValidator, Field

from logitserve.errors import BadRequestError
from logitserve.grammars.source import GrammarSource
from logitserve.protocol.base import StrictModel
from logitserve.protocol.limits import at_most_of

MOST_CHOICES = 65_536

VLLMS_OLDER_FIELDS = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
}
"""Fields of requests that vLLM removed, and what took their place."""

IGNORED = {"disable_fallback": "says what vLLM does when a grammar fails; here it is refused"}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
"""Members of vLLM's structured_outputs that are not served, each with the values that change nothing."""


def _schema_source(schema: dict[str, Any], param: str) -> GrammarSource:
    try:
        return GrammarSource("json_schema", orjson.dumps(schema).decode(), param)
    except orjson.JSONEncodeError as error:
        raise BadRequestError(f"'{param}' is nested too deep: {error}.", param=param) from error


class JsonSchemaFormat(StrictModel):
    """A named JSON Schema. The answer follows it whether or not it is ``strict``."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON Schema of draft 2020-12; a keyword that cannot be honoured is refused."""
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def check(self) -> None:
        """Raise BadRequestError for members that contradict each other."""
        if (self.type == "json_schema") is (self.json_schema is None):
            raise BadRequestError(
                "'response_format.json_schema' stands with the type \"json_schema\", and with no other.",
                param="response_format.json_schema",
            )

    @property
    def source(self) -> GrammarSource | None:
        if self.json_schema is not None:
            return _schema_source(self.json_schema.schema_, "response_format.json_schema.schema")
        return GrammarSource("json_object", "", "response_format") if self.type == "json_object" else None


def _as_schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        msg = f"is not valid JSON: {error}"
        raise ValueError(msg) from None


class StructuredOutputs(StrictModel):
    """What the answer's text must follow: exactly one of these."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED)
    reasons: ClassVar[Mapping[str, str]] = IGNORED
    refused: ClassVar[frozenset[str]] = frozenset(NEUTRAL)
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    json_: Annotated[
        dict[str, Any] | None, BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str | None)
    ] = Field(None, alias="json")
    """A JSON Schema, or its text."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = Field(None, min_length=1)
    """Rust's syntax, without look-around; it describes the whole text."""
    choice: Annotated[
        list[str] | None, Field(min_length=1, fail_fast=True), at_most_of(MOST_CHOICES, "choices")
    ] = None
    grammar: str | None = Field(None, min_length=1)
    """A context-free grammar in llguidance's Lark or in GBNF."""

    def check(self) -> None:
        """Raise BadRequestError unless exactly one member is set."""
        if sum(bool(value) or value == {} for value in (self.json_, self.json_object, *self._texts)) != 1:
            raise BadRequestError(
                "'structured_outputs' takes exactly one of json, json_object, regex, choice and grammar.",
                param="structured_outputs",
            )

    @property
    def _texts(self) -> tuple[Any, ...]:
        return (self.regex, self.choice, self.grammar)

    @property
    def source(self) -> GrammarSource:
        if self.json_ is not None:
            return _schema_source(self.json_, "structured_outputs.json")
        if self.regex is not None:
            return GrammarSource("regex", self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return GrammarSource("choice", orjson.dumps(self.choice).decode(), "structured_outputs.choice")
        if self.grammar is not None:
            return GrammarSource("grammar", self.grammar, "structured_outputs.grammar")
        return GrammarSource("json_object", "", "structured_outputs")
