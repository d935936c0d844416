"""Tokenizers and chat templates of tiny models that read images, each in the way of its family's real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INTERNVL_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""Tokens that InternVL2 adds to its language model's vocabulary, in their order."""

TILE_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
QWEN_TOKENS = (
    *CHATML_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
GEMMA_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
SPECIAL_TOKENS = {
    "internvl": (*CHATML_TOKENS, *INTERNVL_TOKENS, "<video>"),
    "internvl_chat": (*CHATML_TOKENS, *INTERNVL_TOKENS),
    "llava": ("<unk>", "<s>", "</s>", "<pad>", "<image>"),
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *TILE_TOKENS),
    "smolvlm": (*CHATML_TOKENS, *TILE_TOKENS),
    "gemma3": GEMMA_TOKENS,
    "qwen2_vl": QWEN_TOKENS,
    "qwen2_5_vl": QWEN_TOKENS,
    "qwen3_vl": QWEN_TOKENS,
}
PLACEHOLDERS = {
    "internvl": "<IMG_CONTEXT>",
    "internvl_chat": "<IMG_CONTEXT>",
    "llava": "<image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<image_soft_token>",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|image_pad|>",
    "qwen3_vl": "<|image_pad|>",
}
"""Token that stands for a row of the encoder's output."""

BOS = {"llava": "<s>", "gemma3": "<bos>", "idefics3": "<|begin_of_text|>"}
"""Begin of a text, which the tokenizers of these families put before every text."""

EOS = {
    "internvl": "<|im_end|>",
    "internvl_chat": "<|im_end|>",
    "llava": "</s>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "qwen2_vl": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
}
EXTRA_TOKENS = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "llava": {"image_token": "<image>"},
}
"""Names that transformers' processors know special tokens by."""

MERGES = (("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"))
"""The first is that of two line breaks, which the tokenizers of real models merge too."""

_CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ IMAGE }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
_QWEN_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}
"""
_QWEN_IMAGE = "'<|vision_start|><|image_pad|><|vision_end|>'"
_LLAVA = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}
{%- if message['role'] != 'assistant' -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- else -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
_TILES = """\
{{- START -}}
{%- for message in messages -%}
{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- elif part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}
{{ '<end_of_utterance>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
_GEMMA = """\
{{- bos_token -}}
{%- set turns = namespace(prefix='', messages=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set content = messages[0]['content'] -%}
{%- set turns.prefix = (content if content is string else content[0]['text']) + '\n\n' -%}
{%- set turns.messages = messages[1:] -%}
{%- endif -%}
{%- for message in turns.messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- turns.prefix if loop.first else '' -}}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
TEMPLATES = {
    "internvl": _CHATML.replace("IMAGE", r"'<IMG_CONTEXT>\n'"),
    "llava": _LLAVA,
    "idefics3": _TILES.replace("START", "'<|begin_of_text|>'"),
    "smolvlm": _TILES.replace("START", "'<|im_start|>'"),
    "gemma3": _GEMMA,
    "qwen2_vl": _QWEN_SYSTEM + _CHATML.replace("IMAGE", _QWEN_IMAGE),
    "qwen2_5_vl": _QWEN_SYSTEM + _CHATML.replace("IMAGE", _QWEN_IMAGE),
    "qwen3_vl": _CHATML.replace("IMAGE", _QWEN_IMAGE),
}
"""Templates by family. InternVL's original format has none."""


def tiny_tokenizer(family: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer of a few hundred tokens with the family's special ones at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special_tokens(tokenizer, family)


def with_special_tokens(tokenizer: Tokenizer, family: str) -> Tokenizer:
    """Add those of the family's special tokens that ``tokenizer`` lacks, and return it."""
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[family]]
    )
    if family in BOS:
        bos = BOS[family]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, token_id(tokenizer, bos))]
        )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that ``tokenizer`` has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def save_tokenizer(tokenizer: Tokenizer, directory: Path, family: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and the family's chat template."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS[family],
        "pad_token": SPECIAL_TOKENS[family][0],
    }
    if family in BOS:
        settings["bos_token"] = BOS[family]
    if family in EXTRA_TOKENS:
        settings["extra_special_tokens"] = EXTRA_TOKENS[family]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if family in TEMPLATES:
        (directory / "chat_template.jinja").write_text(TEMPLATES[family])


def save_slow_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files of InternVL2-1B's tokenizer: vocab.json, merges.txt and added tokens, without tokenizer.json."""
    document = json.loads(tokenizer.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocabulary = {token: at for token, at in document["model"]["vocab"].items() if token not in added}
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (directory / "added_tokens.json").write_text(json.dumps(added))
    fields = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(at): {"content": token, **fields} for token, at in added.items()},
        "additional_special_tokens": list(added),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
