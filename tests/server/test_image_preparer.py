"""The process that prepares images, as requests meet it: answers, refusals, time, crashes, and those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import faulty_images
import numpy as np
import psutil
import pytest
from logitengine.images.messages import FromImages, ImagesReady, PrepareImage, RefusedImage
from logitengine.link.channel import BlockingChannel
from logitengine.link.messages import Array
from logitserve.errors import ApiError, BadRequestError
from logitserve.images import preparer as preparer_module
from logitserve.images import process as process_module
from logitserve.images.preparer import ImagePreparer
from logitserve.images.process import ImageProcessLostError, ImagesUnavailableError
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

pytestmark = pytest.mark.anyio

PARAM = "messages[0].content[1].image_url.url"

CONFIG = {
    "model_type": "internvl_chat",
    "vision_config": {"patch_size": 14},
    "force_image_size": 56,
    "dynamic_image_size": True,
    "use_thumbnail": True,
}


def png(width: int = 80, height: int = 60, colour: str = "#336699") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("internvl")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return str(directory)


@pytest.fixture
async def images(model: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ImagePreparer]:
    """Yield a preparer whose process obeys faults."""
    monkeypatch.setattr(process_module, "COMMAND", faulty_images.COMMAND)
    preparer = ImagePreparer(model, max_pixels=10_000, max_tokens=2048, timeout=60)
    await preparer.start()
    yield preparer
    await preparer.close()
    assert (preparer._num_images, preparer._num_bytes, len(preparer._working)) == (0, 0, 0)


async def refused(images: ImagePreparer, data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await images.prepare(data, "auto", param=PARAM)
    return caught.value


async def process_of(images: ImagePreparer) -> psutil.Process:
    assert images._starting is not None
    return psutil.Process((await images._starting).pid)


async def at_work(images: ImagePreparer, data: bytes) -> asyncio.Task[object]:
    """Return the task of an image whose turn has come."""
    await process_of(images)
    task: asyncio.Task[object] = asyncio.create_task(images.prepare(data, "auto", param=PARAM))
    while not images._working:  # noqa: ASYNC110 - nobody is told
        await asyncio.sleep(0.001)
    return task


async def test_an_image_comes_back_as_items_and_a_layout(images: ImagePreparer) -> None:
    prepared = await images.prepare(png(), "auto", param=PARAM)
    assert prepared.layout == ["<img>", *range(7), "</img>"]
    for item in prepared.items:
        assert (item.pixels.shape, item.num_tokens) == ((3, 56, 56), 4)
        assert np.frombuffer(item.pixels.data, "<f4").size == 3 * 56 * 56
    assert len({item.digest for item in prepared.items}) == 1
    assert len((await images.prepare(png(), "low", param=PARAM)).items) == 1


async def test_images_that_come_together_get_their_own_answers(images: ImagePreparer) -> None:
    files = [png(56, 56, f"#{level:02x}0000") for level in range(0, 256, 16)]
    prepared = await asyncio.gather(*(images.prepare(data, "auto", param=PARAM) for data in files))
    reds = [np.frombuffer(image.items[0].pixels.data, "<f4")[0] for image in prepared]
    expected = (np.arange(0, 256, 16) / 255 - 0.485) / 0.229
    np.testing.assert_allclose(reds, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an image of a supported format (PNG, JPEG, WebP, GIF, BMP and TIFF are)"),
        (b"text", "is not an image of a supported format (PNG, JPEG, WebP, GIF, BMP and TIFF are)"),
        (png(300, 200), "has more than 10,000 pixels (--max-image-pixels)"),
        (png()[:100], "is damaged or ends early"),
        (b"bloat", "takes more memory to prepare than an image may"),
    ],
    ids=["empty", "text", "large", "truncated", "bloat"],
)
async def test_a_refusal_names_the_field(images: ImagePreparer, data: bytes, message: str) -> None:
    error = await refused(images, data)
    assert isinstance(error, BadRequestError)
    assert (error.code, error.param, error.message) == ("invalid_image", PARAM, f"'{PARAM}' {message}.")
    process = await process_of(images)
    await images.prepare(png(), "auto", param=PARAM)
    assert (await process_of(images)) == process, "it lives on"


async def test_an_image_that_takes_too_long_is_refused_and_those_behind_it_are_served(
    images: ImagePreparer,
) -> None:
    process = await process_of(images)
    images._timeout = 3.0
    slow = await at_work(images, b"hang")
    others = [asyncio.create_task(images.prepare(png(), "low", param=PARAM)) for _ in range(3)]
    with pytest.raises(BadRequestError) as caught:
        await slow
    assert caught.value.code == "image_timeout"
    assert caught.value.message == f"'{PARAM}' took more than 3 s to prepare (--image-timeout)."
    assert [len(prepared.items) for prepared in await asyncio.gather(*others)] == [1, 1, 1]
    assert not process.is_running()


@pytest.mark.parametrize("data", [b"crash", b"defect"])
async def test_a_crash_costs_only_the_image_at_work(
    images: ImagePreparer, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broken = await at_work(images, data)
    others = [asyncio.create_task(images.prepare(png(), "low", param=PARAM)) for _ in range(3)]
    with pytest.raises(ApiError) as caught:
        await broken
    assert (caught.value.status, caught.value.code) == (503, "image_process_lost")
    assert "Retry-After" in caught.value.headers
    assert [len(prepared.items) for prepared in await asyncio.gather(*others)] == [1, 1, 1]
    assert "the process that prepares images was lost" in caplog.text


async def test_a_process_that_is_killed_while_idle_is_missed_by_nobody(images: ImagePreparer) -> None:
    process = await process_of(images)
    process.kill()
    assert images._starting is not None
    await images._starting.result()._watching
    assert len((await images.prepare(png(), "low", param=PARAM)).items) == 1


async def test_an_image_whose_client_has_left_goes_on_and_the_next_gets_its_own_answer(
    images: ImagePreparer,
) -> None:
    process = await process_of(images)
    process.suspend()
    leaver = await at_work(images, png(56, 56, "#ff0000"))
    waiting = asyncio.create_task(images.prepare(png(80, 60), "auto", param=PARAM))
    last = asyncio.create_task(images.prepare(png(56, 56, "#000000"), "auto", param=PARAM))
    await asyncio.sleep(0)
    for task in (leaver, waiting):
        task.cancel()
    await asyncio.gather(leaver, waiting, return_exceptions=True)
    process.resume()
    (item,) = (await last).items
    assert np.frombuffer(item.pixels.data, "<f4")[0] < 0, "black"
    assert (await process_of(images)) == process


async def test_images_that_wait_are_bounded_in_number_and_in_bytes(
    images: ImagePreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = png()
    for name, bound in (("MOST_IMAGES", 3), ("MOST_BYTES", 3 * len(data))):
        with monkeypatch.context() as bounds:
            bounds.setattr(preparer_module, name, bound)
            process = await process_of(images)
            process.suspend()
            served = [asyncio.create_task(images.prepare(data, "low", param=PARAM)) for _ in range(3)]
            await asyncio.sleep(0)
            error = await refused(images, data)
            assert (error.status, error.code) == (503, "images_overloaded")
            assert "Retry-After" in error.headers
            process.resume()
            await asyncio.gather(*served)
            assert len((await images.prepare(data, "low", param=PARAM)).items) == 1


async def test_closing_ends_the_process_and_whatever_waits(images: ImagePreparer) -> None:
    process = await process_of(images)
    slow = await at_work(images, b"hang")
    waiting = asyncio.create_task(images.prepare(png(), "auto", param=PARAM))
    await asyncio.sleep(0)
    await images.close()
    assert not process.is_running()
    results = await asyncio.gather(slow, waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], ApiError)
    assert images._starting is None, "no other was started"


def test_the_server_opens_no_image_itself() -> None:
    code = (
        "import sys, logitserve.images.preparer; sys.exit(bool({'PIL', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@contextlib.contextmanager
def bare_process(model: str) -> Iterator[tuple[subprocess.Popen[bytes], BlockingChannel[FromImages]]]:
    """Yield the process without a preparer, and the server's end of its socket."""
    ours, theirs = socket.socketpair()
    with ours:
        options = ["--fd", str(theirs.fileno()), "--model", model]
        options += ["--max-image-pixels", "10000", "--max-image-tokens", "2048"]
        with theirs:
            process = subprocess.Popen(
                [*faulty_images.COMMAND, *options], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
            )
        with process:
            channel: BlockingChannel[FromImages] = BlockingChannel(ours, FromImages)
            assert channel.receive() == ImagesReady()
            yield process, channel
            channel.flush(60)  # tells the process that nothing follows
            assert process.wait(60) == 0


