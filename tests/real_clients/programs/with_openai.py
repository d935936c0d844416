"""openai: `parse`, and the stream that parses."""

from __future__ import annotations

from fruit import MAX_TOKENS, MESSAGES, MODEL, Fruit, base_url, report
from openai import LengthFinishReasonError, OpenAI

client = OpenAI(base_url=base_url(), api_key="none", max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "response_format": Fruit}

parsed = client.chat.completions.parse(**asked, max_tokens=MAX_TOKENS).choices[0].message.parsed
with client.chat.completions.stream(**asked, max_tokens=MAX_TOKENS) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0].message.parsed
try:
    client.chat.completions.parse(**asked, max_tokens=3)
    cut = None
except LengthFinishReasonError as error:
    cut = type(error).__name__

report(
    {
        "fruits": [parsed.model_dump(), streamed.model_dump()],
        "events": sorted(kinds),
        "cut": cut,
    }
)
