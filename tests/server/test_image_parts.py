"""Images in messages: what is taken, what is refused, and the bytes that all requests may hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from logitengine.link.messages import GenerationRequest, ModelInfo, StepOutput
from logitserve.errors import BadRequestError
from scripted_engine import App, OpenApp, Step
from scripted_images import (
    KINDS,
    ScriptedPreparer,
    data_url,
    image_model_info,
    image_part,
    save_image_model,
    text_part,
)

pytestmark = pytest.mark.anyio

KIND = KINDS["internvl"]
CHAT = "/v1/chat/completions"
MIB = 1 << 20


def ends(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[1], finish_reason="stop")]


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory, model_info: ModelInfo) -> ModelInfo:
    return image_model_info(save_image_model(tmp_path_factory.mktemp("internvl"), KIND), model_info, KIND)


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


async def error_of(app: App, body: dict[str, Any], path: str = CHAT, status: int = 400) -> dict[str, Any]:
    response = await app.post(path, body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(
    "part",
    [
        image_part(b"a"),
        image_part(b"a", detail=None),
        image_part(b"a", detail="auto"),
        {"type": "image_url", "image_url": data_url(b"a")},
        {**image_part(b"a"), "cache_control": {"type": "ephemeral"}},
        {**image_part(b"a"), "text": None, "input_audio": None},
    ],
)
async def test_an_image_is_taken_in_every_form_that_clients_send(
    open_app: OpenApp, info: ModelInfo, part: dict[str, Any]
) -> None:
    preparer = ScriptedPreparer(KIND)
    async with open_app(ends, info=info, preparer=preparer) as app:
        response = await app.post(CHAT, user(part, text_part("x")))
    assert response.status_code == 200, response.text
    assert preparer.images == [(b"a", "auto")]


@pytest.mark.parametrize("detail", ["low", "high", "original"])
async def test_the_detail_reaches_the_preparation(open_app: OpenApp, info: ModelInfo, detail: str) -> None:
    preparer = ScriptedPreparer(KIND)
    async with open_app(ends, info=info, preparer=preparer) as app:
        await app.post(CHAT, user(image_part(b"a", detail=detail)))
    assert preparer.images == [(b"a", detail)]


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url"}, ".image_url"),
        ({"type": "image_url", "image_url": None}, ".image_url"),
        ({"type": "image_url", "image_url": 1}, ".image_url"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, ".image_url.url"),
        ({"type": "image_url", "image_url": ""}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": 1}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "huge"}}, ".image_url.detail"),
        ({"type": "image_url", "image_url": {"url": "x", "size": 1}}, ".image_url.size"),
        ({"type": "image_url", "image_url": {"url": "x"}, "text": "y"}, ".text"),
        ({"type": "text", "text": "x", "image_url": {"url": "y"}}, ".image_url"),
        ({"type": "input_image", "image_url": "x"}, ""),
        ({"type": "input_audio", "input_audio": {}}, ""),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, ".image_url"),
    ],
)
async def test_a_part_of_another_form_is_refused_by_its_path(
    open_app: OpenApp, info: ModelInfo, part: dict[str, Any], path: str
) -> None:
    preparer = ScriptedPreparer(KIND)
    async with open_app(info=info, preparer=preparer) as app:
        error = await error_of(app, user(text_part("x"), part))
    assert error["param"] == f"messages[0].content[1]{path}"
    assert not preparer.images


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
async def test_only_a_user_may_send_an_image(open_app: OpenApp, info: ModelInfo, role: str) -> None:
    turn = {"role": role, "content": [text_part("x"), image_part(b"a")]}
    async with open_app(info=info, preparer=ScriptedPreparer(KIND)) as app:
        error = await error_of(app, {"messages": [{"role": "user", "content": "x"}, turn]})
    assert error["param"] == "messages[1].content[1]"
    assert "only a user" in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/logits", "/tokenize"])
async def test_a_model_without_an_encoder_reads_text_only(open_app: OpenApp, path: str) -> None:
    async with open_app(served_model_name=["small"]) as app:
        error = await error_of(app, user(image_part(b"a"), text_part("x")), path)
    assert (error["param"], error["code"]) == ("messages", "images_not_supported")
    assert "(small) reads text only" in error["message"]


async def test_models_tell_whether_they_read_images(open_app: OpenApp, info: ModelInfo) -> None:
    async with open_app() as app:
        assert (await app.client.get("/v1/models")).json()["data"][0]["images"] is False
    async with open_app(info=info, preparer=ScriptedPreparer(KIND)) as app:
        assert (await app.client.get("/v1/models")).json()["data"][0]["images"] is True


async def test_the_images_of_all_messages_are_counted(open_app: OpenApp, info: ModelInfo) -> None:
    turns = [
        {"role": "user", "content": [image_part(b"a"), image_part(b"b")]},
        {"role": "user", "content": [image_part(b"c")]},
    ]
    async with open_app(info=info, preparer=ScriptedPreparer(KIND), max_images=2) as app:
        error = await error_of(app, {"messages": turns}, "/tokenize")
        assert error["message"] == "'messages' is 3 images; this server allows at most 2 (--max-images)."
        assert (await app.post("/tokenize", {"messages": turns[:1]})).status_code == 200


async def test_a_file_over_its_bound_is_refused(open_app: OpenApp, info: ModelInfo) -> None:
    async with open_app(info=info, preparer=ScriptedPreparer(KIND), max_image_bytes=10) as app:
        error = await error_of(app, user(image_part(bytes(11))), "/tokenize")
    assert error["param"] == "messages[0].content[0].image_url"
    assert "10 bytes (--max-image-bytes)" in error["message"]


async def test_a_data_url_beyond_the_body_is_too_large(open_app: OpenApp, info: ModelInfo) -> None:
    async with open_app(info=info, preparer=ScriptedPreparer(KIND)) as app:
        error = await error_of(app, user(image_part(bytes(9 * MIB))), status=413)
    assert "--max-body-bytes" in error["message"]


async def test_a_prompt_with_images_is_not_cut(open_app: OpenApp, info: ModelInfo) -> None:
    body = {**user(image_part(b"a"), text_part("x")), "truncate_prompt_tokens": 4}
    async with open_app(info=info, preparer=ScriptedPreparer(KIND)) as app:
        assert (await error_of(app, body, "/v1/logits"))["param"] == "truncate_prompt_tokens"


async def test_the_fault_of_an_image_is_the_answer(open_app: OpenApp, info: ModelInfo) -> None:
    async def refuse(param: str) -> None:
        raise BadRequestError(f"'{param}' is no image.", param=param, code="invalid_image")

    preparer = ScriptedPreparer(KIND)
    preparer.script = refuse
    async with open_app(info=info, preparer=preparer) as app:
        error = await error_of(app, user(text_part("x"), image_part(b"a")))
        assert error["param"] == "messages[0].content[1].image_url"
        assert app.state.image_memory.nbytes == 0


async def test_the_preparation_begins_and_ends_with_the_server(open_app: OpenApp, info: ModelInfo) -> None:
    preparer = ScriptedPreparer(KIND)
    async with open_app(info=info, preparer=preparer):
        assert preparer.is_open
    assert not preparer.is_open


async def test_a_model_whose_tokenizer_has_no_token_for_images_is_not_served(
    open_app: OpenApp, tmp_path: Path, model_info: ModelInfo
) -> None:
    (save_image_model(tmp_path, KIND) / "config.json").write_text('{"model_type": "internvl"}')
    preparer = ScriptedPreparer(KIND)
    async with open_app(info=image_model_info(tmp_path, model_info, KIND), preparer=preparer) as app:
        response = await app.client.get("/ready")
    assert response.status_code == 503
    assert "no token of the tokenizer stands for images" in response.text
    assert not preparer.is_open


class Held:
    """Requests of half a MiB of pixels each that the engine holds until it is told to end them."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.preparer = ScriptedPreparer(KIND, nbytes=MIB // 4)

    def script(self, request: GenerationRequest) -> list[Step]:
        return [self.end.wait(), *ends(request)]


