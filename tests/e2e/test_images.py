"""Images over HTTP: rows are transformers' for the same pixels, and do not depend on company; hostile images harm nobody."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from image_files import IMAGE_MODEL_NAME, image_part, picture, text_part
from image_models import ImageModel, reference_logits
from logitengine.images.decoding import decode
from logitengine.images.processors import load_processor
from logitengine.link.messages import PromptItem
from numpy.typing import NDArray

DOCS = Path(__file__).parents[2] / "docs" / "images.md"
MOST_PIXELS = 1 << 26

TOLERANCE = 2e-4
"""Largest difference from transformers' float32 logits, which reach 20; sums are in another order."""


@pytest.fixture(scope="module")
def url(image_url: str) -> str:
    return image_url


@pytest.fixture(scope="module")
def model(image_model: ImageModel) -> ImageModel:
    return image_model


def question(*parts: bytes | str, **options: Any) -> dict[str, Any]:
    """Return the body of a chat request with images and texts in one message, for all rows."""
    content = [image_part(part) if isinstance(part, bytes) else text_part(part) for part in parts]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_logits": {"positions": "all"},
        **options,
    }


def rows_of(block: dict[str, Any]) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(block["data"]), block["dtype"]).reshape(block["shape"])


def items_of(model: ImageModel, token_ids: list[int], files: list[bytes]) -> list[PromptItem]:
    """Return the items of a served prompt, whose placeholders are found in its ids."""
    processor = load_processor(model.directory, 2048)
    items: list[PromptItem] = []
    at = 0
    for file in files:
        prepared, _ = processor.prepare(decode(file, MOST_PIXELS), "auto")
        for item in prepared:
            at = token_ids.index(model.image_token_id, at)
            end = at + item.num_tokens
            assert set(token_ids[at:end]) == {model.image_token_id}
            items.append(PromptItem(start=at, stop=end, digest=item.digest, pixels=item.pixels))
            at = end
    assert model.image_token_id not in token_ids[at:]
    return items


def check(model: ImageModel, answer: dict[str, Any], files: list[bytes]) -> None:
    """Compare every row of an answer with those of transformers for the same tokens and pixels."""
    (choice,) = answer["choices"]
    prompt_ids, generated = answer["prompt_token_ids"], choice["token_ids"]
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids)
    expected = reference_logits(
        model.directory, prompt_ids + generated, items_of(model, prompt_ids, files)
    ).numpy()
    end = len(prompt_ids)
    assert np.abs(rows_of(choice["logits"]["prompt"]) - expected[:end]).max() < TOLERANCE
    assert np.abs(rows_of(choice["logits"]["generated"]) - expected[end - 1 : -1]).max() < TOLERANCE


@pytest.mark.parametrize(
    "parts",
    [
        ("What is there?",),
        (picture(1), "What is it?"),
        ("Before", picture(1, 31, 97), "between", picture(2, 20, 20), "and after."),
        (picture(3, 700, 20), "A long one."),
    ],
    ids=["text", "one image", "two images", "many tiles"],
)
def test_rows_are_those_of_transformers(
    client: httpx.Client, model: ImageModel, parts: tuple[bytes | str, ...]
) -> None:
    response = client.post("/v1/chat/completions", json=question(*parts))
    assert response.status_code == 200, response.text
    check(model, response.json(), [part for part in parts if isinstance(part, bytes)])


def test_a_conversation_of_several_turns_keeps_its_images(client: httpx.Client, model: ImageModel) -> None:
    first, second = picture(1), picture(2)
    messages = [
        {"role": "user", "content": [image_part(first), text_part("What is it?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text_part("And this?"), image_part(second)]},
    ]
    response = client.post("/v1/chat/completions", json=question("", messages=messages))
    assert response.status_code == 200, response.text
    check(model, response.json(), [first, second])


@pytest.mark.anyio
async def test_32_requests_at_once_get_the_rows_that_they_get_alone(url: str) -> None:
    bodies = [
        question(
            *([picture(number % 5, 40 + 30 * (number % 3))] if number % 2 else []),
            f"Question {number}",
            max_tokens=6,
        )
        for number in range(32)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=240) as client:

        async def rows(body: dict[str, Any]) -> list[str]:
            answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
            logits = answer["choices"][0]["logits"]
            return [logits["prompt"]["data"], logits["generated"]["data"]]

        together = await asyncio.gather(*map(rows, bodies))
        for body, expected in zip(bodies, together, strict=True):
            assert await rows({**body, "cache_salt": "alone"}) == expected


def test_the_prefix_cache_tells_images_apart(client: httpx.Client) -> None:
    def cached(file: bytes) -> int:
        body = question(file, "The same text for all of them, long enough for some blocks. " * 3)
        body["return_logits"] = {"top_k": 1}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return tokens

    first, other = picture(11), picture(12)
    before = cached(first)
    assert cached(first) > before + 64
    assert cached(other) <= before


def test_tokenize_and_logits_and_streams_count_image_tokens(client: httpx.Client) -> None:
    body = question(picture(1), "How many?", max_tokens=2)
    whole = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    messages = {"messages": body["messages"]}
    counted = client.post("/tokenize", json=messages).raise_for_status().json()
    assert counted["tokens"] == whole["prompt_token_ids"]
    logits = client.post(
        "/v1/logits", json={**messages, "top_k": 1}, headers={"Accept": "application/json"}
    ).raise_for_status()
    assert logits.json()["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).raise_for_status()
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    prompt = np.concatenate(
        [
            rows_of(choice["logits"]["prompt"])
            for chunk in chunks
            for choice in chunk["choices"]
            if "prompt" in (choice.get("logits") or {})
        ]
    )
    assert np.array_equal(prompt, rows_of(whole["choices"][0]["logits"]["prompt"]))


def test_the_openai_sdk_streams_an_answer_about_an_image(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    content: Any = [image_part(picture(1)), text_part("What is it?")]
    stream = client.chat.completions.create(
        model=IMAGE_MODEL_NAME,
        messages=[{"role": "user", "content": content}],
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    last = list(stream)[-1]
    assert last.usage is not None
    assert last.usage.completion_tokens <= 3
    assert last.usage.prompt_tokens > 9


def test_the_example_of_the_docs_runs(url: str, tmp_path: Path) -> None:
    """The page's program, with another address, prints a text for each image and that its rows' likeliest tokens are it."""
    (program,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "http://localhost:8000/v1" in program
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(picture(seed))
    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://localhost:8000", url), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\(\d+, \d+\) (True|False)", done.stdout) == ["True", "True"]


def test_user_text_that_spells_marks_is_text(client: httpx.Client, model: ImageModel) -> None:
    plain = question("Look: <IMG_CONTEXT> <img></img> <image>")
    answer = client.post("/v1/chat/completions", json=plain).raise_for_status().json()
    assert model.image_token_id not in answer["prompt_token_ids"]
    file = picture(1)
    with_image = question(file, "Look: <IMG_CONTEXT>")
    check(model, client.post("/v1/chat/completions", json=with_image).raise_for_status().json(), [file])
