"""Tools of a chat, over a scripted engine: what becomes the prompt and the grammar, and how calls are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer
from logitengine.link.messages import (
    Array,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    ModelInfo,
    StepOutput,
)
from scripted_engine import App, OpenApp, Step
from tokenizers import AddedToken, Tokenizer

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}
{{ message.content }}
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


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory, model_info: ModelInfo) -> ModelInfo:
    """A model that thinks and calls as Qwen 3 does, with SmolLM2's tokenizer and tokens of its own for both."""
    directory = tmp_path_factory.mktemp("thinking")
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


@pytest.fixture(scope="module")
def tokenizer(thinking_model: ModelInfo) -> Tokenizer:
    return Tokenizer.from_file(str(Path(thinking_model.tokenizer_path) / "tokenizer.json"))


@pytest.fixture
def model_info_of_app(thinking_model: ModelInfo) -> ModelInfo:
    return thinking_model


def saying(tokenizer: Tokenizer, text: str, *, finish: str = "stop", with_rows: bool = False) -> Any:
    """Return a script that says a text, a token a step, with a row of four columns for each token if asked."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids

    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[token_id],
                finish_reason=finish if position == len(ids) - 1 else None,
                logits=row(position) if with_rows else None,
                logprobs=logprob(token_id, position) if with_rows else None,
            )
            for position, token_id in enumerate(ids)
        ]

    return script
