"""The model's chat template: what it reads, and the prompt that it makes of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from logitserve.errors import BadRequestError

TEMPLATE_ERRORS = (TemplateError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError)

RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"conversation", "conversations", "return_assistant_tokens_mask"}
)
"""Variables of templates, and parameters of their renderer, that no client sets by ``chat_template_kwargs``."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates that know no effort are told whether to think."""


PROBE = "Probe"
"""Text by which it is told what a template makes of parts."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages, and how the prompt is to end.

    Attributes:
        variables: the template's own variables that the request sets.
        tools: functions that the model may call, in OpenAI's form.
        reasoning_effort: how long the model is to think, in OpenAI's words.
    """

    messages: list[dict[str, Any]]
    """A content is a text or a list of parts, as `{"type": "text", "text": …}` and `{"type": "image"}`."""
    add_generation_prompt: bool
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    reasoning_effort: str | None = None


class ChatTemplate:
    """A Jinja template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens

    def render(self, turns: Turns) -> str:
        """Return the prompt. A developer speaks as the system where the template knows no developer.

        Raises BadRequestError for a variable that the template does not read, and for what it refuses, and
        RecursionError for variables that are nested deeply.
        """
        self._check_variables(turns.variables)
        variables = {**turns.variables, **self._effort_variables(turns)}
        tools: list[dict[Any, Any] | Callable[..., Any]] = [*turns.tools]
        messages = turns.messages if self._knows_developer else list(map(_without_developer, turns.messages))
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                tools=tools or None,
                add_generation_prompt=turns.add_generation_prompt,
                continue_final_message=turns.continue_final_message,
                **{**self._special_tokens, **variables},
            )[0]
        except TEMPLATE_ERRORS as error:
            what = "'messages' or 'tools'" if turns.tools else "'messages'"
            raise BadRequestError(
                f"The model's chat template refuses these {what}: {_shown(error)}", param="messages"
            ) from error
        text: str = rendered[0]
        return text

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template reads the tools that a request lists."""
        return self._parsed is not None and "tools" in jinja2.meta.find_undeclared_variables(self._parsed)

    def writes_images(self, mark: str) -> bool:
        """Return whether the template writes ``mark`` once for an image among the parts of a user's content, and its text.

        Templates for plain texts fail on parts, or write them out as a list.
        """
        parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
        try:
            prompt = self.render(Turns([{"role": "user", "content": parts}], add_generation_prompt=True))
        except (BadRequestError, RecursionError):
            return False
        return prompt.count(mark) == 1 and prompt.count(PROBE) == 1

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables that the template reads and a request may set."""
        parsed = self._parsed
        if parsed is None:
            return frozenset()
        names = jinja2.meta.find_undeclared_variables(parsed)
        known = parsed.environment.globals if parsed.environment is not None else {}
        # A template gives its options defaults where they are not defined. What it sets otherwise is its own.
        stored = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
        tests = [test for test in parsed.find_all(nodes.Test) if test.name in ("defined", "undefined")]
        options = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
        own = RESERVED_VARIABLES | self._special_tokens.keys() | known.keys() | (stored - options)
        return frozenset(names - own)

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether the template writes or compares the role's name."""
        if self._parsed is None:
            return False
        texts = [node.data for node in self._parsed.find_all(nodes.TemplateData)]
        texts += [node.value for node in self._parsed.find_all(nodes.Const) if isinstance(node.value, str)]
        return any("developer" in text for text in texts)

    @cached_property
    def _parsed(self) -> nodes.Template | None:
        """The template as a tree; None where it is no template, which rendering will say."""
        try:
            environment = _compile_jinja_template(self.source).environment
            parsed: nodes.Template = environment.parse(self.source)
        except TemplateError:
            return None
        return parsed

    def _effort_variables(self, turns: Turns) -> dict[str, Any]:
        """Return the variable by which the template learns how long to think. Raises BadRequestError."""
        effort = turns.reasoning_effort
        if effort is None:
            return {}
        name: str
        value: str | bool
        if "reasoning_effort" in self.variables:
            name, value = "reasoning_effort", effort
        elif switch := next((name for name in THINKING_SWITCHES if name in self.variables), None):
            name, value = switch, effort != "none"
        elif effort == "none":
            return {}
        else:
            raise BadRequestError(
                f"'reasoning_effort' is {effort}, and the model's chat template knows no effort: only none is taken.",
                param="reasoning_effort",
            )
        if turns.variables.get(name, value) != value:
            raise BadRequestError(
                f"'reasoning_effort' and 'chat_template_kwargs.{name}' contradict each other.",
                param="reasoning_effort",
            )
        return {name: value}

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise BadRequestError(
                    f"'chat_template_kwargs.{name[:100]}' is nothing that the model's chat template reads; "
                    f"what may be set: {known[:300]}.",
                    param=f"chat_template_kwargs.{name[:100]}",
                    code="unknown_parameter",
                )


def with_contents(turns: Turns, *, as_parts: bool) -> Turns:
    """Return the turns with every content as a list of parts, or as a text, with line breaks between its parts.

    An empty content is an empty text in both forms. Images have no place in a text.
    """
    change = _as_parts if as_parts else _as_text
    messages = [{**message, "content": change(message["content"])} for message in turns.messages]
    return replace(turns, messages=messages)


def _as_parts(content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": content}] if content and isinstance(content, str) else content


def _as_text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _without_developer(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _shown(error: Exception) -> str:
    # Marks of control tokens cannot be written as UTF-8.
    return str(error)[:200].encode("utf-8", "ignore").decode()