def test_the_process_ends_with_its_server(model: str) -> None:
    with bare_process(model) as (_, channel):
        channel.send(PrepareImage(1, Array("uint8", (4,), b"hang")))


def test_what_libraries_think_of_a_file_is_not_written_to_the_logs(model: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(buffer, "TIFF", compression="tiff_deflate")
    data = bytearray(buffer.getvalue())
    data[8:28] = bytes(20)
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(data)).load()  # at which libtiff writes a line
    with bare_process(model) as (process, channel):
        channel.send(PrepareImage(1, Array("uint8", (len(data),), data)))
        assert channel.receive() == RefusedImage(1, "is damaged or ends early")
        channel.flush(60)
        assert process.stderr is not None
        assert process.stderr.read() == b""


async def test_signals_to_the_whole_service_do_not_end_the_process(images: ImagePreparer) -> None:
    process = await process_of(images)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    await images.prepare(png(), "auto", param=PARAM)
    assert (await process_of(images)) == process


async def test_a_model_whose_images_are_not_supported_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    images = ImagePreparer(str(tmp_path), max_pixels=10_000, max_tokens=2048, timeout=60)
    message = "images cannot be prepared: images for the model type 'mllama' are not supported"
    with pytest.raises(ImagesUnavailableError, match=message):
        await images.start()
    await images.close()


async def test_a_process_that_does_not_start_is_told_at_the_start_and_tried_again_later(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImagePreparer(model, max_pixels=10_000, max_tokens=2048, timeout=60)
    await images.start()
    with monkeypatch.context() as broken:
        broken.setattr(process_module, "COMMAND", ("/nowhere/python",))
        with pytest.raises(ImageProcessLostError, match="did not start"):
            await ImagePreparer(model, max_pixels=10_000, max_tokens=2048, timeout=60).start()
        (await process_of(images)).kill()
        assert images._starting is not None
        await images._starting.result()._watching
        error = await refused(images, png())
        assert (error.status, error.code) == (503, "image_process_lost")
    assert len((await images.prepare(png(), "low", param=PARAM)).items) == 1
    await images.close()


async def test_transformers_processors_work_within_the_bound_of_memory(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    images = ImagePreparer(str(tmp_path), max_pixels=20_000_000, max_tokens=2048, timeout=60)
    await images.start()
    prepared = await images.prepare(png(4000, 4000), "auto", param=PARAM)
    (item,) = prepared.items
    assert (prepared.layout, item.grid) == ([0], (1, 70, 70))
    assert item.pixels.shape == (4900, 1176)
    await images.close()
