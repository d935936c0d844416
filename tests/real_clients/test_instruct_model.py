"""A real instruct model behind the server: its structured output is sensible, and its raw rows are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
from live_server import serving
from logitclient import Client, decode_logits
from logitengine.model.checkpoint import Checkpoint
from openai import OpenAI
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

MODEL = "qwen-coder"
SENTENCE = "A parcel arrived on Tuesday. It weighs 12 kilograms, and the box is green."


class Parcel(BaseModel):
    """What is said about a parcel."""

    day: Literal["Monday", "Tuesday", "Wednesday"]
    kilograms: int = Field(ge=0, le=1000)
    colour: Literal["red", "green", "blue"]


@pytest.fixture(scope="module")
def qwen_url(tmp_path_factory: pytest.TempPathFactory, qwen_coder: Checkpoint) -> Iterator[str]:
    arguments = ("--model", str(qwen_coder.path), "--served-model-name", MODEL, "--kv-cache-bytes", "256MiB")
    with serving(tmp_path_factory.mktemp("qwen") / "server.log", *arguments) as server:
        yield server.url


def test_an_instruct_model_fills_a_schema_with_what_it_read(qwen_url: str) -> None:
    """The raw rows beside it are those of the same ids without a grammar, to the bit."""
    with OpenAI(base_url=f"{qwen_url}/v1", api_key="none", max_retries=0, timeout=240) as openai:
        answer = openai.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": f"{SENTENCE} Describe the parcel as JSON."}],
            max_tokens=64,
            temperature=0,
            response_format=Parcel,
            extra_body={"return_token_ids": True, "return_logits": True},
        )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.parsed == Parcel(day="Tuesday", kilograms=12, colour="green")

    prompt, token_ids = (
        (answer.model_extra or {})["prompt_token_ids"],
        (choice.model_extra or {})["token_ids"],
    )
    with Client(qwen_url, timeout=240) as client:
        free = client.logits([*prompt, *token_ids], positions="prompt")[0].logits.prompt
    (rows,) = decode_logits(answer)
    assert rows is not None
    assert rows.generated is not None
    assert free is not None
    assert rows.generated.values.tobytes() == free.values[len(prompt) - 1 : -1].tobytes()
