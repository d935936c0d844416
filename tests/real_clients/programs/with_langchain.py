"""langchain-openai: `with_structured_output` and tools, whole and streamed, and the error for a prompt that is too long."""

from __future__ import annotations

import operator
from functools import reduce

from fruit import MAX_TOKENS, MODEL, QUESTION, TOO_LONG, Fruit, base_url, report
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=MODEL,
    base_url=base_url(),
    api_key="none",
    temperature=0,
    max_tokens=MAX_TOKENS,
    max_retries=0,
    stream_usage=True,
)
loose = model.with_structured_output(Fruit, method="json_schema")
strict = model.with_structured_output(Fruit, method="json_schema", strict=True, include_raw=True)
raw = strict.invoke(QUESTION)
called = model.with_structured_output(Fruit, method="function_calling")
caller = model.bind_tools([Fruit], tool_choice="any", parallel_tool_calls=False)
(call,) = caller.invoke(QUESTION).tool_calls
streamed_call = reduce(operator.add, caller.stream(QUESTION))
streamed = list(loose.stream(QUESTION))
chunks = list(model.bind(max_tokens=4).stream([("system", "Be brief."), ("user", QUESTION)]))
try:
    model.invoke(TOO_LONG)
    refused = None
except ContextOverflowError as error:
    refused = str(error)

report(
    {
        "fruits": [
            loose.invoke(QUESTION).model_dump(),
            raw["parsed"].model_dump(),
            streamed[-1].model_dump(),
            *(fruit.model_dump() for fruit in loose.batch([QUESTION, QUESTION])),
        ],
        "calls": [call["args"], *(made["args"] for made in streamed_call.tool_calls)],
        "names": [call["name"], *(made["name"] for made in streamed_call.tool_calls)],
        "function_calling": [
            called.invoke(QUESTION).model_dump(),
            list(called.stream(QUESTION))[-1].model_dump(),
        ],
        "usage": raw["raw"].usage_metadata["output_tokens"],
        "streamed_usage": sum(
            chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata
        ),
        "too_long": refused,
    }
)
