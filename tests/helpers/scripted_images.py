"""Models that read images, without their weights, and a preparation of images that follows a test's script."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from logitengine.images.messages import Detail, PreparedImage, PreparedItem
from logitengine.link.messages import Array, EncoderInfo, ModelInfo
from msgspec.structs import replace
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PIXELS_PER_ITEM = 12
PIXEL_BYTES = 4 * PIXELS_PER_ITEM
NUM_TOKENS = 3

INTERNVL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<IMG_CONTEXT>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}{% for part in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A family of models that read images.

    Attributes:
        tokens: its special tokens beside <pad>.
        placeholder: the one that stands for pixels.
        layout: of an image of two items, or of one where the family has no tiles.
        config: members of config.json; ids are given as the tokens' texts.
    """

    family: str
    template: str | None
    tokens: tuple[str, ...]
    placeholder: str
    layout: tuple[str | int, ...]
    config: dict[str, Any]

    @property
    def num_items(self) -> int:
        return sum(isinstance(part, int) for part in self.layout)


_TILE = "<fake_token_around_image>"
_INTERNVL_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
_IDEFICS_TOKENS = (
    "<|im_start|>",
    "<end_of_utterance>",
    _TILE,
    "<image>",
    "<global-img>",
    "<row_1_col_1>",
)
KINDS = {
    kind.family: kind
    for kind in (
        Kind(
            "internvl",
            INTERNVL,
            _INTERNVL_TOKENS,
            "<IMG_CONTEXT>",
            ("<img>", 0, 1, "</img>"),
            {"image_token_id": "<IMG_CONTEXT>"},
        ),
        Kind(
            "internvl_chat",
            None,
            _INTERNVL_TOKENS,
            "<IMG_CONTEXT>",
            ("<img>", 0, 1, "</img>"),
            {"template": "Hermes-2"},
        ),
        Kind("llava", LLAVA, ("<s>", "</s>", "<image>"), "<image>", (0,), {"image_token_index": "<image>"}),
        Kind(
            "idefics3",
            IDEFICS,
            _IDEFICS_TOKENS,
            "<image>",
            (f"{_TILE}<row_1_col_1>", 0, f"\n\n{_TILE}<global-img>", 1, _TILE),
            {"image_token_id": "<image>"},
        ),
        Kind(
            "gemma3",
            GEMMA,
            (
                "<bos>",
                "<start_of_turn>",
                "<end_of_turn>",
                "<start_of_image>",
                "<end_of_image>",
                "<image_soft_token>",
            ),
            "<image_soft_token>",
            ("\n\n<start_of_image>", 0, "<end_of_image>\n\n"),
            {"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>"},
        ),
        Kind(
            "qwen2_vl",
            QWEN,
            ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
            "<|image_pad|>",
            (0,),
            {"image_token_id": "<|image_pad|>"},
        ),
    )
}


def save_image_model(directory: Path, kind: Kind) -> Path:
    """Save the tokenizer, which knows single bytes, the chat template and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    special = ("<pad>", *kind.tokens)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Gemma's vocabulary has tokens of several line breaks, which a layout's may join.
    words = ["ĊĊ", "ĊĊĊ"] if kind.family == "gemma3" else []
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")] if words else []
    vocabulary = {token: token_id for token_id, token in enumerate([*special, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    if "<bos>" in special:
        settings["bos_token"] = "<bos>"
    if kind.template is not None:
        settings["chat_template"] = kind.template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {name: vocabulary.get(value, value) for name, value in kind.config.items()}
    (directory / "config.json").write_text(json.dumps({"model_type": kind.family, **config}))
    return directory


def image_model_info(directory: Path, info: ModelInfo, kind: Kind) -> ModelInfo:
    """Return ``info`` as that of a model that reads images."""
    return replace(
        info,
        model_path=str(directory),
        tokenizer_path=str(directory),
        max_model_len=1024,
        encoder=EncoderInfo(family=kind.family, pixels_shape=(3, 2, 2), num_tokens=NUM_TOKENS),
    )


class ScriptedPreparer:
    """Gives every image the layout of a family, with items of small pixels that tell images apart.

    Attributes:
        images: bytes and detail of those that were prepared, in order.
        script: is awaited before an image is prepared, and may raise.
        nbytes: of an item's pixels, where they are to be many.
    """

    def __init__(self, kind: Kind, *, nbytes: int = PIXEL_BYTES) -> None:
        self._kind = kind
        self._nbytes = nbytes
        self.images: list[tuple[bytes, Detail]] = []
        self.script: Callable[[str], Awaitable[None]] | None = None
        self.is_open = False

    async def start(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def prepare(self, data: bytes, detail: Detail, *, param: str) -> PreparedImage:
        self.images.append((data, detail))
        if self.script is not None:
            await self.script(param)
        items = [self._item(data, number) for number in range(self._kind.num_items)]
        return PreparedImage(0, items, list(self._kind.layout))

    def _item(self, data: bytes, number: int) -> PreparedItem:
        pixels = np.full(self._nbytes // 4, number, np.float32)
        return PreparedItem(
            pixels=Array("float32", pixels.shape, pixels.tobytes()),
            digest=data + bytes([number]),
            num_tokens=NUM_TOKENS,
            grid=(1, 2, 6) if self._kind.family == "qwen2_vl" else None,
        )


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, **members: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), **members}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
