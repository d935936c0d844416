"""litellm, by its providers openai/ and hosted_vllm/."""

from __future__ import annotations

import json

import litellm
from fruit import MAX_TOKENS, MESSAGES, MODEL, TOO_LONG, Fruit, base_url, report

litellm.suppress_debug_info = True


def ask(provider: str, **fields: object) -> object:
    """Ask one of the providers."""
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS, "num_retries": 0, **fields}
    return litellm.completion(model=f"{provider}/{MODEL}", api_base=base_url(), api_key="none", **asked)


fruits, refused = [], {}
for provider in ("openai", "hosted_vllm"):
    answer = ask(provider, response_format=Fruit)
    fruits.append(json.loads(answer.choices[0].message.content))
    chunks = list(ask(provider, response_format=Fruit, stream=True, stream_options={"include_usage": True}))
    streamed = litellm.stream_chunk_builder(chunks)
    fruits.append(json.loads(streamed.choices[0].message.content))
    try:
        ask(provider, messages=[{"role": "user", "content": TOO_LONG}])
    except litellm.ContextWindowExceededError as error:
        refused[provider] = str(error)

report({"fruits": fruits, "too_long": refused})
