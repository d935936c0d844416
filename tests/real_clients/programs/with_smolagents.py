"""smolagents: a model that must call a tool, whole and streamed."""

from __future__ import annotations

import json

from fruit import MAX_TOKENS, MESSAGES, MODEL, base_url, report
from smolagents import OpenAIModel, Tool
from smolagents.models import agglomerate_stream_deltas


class RecordFruit(Tool):
    """A tool of strings and numbers, as smolagents describes them."""

    name = "record_fruit"
    description = "Record a fruit."
    inputs = {  # noqa: RUF012 - the library's form
        "colour": {"type": "string", "enum": ["red", "green", "yellow"], "description": "the colour"},
        "grams": {"type": "integer", "description": "the weight"},
    }
    output_type = "string"

    def forward(self, colour: str, grams: int) -> str:
        """Return what is told to the model."""
        return f"{grams} grams of {colour}"


model = OpenAIModel(
    MODEL,
    api_base=base_url(),
    api_key="none",
    client_kwargs={"max_retries": 0},
    temperature=0,
    max_tokens=MAX_TOKENS,
)
tools = [RecordFruit()]
asked = {"tools_to_call_from": tools, "parallel_tool_calls": False}
whole = model.generate(MESSAGES, **asked)
streamed = agglomerate_stream_deltas(list(model.generate_stream(MESSAGES, **asked)))


def arguments_of(message: object) -> object:
    """Return the arguments of the only call, which smolagents leaves as the text that came."""
    (call,) = message.tool_calls
    arguments = call.function.arguments
    return json.loads(arguments) if isinstance(arguments, str) else arguments


report(
    {
        "names": [message.tool_calls[0].function.name for message in (whole, streamed)],
        "calls": [arguments_of(message) for message in (whole, streamed)],
    }
)