async def test_pixels_are_held_until_the_request_ends(open_app: OpenApp, info: ModelInfo) -> None:
    held = Held()
    async with open_app(held.script, info=info, preparer=held.preparer) as app:
        request = asyncio.create_task(app.post(CHAT, user(image_part(b"a"), image_part(b"b"))))
        await app.engine.running(1)
        assert app.state.image_memory.nbytes == MIB
        held.end.set()
        assert (await request).status_code == 200
        assert app.state.image_memory.nbytes == 0


async def test_a_client_that_leaves_gives_its_pixels_back(open_app: OpenApp, info: ModelInfo) -> None:
    held = Held()
    async with open_app(held.script, info=info, preparer=held.preparer) as app:
        request = asyncio.create_task(app.post(CHAT, user(image_part(b"a"))))
        await app.engine.running(1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert app.state.image_memory.nbytes == 0


async def test_others_wait_for_room_for_their_images(open_app: OpenApp, info: ModelInfo) -> None:
    held = Held()
    async with open_app(held.script, info=info, preparer=held.preparer, image_memory=MIB + 1000) as app:
        request = asyncio.create_task(app.post(CHAT, user(image_part(b"a"), image_part(b"b"))))
        await app.engine.running(1)
        refused = await app.post(CHAT, user(image_part(b"c")))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_image_bytes"
        assert "--image-memory" in refused.json()["error"]["message"]
        assert refused.headers["Retry-After"]
        assert app.state.image_memory.nbytes == MIB
        text = asyncio.create_task(app.post(CHAT, user(text_part("no image"))))
        await app.engine.running(2)
        held.end.set()
        assert [(await one).status_code for one in (request, text)] == [200, 200]
        assert (await app.post(CHAT, user(image_part(b"c")))).status_code == 200


async def test_a_request_that_never_fits_is_not_told_to_try_again(open_app: OpenApp, info: ModelInfo) -> None:
    preparer = ScriptedPreparer(KIND, nbytes=MIB // 4)
    async with open_app(ends, info=info, preparer=preparer, image_memory=MIB) as app:
        error = await error_of(app, user(*(image_part(bytes([i])) for i in range(3))))
        assert (error["param"], error["code"]) == ("messages", "images_too_large")
        assert app.state.image_memory.nbytes == 0


@pytest.mark.parametrize("path", ["/tokenize", "/v1/logits", CHAT])
async def test_a_refused_or_counted_request_holds_nothing(
    open_app: OpenApp, info: ModelInfo, path: str
) -> None:
    body = (
        {**user(image_part(b"a"))} if path == "/tokenize" else {**user(image_part(b"a")), "max_tokens": 5000}
    )
    async with open_app(info=info, preparer=ScriptedPreparer(KIND)) as app:
        response = await app.post(path, body)
        assert response.status_code == (200 if path == "/tokenize" else 400)
        assert app.state.image_memory.nbytes == 0
