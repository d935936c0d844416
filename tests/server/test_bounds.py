"""Bounds that the model sets: nothing over its vocabulary reaches the engine, whatever the flags allow."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from logitserve.config import LARGEST_ID
from scripted_engine import App, OpenApp

pytestmark = pytest.mark.anyio

VOCABULARY = 49152
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
PROMPT = {"prompt": "Hi", "max_tokens": 1}
FLAGS = {"max_logprobs": LARGEST_ID, "max_prompt_logprobs": LARGEST_ID}


def with_vocabulary(app: App, size: int) -> None:
    """Give the model a vocabulary of ``size`` tokens, smaller than the tokenizer's."""
    app.engine.info = msgspec.structs.replace(app.state.model().info, vocab_size=size)


async def refused(app: App, path: str, body: dict[str, Any], param: str, says: str) -> None:
    answer = await app.post(path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert says in error["message"]
    assert app.engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**MESSAGES, "logprobs": True, "top_logprobs": VOCABULARY + 1}, "top_logprobs"),
        (CHAT, {**MESSAGES, "prompt_logprobs": VOCABULARY + 1}, "prompt_logprobs"),
        (COMPLETIONS, {**PROMPT, "prompt_logprobs": LARGEST_ID}, "prompt_logprobs"),
        (COMPLETIONS, {**PROMPT, "return_logits": {"top_k": VOCABULARY + 1}}, "return_logits.top_k"),
        (CHAT, {**MESSAGES, "return_logits": {"top_k": LARGEST_ID}}, "return_logits.top_k"),
        ("/v1/logits", {"input": "Hi", "top_k": VOCABULARY + 1}, "top_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_top_count_over_the_vocabulary_is_refused(
    open_app: OpenApp, path: str, body: dict[str, Any], param: str
) -> None:
    async with open_app(**FLAGS) as app:
        await refused(app, path, body, param, str(VOCABULARY))


async def test_completions_of_a_tiny_vocabulary_are_bound_by_it(open_app: OpenApp) -> None:
    async with open_app(**FLAGS) as app:
        with_vocabulary(app, 4)
        await refused(app, COMPLETIONS, {**PROMPT, "prompt": [1], "logprobs": 5}, "logprobs", "4 tokens")


async def test_text_with_tokens_that_the_model_lacks_is_refused(open_app: OpenApp) -> None:
    """A tokenizer may know more tokens than the model beside it."""
    async with open_app() as app:
        with_vocabulary(app, 3)
        for path, body, param in (
            (COMPLETIONS, PROMPT, "prompt"),
            (CHAT, MESSAGES, "messages"),
            ("/v1/perplexity", {"input": "Hi"}, "input"),
            ("/v1/logits", {"input": ["Hi"]}, "input"),
        ):
            await refused(app, path, body, param, "outside the vocabulary of 3")


async def test_the_whole_vocabulary_may_be_asked_for(open_app: OpenApp) -> None:
    async with open_app(**FLAGS) as app:
        await app.post(CHAT, {**MESSAGES, "logprobs": True, "top_logprobs": VOCABULARY})
        assert [request.logprobs for request in app.engine.requests] == [VOCABULARY]
