"""haystack's OpenAIChatGenerator, whole and streamed."""

from __future__ import annotations

import json

from fruit import MAX_TOKENS, MODEL, QUESTION, Fruit, base_url, report
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret


def generator(response_format: object, **more: object) -> OpenAIChatGenerator:
    """Return a generator that answers with a fruit."""
    return OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        api_base_url=base_url(),
        model=MODEL,
        max_retries=0,
        generation_kwargs={"temperature": 0, "max_tokens": MAX_TOKENS, "response_format": response_format},
        **more,
    )


texts: list[str] = []
# haystack parses whole answers only; a stream takes the schema.
schema = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": Fruit.model_json_schema()}}
streaming = generator(schema, streaming_callback=lambda chunk: texts.append(chunk.content))
replies = []
for chosen in (generator(Fruit), streaming):
    (reply,) = chosen.run([ChatMessage.from_user(QUESTION)])["replies"]
    replies.append(reply)

report(
    {
        "fruits": [*(json.loads(reply.text) for reply in replies), json.loads("".join(texts))],
        "finish_reasons": [reply.meta["finish_reason"] for reply in replies],
    }
)
