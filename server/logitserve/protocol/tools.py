"""Functions that a chat's model may call, and what past turns called, in OpenAI's shapes."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import RequestBody, StrictModel
from logitserve.protocol.limits import at_most_items
from logitserve.text.tools import Tool

DEEPEST = 100
"""Lists and objects within each other in a tool's schema, and in the arguments of a past call."""

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

ToolMode = Literal["none", "auto", "required"]


def _checked_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        msg = f"is {len(name)} characters long or has others than letters, digits, _ and -; a name has 1 to 64 of these"
        raise ValueError(msg)
    return name


def _checked_parameters(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    if parameters is not None and parameters.get("type", "object") != "object":
        msg = 'is a schema whose type is not "object": arguments have names'
        raise ValueError(msg)
    _check_depth(parameters)
    return parameters


def _check_depth(value: Any) -> None:
    """Raise ValueError for lists and objects nested so deep that a template may not come to their end."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            msg = f"is nested more than {DEEPEST} deep"
            raise ValueError(msg)
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]


FunctionName = Annotated[str, AfterValidator(_checked_name)]


class FunctionDefinition(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: str = ""
    parameters: Annotated[dict[str, Any] | None, AfterValidator(_checked_parameters)] = None
    """JSON Schema of the arguments; without it the function takes none."""
    strict: bool = False
    """Whether the model can write only arguments that follow `parameters`, under `tool_choice` auto too."""


class ToolDefinition(StrictModel):
    """A tool. Functions are all there is."""

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control"})
    reasons: ClassVar[dict[str, str]] = {"cache_control": "Anthropic's hint for its cache of prefixes"}

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it, without what the client left out."""
        members = self.function.model_dump(exclude_unset=True, exclude={"strict"})
        function = {"name": self.function.name, "description": self.function.description, **members}
        # Templates read the schema of a function without arguments too.
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {**function, "parameters": parameters}}

    @property
    def tool(self) -> Tool:
        function = self.function
        return Tool(function.name, function.description, function.parameters, function.strict)


class NamedFunction(StrictModel):
    """The function to call."""

    name: FunctionName


def _as_choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required":
            return {"type": value}
        case {"type": "function", **others} if set(others) <= {"function"}:
            return value
        case {"type": str(kind)}:
            msg = f'of type "{kind[:40]}" is not supported by this server; list the tools that may be called in "tools"'
            raise ValueError(msg)
        case _:
            msg = 'is none of "none", "auto", "required" and {"type": "function", "function": {"name": "…"}}'
            raise ValueError(msg)


class NamedTool(StrictModel):
    """One tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class _Choice(StrictModel):
    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None


ToolChoice = Annotated[_Choice, BeforeValidator(_as_choice, json_schema_input_type=ToolMode | NamedTool)]


def _checked_arguments(arguments: str) -> str:
    _check_depth(_as_object(arguments))
    return arguments


def _as_object(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments


class PastFunction(StrictModel):
    """The function that a past turn called."""

    name: str = Field(min_length=1)
    arguments: Annotated[str, AfterValidator(_checked_arguments)]
    """A JSON object, as the model wrote it."""

    def for_template(self) -> dict[str, Any]:
        """Return the call with its arguments as an object, which templates read, where they are one."""
        return {"name": self.name, "arguments": _as_object(self.arguments)}


class PastCall(StrictModel):
    """A call of a past turn. Streams number calls by `index`, which some clients send back."""

    ignored: ClassVar[frozenset[str]] = frozenset({"index"})
    reasons: ClassVar[dict[str, str]] = {"index": "the call's number in a stream"}

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: PastFunction

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.for_template()}


PastCalls = Annotated[list[PastCall], Field(fail_fast=True), at_most_items("max_messages", "calls")]

Tools = Annotated[list[ToolDefinition], Field(fail_fast=True), at_most_items("max_tools", "tools")]


class ToolFields(RequestBody):
    """What the model may call, and how long it thinks: both become part of the prompt."""

    tools: Tools = Field([])
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it calls any: `auto` where there are tools. `required`, or one function, by a grammar."""
    reasoning_effort: ReasoningEffort | None = None
    """How long the model thinks, where its chat template knows of it."""

    @property
    def tool_mode(self) -> ToolMode:
        """Return whether the model may call, or must."""
        if self.tool_choice is None:
            return "auto" if self.tools else "none"
        mode = self.tool_choice.type
        return "required" if mode == "function" else mode

    @property
    def named_tool(self) -> str | None:
        """Return the function that must be called, if it is one alone."""
        function = None if self.tool_choice is None else self.tool_choice.function
        return None if function is None else function.name

    def check_tools(self) -> None:
        """Raise BadRequestError for a choice that the tools do not offer, and for two tools of one name."""
        names = [tool.function.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise BadRequestError(
                    f"'tools[{index}].function.name' is {name}, as that of another tool is.",
                    param=f"tools[{index}].function.name",
                )
        if not names and self.tool_mode == "required":
            raise BadRequestError(
                "'tool_choice' asks for a call, and there are no 'tools'.", param="tool_choice"
            )
        if self.named_tool is not None and self.named_tool not in names:
            raise BadRequestError(
                f"'tool_choice.function.name' is {self.named_tool}, which 'tools' does not list.",
                param="tool_choice.function.name",
            )
