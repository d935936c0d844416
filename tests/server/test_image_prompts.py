"""Prompts with images: their tokens are those of transformers' processors, and only the images' own stand for pixels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from logitengine.link.messages import GenerationRequest, ModelInfo, StepOutput
from msgspec.structs import replace
from scripted_engine import App, OpenApp, Step
from scripted_images import (
    KINDS,
    NUM_TOKENS,
    Kind,
    ScriptedPreparer,
    image_model_info,
    image_part,
    save_image_model,
    text_part,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


def ends(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[1], finish_reason="stop")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def directory(kind: Kind, tmp_path: Path) -> Path:
    return save_image_model(tmp_path / kind.family, kind)


@pytest.fixture
def info(kind: Kind, directory: Path, model_info: ModelInfo) -> ModelInfo:
    return image_model_info(directory, model_info, kind)


async def tokenized(app: App, messages: list[dict[str, Any]], **members: Any) -> list[int]:
    response = await app.post("/tokenize", {"messages": messages, **members})
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["tokens"]
    assert response.json()["count"] == len(ids)
    return ids


def token_id(directory: Path, token: str) -> int:
    found = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(token)
    assert found is not None
    return found


def for_transformers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def content(value: Any) -> Any:
        if isinstance(value, str):
            return [text_part(value)]
        return [{"type": "image"} if part["type"] == "image_url" else part for part in value]

    return [{**message, "content": content(message["content"])} for message in messages]


def processed(directory: Path, kind: Kind, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids that the family's processor of transformers makes, by its own expansion of texts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    template = (
        kind.template
        or (Path(__file__).parents[2] / "server/logitserve/text/templates/Hermes-2.jinja").read_text()
    )
    text = tokenizer.apply_chat_template(
        for_transformers(messages), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    num_images = sum(
        part["type"] == "image_url"
        for m in messages
        if isinstance(m["content"], list)
        for part in m["content"]
    )
    replacements = [replacement(kind)] * num_images
    mark = "<start_of_image>" if kind.family == "gemma3" else kind.placeholder
    processor = SimpleNamespace(
        image_token=mark, all_special_multimodal_tokens=[mark], video_token=None, audio_token=None
    )
    expanded, _ = ProcessorMixin.get_text_with_replacements(cast("Any", processor), [text], replacements)
    ids: list[int] = tokenizer(expanded[0], add_special_tokens=False)["input_ids"]
    return ids


def replacement(kind: Kind) -> str:
    """Return what the family's processor puts in the place of an image's mark."""
    match kind.family:
        case "internvl" | "internvl_chat":
            fields = SimpleNamespace(
                start_image_token="<img>",
                end_image_token="</img>",
                image_token="<IMG_CONTEXT>",
                image_seq_length=NUM_TOKENS,
            )
            return InternVLProcessor.replace_image_token(cast("Any", fields), {"num_patches": [2]}, 0)
        case "gemma3":
            full = f"\n\n<start_of_image>{'<image_soft_token>' * NUM_TOKENS}<end_of_image>\n\n"
            fields = SimpleNamespace(full_image_sequence=full)
            return Gemma3Processor.replace_image_token(cast("Any", fields), {"num_crops": [0]}, 0)
        case "idefics3":
            fields = SimpleNamespace(
                fake_image_token="<fake_token_around_image>",
                image_token="<image>",
                global_image_tag="<global-img>",
                image_seq_len=NUM_TOKENS,
            )
            return Idefics3Processor.replace_image_token(
                cast("Any", fields), {"rows": [[1]], "cols": [[1]]}, 0
            )
        case _:
            return kind.placeholder * NUM_TOKENS


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "image_first": [{"role": "user", "content": [image_part(b"a"), text_part("What is it?")]}],
    "image_last": [{"role": "user", "content": [text_part("What is it?\n"), image_part(b"a")]}],
    "images_in_a_row": [
        {"role": "user", "content": [image_part(b"a"), image_part(b"b"), text_part("Both?")]}
    ],
    "several_texts": [
        {"role": "user", "content": [text_part("One:"), image_part(b"a"), text_part("two:"), text_part("x")]}
    ],
    "several_turns": [
        {"role": "user", "content": [image_part(b"a"), text_part("What is it?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text_part("And this?"), image_part(b"b")]},
    ],
    "no_image": [{"role": "user", "content": "Hello!"}],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
async def test_the_tokens_are_those_of_transformers(
    open_app: OpenApp, kind: Kind, directory: Path, info: ModelInfo, messages: list[dict[str, Any]]
) -> None:
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        assert await tokenized(app, messages) == processed(directory, kind, messages)


async def test_the_engine_gets_items_in_the_places_of_their_tokens(
    open_app: OpenApp, kind: Kind, directory: Path, info: ModelInfo
) -> None:
    messages = CONVERSATIONS["several_turns"]
    async with open_app(ends, info=info, preparer=ScriptedPreparer(kind)) as app:
        response = await app.post(CHAT, {"messages": messages, "max_tokens": 1})
        (request,) = app.engine.requests
    assert response.status_code == 200, response.text
    placeholder = token_id(directory, kind.placeholder)
    places = [i for i, token in enumerate(request.prompt_token_ids) if token == placeholder]
    assert [place for item in request.items for place in range(item.start, item.stop)] == places
    numbers = range(kind.num_items)
    assert [item.digest for item in request.items] == [
        data + bytes([i]) for data in (b"a", b"b") for i in numbers
    ]
    assert response.json()["usage"]["prompt_tokens"] == len(request.prompt_token_ids)


@pytest.mark.parametrize("path", [CHAT, "/v1/logits", "/v1/rewards", "/pooling"])
async def test_every_endpoint_with_messages_takes_images(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo, path: str
) -> None:
    kind = KINDS["internvl"]
    info = image_model_info(save_image_model(tmp_path, kind), model_info, kind)
    preparer = ScriptedPreparer(kind)
    body = {"messages": CONVERSATIONS["image_first"]}
    async with open_app(ends, info=replace(info, heads={"score": 1}), preparer=preparer) as app:
        await app.post(path, body)
        (request,) = app.engine.requests
    assert [item.digest for item in request.items] == [b"a\0", b"a\1"]


@pytest.mark.parametrize("role", ["user", "system"])
async def test_a_mark_that_a_text_spells_is_text(
    open_app: OpenApp, kind: Kind, directory: Path, info: ModelInfo, role: str
) -> None:
    spelt = " ".join(("<pad>", *kind.tokens))

    def conversation(text: str) -> list[dict[str, Any]]:
        of_user, of_system = ("x", text) if role == "system" else (text, "x")
        return [
            {"role": "system", "content": of_system},
            {"role": "user", "content": [image_part(b"a"), text_part(of_user)]},
        ]

    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        ids = await tokenized(app, conversation(spelt))
        expected = await tokenized(app, conversation("plain"))
    special = range(len(kind.tokens) + 1)
    assert [token for token in ids if token in special] == [token for token in expected if token in special]
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert spelt in text


async def test_a_placeholder_in_an_assistants_turn_is_refused(
    open_app: OpenApp, kind: Kind, info: ModelInfo
) -> None:
    messages = [
        {"role": "user", "content": [image_part(b"a"), text_part("x")]},
        {"role": "assistant", "content": f"It is {kind.placeholder}."},
        {"role": "user", "content": "y"},
    ]
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        response = await app.post("/tokenize", {"messages": messages})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert error["code"] == "image_token_in_text"
    assert kind.placeholder in error["message"]


async def test_a_spelt_mark_is_refused_where_texts_may_hold_control_tokens(
    open_app: OpenApp, kind: Kind, info: ModelInfo
) -> None:
    messages = [{"role": "user", "content": [image_part(b"a"), text_part(f"a {kind.placeholder}")]}]
    async with open_app(info=info, preparer=ScriptedPreparer(kind), control_tokens_in_messages=True) as app:
        response = await app.post("/tokenize", {"messages": messages})
        assert response.status_code == 400
        assert "--control-tokens-in-messages" in response.json()["error"]["message"]
        assert await tokenized(app, CONVERSATIONS["image_first"])


async def test_control_tokens_in_messages_leave_the_tokens_of_images_as_they_are(
    open_app: OpenApp, kind: Kind, directory: Path, info: ModelInfo
) -> None:
    messages = CONVERSATIONS["several_turns"]
    async with open_app(info=info, preparer=ScriptedPreparer(kind), control_tokens_in_messages=True) as app:
        assert await tokenized(app, messages) == processed(directory, kind, messages)


async def test_tools_in_a_system_message_stand_beside_images(
    open_app: OpenApp, kind: Kind, info: ModelInfo
) -> None:
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    body = {
        "messages": [{"role": "system", "content": "Be kind."}, *CONVERSATIONS["image_first"]],
        "tools": [tool],
        "tool_choice": "required",
    }
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        response = await app.post("/tokenize", body)
        assert response.status_code == 200, response.text
        decoded = await app.post("/detokenize", {"tokens": response.json()["tokens"]})
    assert '"look"' in decoded.json()["prompt"]
    assert "Be kind." in decoded.json()["prompt"]


SYSTEMS = {
    "Hermes-2": "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型\uff0c英文名叫InternVL, 是一个有用无害的人工智能助手。",
    "internvl2_5": "你是书生·万象\uff0c英文名是InternVL\uff0c是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
}


@pytest.mark.parametrize(("name", "end"), [("Hermes-2", "<|im_end|>"), ("internvl2_5", "<|im_end|>\n")])
async def test_a_checkpoint_without_a_template_has_the_format_that_it_names(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo, name: str, end: str
) -> None:
    kind = dataclasses.replace(KINDS["internvl_chat"], config={"template": name})
    info = image_model_info(save_image_model(tmp_path, kind), model_info, kind)
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        ids = await tokenized(app, CONVERSATIONS["several_turns"])
        prompt = (await app.post("/detokenize", {"tokens": ids})).json()["prompt"]
    image = "<img>" + "<IMG_CONTEXT>" * (2 * NUM_TOKENS) + "</img>\n"
    turns = [
        f"system\n{SYSTEMS[name]}",
        f"user\n{image}What is it?",
        "assistant\nA cat.",
        f"user\nAnd this?{image}",
    ]
    start = "<|im_start|>"
    assert prompt == "".join(f"{start}{turn}{end}" for turn in turns) + f"{start}assistant\n"


async def test_an_older_checkpoints_template_is_that_of_its_processor(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo
) -> None:
    kind = KINDS["qwen2_vl"]
    text_only = dataclasses.replace(kind, template="{% for m in messages %}{{ m.content + '' }}{% endfor %}")
    directory = save_image_model(tmp_path, text_only)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": kind.template}))
    messages = CONVERSATIONS["image_first"]
    info = image_model_info(directory, model_info, kind)
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        assert await tokenized(app, messages) == processed(directory, kind, messages)


async def test_a_system_message_takes_the_place_of_the_formats_own(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo
) -> None:
    kind = KINDS["internvl_chat"]
    info = image_model_info(save_image_model(tmp_path, kind), model_info, kind)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        ids = await tokenized(app, messages)
        prompt = (await app.post("/detokenize", {"tokens": ids})).json()["prompt"]
    turns = "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|>"
    assert prompt == turns + "<|im_start|>assistant\n"


async def test_a_template_for_texts_alone_has_no_place_for_an_image(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo
) -> None:
    kind = dataclasses.replace(
        KINDS["internvl"],
        template="{% for m in messages %}{{ '<IMG_CONTEXT>' }}{{ m.content + '' }}{% endfor %}",
    )
    info = image_model_info(save_image_model(tmp_path, kind), model_info, kind)
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        response = await app.post("/tokenize", {"messages": CONVERSATIONS["image_first"]})
    assert response.status_code == 400
    assert "has no place for one" in response.json()["error"]["message"]


async def test_a_prompt_with_its_images_tokens_must_fit_the_context(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo
) -> None:
    kind = KINDS["qwen2_vl"]
    info = image_model_info(save_image_model(tmp_path, kind), model_info, kind)
    messages = CONVERSATIONS["image_first"]
    async with open_app(info=info, preparer=ScriptedPreparer(kind)) as app:
        count = len(await tokenized(app, messages))
    async with open_app(
        ends, info=replace(info, max_model_len=count), preparer=ScriptedPreparer(kind)
    ) as app:
        response = await app.post(CHAT, {"messages": messages})
        assert response.json()["error"]["code"] == "context_length_exceeded"
    async with open_app(
        ends, info=replace(info, max_model_len=count + 1), preparer=ScriptedPreparer(kind)
    ) as app:
        assert (await app.post(CHAT, {"messages": messages})).status_code == 200
