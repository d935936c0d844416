"""Images that are hostile, damaged or odd get an answer or a clear error, and change no other answer."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from image_files import image_part, picture, text_part
from PIL import Image


@pytest.fixture(scope="module")
def url(image_url: str) -> str:
    return image_url


def chat(*parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": list(parts)}],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        **options,
    }


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a small file whose head announces any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def data_url(data: bytes, media_type: str = "image/png") -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{text}"}}


def address(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'

REFUSED: dict[str, dict[str, Any]] = {
    "no image": data_url(b"hello, I am a text"),
    "nothing": data_url(b""),
    "truncated": data_url(picture(1)[:-200]),
    "a strip": data_url(saved(Image.new("RGB", (40_000, 1)), "PNG")),
    "200 megapixels": data_url(huge_png(20_000, 10_000)),
    "a bomb": data_url(huge_png(2**31 - 1, 2**31 - 1)),
    "svg": data_url(SVG, "image/svg+xml"),
    "not base64": address("data:image/png;base64,!!!!"),
    "not encoded": address("data:image/png,abc"),
    "a page": data_url(b"<html></html>", "text/html"),
    "a file": address("file:///etc/passwd"),
    "an address": address("https://images.example/cat.png"),
    "metadata": address("http://169.254.169.254/latest/meta-data"),
}

SERVED = {
    "one pixel": Image.new("RGB", (1, 1), (200, 10, 10)),
    "a palette": Image.new("RGB", (40, 30), (1, 200, 3)).convert("P"),
    "16 bits": Image.fromarray(np.arange(0, 60_000, 50, dtype=np.uint16).reshape(30, 40)),
    "transparent": Image.new("RGBA", (40, 30), (1, 2, 3, 4)),
    "cmyk": Image.new("CMYK", (40, 30), (1, 2, 3, 4)),
}


@pytest.fixture(scope="module", autouse=True)
def neighbour(client: httpx.Client, url: str) -> Iterator[None]:
    """Ask the same again and again while this module's requests come, and compare every answer with the first."""
    body = chat(data_url(picture(5)), text_part("Tell."), max_tokens=12, return_logits=True)
    expected = client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]
    ended, faults = threading.Event(), list[Any]()

    def go_on() -> None:
        with httpx.Client(base_url=url, timeout=60) as own:
            while not ended.is_set():
                answer = own.post("/v1/chat/completions", json=body)
                if answer.status_code != 200 or answer.json()["choices"] != expected:
                    faults.append(answer.text[:500])

    thread = threading.Thread(target=go_on)
    thread.start()
    yield
    ended.set()
    thread.join()
    assert faults == []


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_a_400_that_names_its_place(client: httpx.Client, kind: str) -> None:
    response = client.post("/v1/chat/completions", json=chat(text_part("See:"), REFUSED[kind]))
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert "messages[0].content[1]" in error["param"]
    assert "0x" not in error["message"], "no address of memory"
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("kind", SERVED)
def test_odd_images_are_served(client: httpx.Client, kind: str) -> None:
    file = saved(SERVED[kind], "TIFF" if kind == "cmyk" else "PNG")
    answer = client.post("/v1/chat/completions", json=chat(data_url(file), text_part("What?")))
    assert answer.status_code == 200, answer.text


def test_an_animation_is_its_first_picture_and_a_turned_photograph_is_turned(client: httpx.Client) -> None:
    def tokens(file: bytes) -> Any:
        body = chat(data_url(file), text_part("What?"), return_logits={"top_k": 3})
        return client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]

    first, second = (Image.new("RGB", (50, 20), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    animated = saved(first, "PNG", save_all=True, append_images=[second])
    assert tokens(animated) == tokens(saved(first, "PNG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = first.transpose(Image.Transpose.ROTATE_90)
    assert tokens(saved(turned, "PNG", exif=exif)) == tokens(saved(first, "PNG"))


def test_a_data_url_of_100_megabytes_is_refused(client: httpx.Client) -> None:
    body = chat(data_url(bytes(75_000_000)))
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code in {400, 413}
    assert "bytes" in response.json()["error"]["message"]


def test_more_images_than_a_request_may_have_are_refused(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=chat(*[image_part(picture(1))] * 17))
    assert response.status_code == 400
    assert "--max-images" in response.json()["error"]["message"]


def test_a_prompt_with_its_images_must_fit_the_context(client: httpx.Client) -> None:
    parts = [image_part(picture(seed, 700, 40)) for seed in range(16)]
    response = client.post("/v1/chat/completions", json=chat(*parts, text_part("word " * 300)))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_mark_in_a_past_answer_is_no_image(client: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": [image_part(picture(1)), text_part("What?")]},
        {"role": "assistant", "content": "<IMG_CONTEXT>"},
        {"role": "user", "content": "And?"},
    ]
    response = client.post("/v1/chat/completions", json=chat(messages=messages))
    assert response.status_code == 400
    assert "<IMG_CONTEXT>" in response.json()["error"]["message"]


def test_an_image_for_a_model_that_reads_text_is_refused(tiny_url: str) -> None:
    response = httpx.post(f"{tiny_url}/v1/chat/completions", json=chat(image_part(picture(1))))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")
