"""instructor: the modes JSON, JSON_SCHEMA, MD_JSON and TOOLS."""

from __future__ import annotations

import instructor
from fruit import MAX_TOKENS, MODEL, Fruit, base_url, report
from openai import OpenAI

# JSON and MD_JSON describe the schema in words alone, which is too much for a small model: it copies an example.
COPY = 'Copy this: {"name": "banana", "colour": "yellow", "grams": 120, "tags": ["sweet"]}'

fruits = {}
for mode in (
    instructor.Mode.JSON,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.MD_JSON,
    instructor.Mode.TOOLS,
):
    client = instructor.from_openai(OpenAI(base_url=base_url(), api_key="none", max_retries=0), mode=mode)
    fruit = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": COPY}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        max_retries=0,
        response_model=Fruit,
    )
    fruits[mode.name] = fruit.model_dump()

report({"fruits": list(fruits.values()), "modes": list(fruits)})
