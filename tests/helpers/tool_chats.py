"""Chats with tools over a scripted engine: a model that thinks and calls, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from logitengine.link.messages import Array, GenerationRequest, LogitsRows, Logprobs, ModelInfo, StepOutput
from scripted_engine import App, Script, Step
from tokenizers import AddedToken, Tokenizer

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}
{{- '\n' + message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "find", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **members}}


def save_thinking_model(directory: Path, model_info: ModelInfo) -> ModelInfo:
    """Return a model that thinks and calls as Qwen 3 does, with SmolLM2's tokenizer and tokens of its own for both."""
    source = Path(model_info.tokenizer_path)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return msgspec.structs.replace(
        model_info,
        tokenizer_path=str(directory),
        vocab_size=tokenizer.get_vocab_size(),
        max_model_len=4096,
    )


def saying(tokenizer: Tokenizer, text: str, *, with_rows: bool = False) -> Script:
    """Return a script that says a text, a token a step, with a row of four columns for each token if asked."""
    ids = ids_of(tokenizer, text)

    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[token_id],
                finish_reason="stop" if position == len(ids) - 1 else None,
                logits=row(position) if with_rows else None,
                logprobs=logprob(token_id, position) if with_rows else None,
            )
            for position, token_id in enumerate(ids)
        ]

    return script


def row(position: int) -> LogitsRows:
    values = np.arange(4, dtype="<f4") + position
    columns = np.arange(4, dtype="<i4")
    return LogitsRows(
        values=Array("float32", (1, 4), values.tobytes()), token_ids=Array("int32", (1, 4), columns.tobytes())
    )


def logprob(token_id: int, position: int) -> Logprobs:
    return Logprobs(
        token_logprobs=[-position / 8], ranks=[0], top_ids=[[token_id]], top_logprobs=[[-position / 8]]
    )


async def ask(app: App, **body: Any) -> dict[str, Any]:
    answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 500, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def stream(app: App, **body: Any) -> list[Any]:
    answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 500, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def at_once(ids: list[int]) -> Script:
    """Return a script that says all tokens in one step."""
    return lambda request: [
        StepOutput(request_id=request.request_id, index=0, token_ids=ids, finish_reason="stop")
    ]


async def grammar_of(app: App, **body: Any) -> str | None:
    await ask(app, **body)
    return app.engine.requests.pop().grammar


FIND = '<tool_call>\n{"name": "find", "arguments": {"city": "Bern"}}\n</tool_call>'
