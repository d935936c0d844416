"""pydantic-ai: outputs by a JSON schema and by a tool, texts, and a conversation that goes on."""

from __future__ import annotations

import asyncio

from fruit import MAX_TOKENS, MODEL, QUESTION, Fruit, base_url, report
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=base_url(), api_key="none"))
settings = {"temperature": 0, "max_tokens": MAX_TOKENS}


async def main() -> None:
    """Run an agent whole, streamed, and again with its history."""
    agent = Agent(
        model, output_type=NativeOutput(Fruit), instructions="Be brief.", model_settings=settings, retries=0
    )
    whole = await agent.run(QUESTION)
    async with agent.run_stream(QUESTION) as stream:
        streamed = await stream.get_output()
    again = await agent.run("And a cherry?", message_history=whole.all_messages())
    caller = Agent(model, output_type=ToolOutput(Fruit), model_settings=settings, retries=0)
    called = await caller.run(QUESTION)
    async with caller.run_stream(QUESTION) as stream:
        streamed_call = await stream.get_output()
    talker = Agent(model, model_settings={"temperature": 0, "max_tokens": 4})
    report(
        {
            "fruits": [whole.output.model_dump(), streamed.model_dump(), again.output.model_dump()],
            "calls": [called.output.model_dump(), streamed_call.model_dump()],
            "text": (await talker.run(QUESTION)).output,
        }
    )


asyncio.run(main())
