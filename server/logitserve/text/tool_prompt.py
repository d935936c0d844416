"""Tools as a text for the system, where the model's chat template knows no tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from logitserve.text.families.family import CallSyntax

ARGUMENTS = '{"ARGUMENT": VALUE}'


def with_tools_in_system(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], syntax: CallSyntax
) -> list[dict[str, Any]]:
    """Return the conversation with a system message that begins with the tools, and how they are called."""
    functions = "\n".join(orjson.dumps(tool["function"]).decode() for tool in tools)
    text = f"You can call these functions:\n{functions}\nTo call one, answer with:\n{_example(syntax)}"
    if messages and messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _example(syntax: CallSyntax) -> str:
    match syntax.form:
        case "object" | "list":
            call = f'{{"{syntax.name_key}": "FUNCTION", "{syntax.arguments_key}": {ARGUMENTS}}}'
        case "named":
            call = f"FUNCTION{syntax.middle}{ARGUMENTS}"
        case "xml":
            call = "<function=FUNCTION>\n<parameter=ARGUMENT>\nVALUE\n</parameter>\n</function>"
        case "gemma":
            call = "call:FUNCTION{ARGUMENT:VALUE}"
    return f"{syntax.begin}{syntax.open}{call}{syntax.close}{syntax.end}"
