"""openai-agents in chat mode: an agent that must call a tool, whole and streamed."""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from fruit import MAX_TOKENS, MODEL, QUESTION, Fruit, base_url, report
from openai import AsyncOpenAI

set_tracing_disabled(True)
recorded: list[Fruit] = []


@function_tool
def record_fruit(fruit: Fruit) -> str:
    """Record a fruit."""
    recorded.append(fruit)
    return f"recorded {fruit.name}"


agent = Agent(
    name="grocer",
    model=OpenAIChatCompletionsModel(
        model=MODEL, openai_client=AsyncOpenAI(base_url=base_url(), api_key="none", max_retries=0)
    ),
    model_settings=ModelSettings(
        temperature=0, max_tokens=MAX_TOKENS, tool_choice="required", parallel_tool_calls=False
    ),
    tools=[record_fruit],
    tool_use_behavior="stop_on_first_tool",
)


async def main() -> None:
    """Run the agent whole and streamed."""
    whole = await Runner.run(agent, QUESTION)
    streamed = Runner.run_streamed(agent, QUESTION)
    events = [event.type async for event in streamed.stream_events()]
    report(
        {
            "calls": [fruit.model_dump() for fruit in recorded],
            "outputs": [whole.final_output, streamed.final_output],
            "events": sorted(set(events)),
        }
    )


asyncio.run(main())
