"""openai: `parse`, and the stream that parses, of objects and of a tool's calls."""

from __future__ import annotations

from fruit import MAX_TOKENS, MESSAGES, MODEL, Fruit, base_url, report
from openai import LengthFinishReasonError, OpenAI, pydantic_function_tool

client = OpenAI(base_url=base_url(), api_key="none", max_retries=0)
common = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
asked = {**common, "response_format": Fruit}
calling = {
    **common,
    "tools": [pydantic_function_tool(Fruit, name="record_fruit")],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": MAX_TOKENS,
}

parsed = client.chat.completions.parse(**asked, max_tokens=MAX_TOKENS).choices[0].message.parsed
with client.chat.completions.stream(**asked, max_tokens=MAX_TOKENS) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0].message.parsed
try:
    client.chat.completions.parse(**asked, max_tokens=3)
    cut = None
except LengthFinishReasonError as error:
    cut = type(error).__name__

called = client.chat.completions.parse(**calling)
with client.chat.completions.stream(**calling) as stream:
    call_events = list(stream)
    streamed_call = stream.get_final_completion()
choices = [completion.choices[0] for completion in (called, streamed_call)]
calls = [choice.message.tool_calls[0] for choice in choices]

report(
    {
        "fruits": [parsed.model_dump(), streamed.model_dump()],
        "events": sorted(kinds),
        "cut": cut,
        "calls": [call.function.parsed_arguments.model_dump() for call in calls],
        "names": [call.function.name for call in calls],
        "finish_reasons": [choice.finish_reason for choice in choices],
        "call_events": sorted({event.type for event in call_events}),
        "arguments": "".join(
            event.arguments_delta
            for event in call_events
            if event.type == "tool_calls.function.arguments.delta"
        ),
    }
)
