"""Preparation of clients' images in a process of its own, within bounds of time and memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from logitengine.images.messages import Detail, PreparedImage

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError, BadRequestError
from logitserve.images.process import ImageProcess, ImageProcessLostError, ImagesUnavailableError

logger = logging.getLogger(__name__)

MOST_IMAGES = 256
"""Images that wait or are prepared. Later ones are refused."""

MOST_BYTES = 512 << 20
"""Bytes of their files. One image may have more, when it is alone."""


class ImagePreparer:
    """Prepares the images of all requests, one at a time and in the order in which they come.

    A process that takes too long for an image is killed, and another one is started. The images that wait do not notice.
    One that has begun goes on when its client has left.

    Args:
        model_path: directory of the model's files.
        max_pixels: most pixels of an image (--max-image-pixels).
        max_tokens: most tokens of an image, where the model reads any resolution (--max-image-tokens).
        timeout: seconds for one image, once its turn has come (--image-timeout).
        log_flags: options of the process that say how it logs.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_pixels: int,
        max_tokens: int,
        timeout: float,
        log_flags: Sequence[str] = (),
    ) -> None:
        model = str(Path(model_path).expanduser())
        self._arguments = ["--model", model, "--max-image-pixels", str(max_pixels)]
        self._arguments += ["--max-image-tokens", str(max_tokens), *log_flags]
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._num_images = 0
        self._num_bytes = 0
        self._starting: asyncio.Task[ImageProcess] | None = None
        self._is_closed = False
        self._working: set[asyncio.Task[PreparedImage]] = set()

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises ImagesUnavailableError or ImageProcessLostError."""
        await asyncio.shield(self._restart())

    async def close(self) -> None:
        """End the process, and with it what is being prepared."""
        self._is_closed = True
        for task in list(self._working):
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.cancel()  # without effect on one that is done
            (process,) = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(process, ImageProcess):
                await process.kill()

    async def prepare(self, data: bytes, detail: Detail, *, param: str) -> PreparedImage:
        """Return the image's items and layout.

        Raises BadRequestError for a fault of the image, else ApiError. ``param`` names its field.
        """
        is_full = self._num_images >= MOST_IMAGES or self._num_bytes + len(data) > MOST_BYTES
        if self._num_images and is_full:
            raise _unavailable(
                f"{self._num_images} images of other requests are waiting; try again.", "images_overloaded"
            )
        self._num_images += 1
        self._num_bytes += len(data)
        try:
            await self._turn.acquire()
        except BaseException:
            self._leave(data)
            raise
        task = asyncio.create_task(self._work(data, detail, param), name="prepare-image")
        self._working.add(task)
        task.add_done_callback(lambda done: self._end_work(done, data))
        return await asyncio.shield(task)

    def _end_work(self, task: asyncio.Task[PreparedImage], data: bytes) -> None:
        self._working.discard(task)
        self._turn.release()
        self._leave(data)
        if not task.cancelled():
            task.exception()  # its client may have left

    def _leave(self, data: bytes) -> None:
        self._num_images -= 1
        self._num_bytes -= len(data)

    async def _work(self, data: bytes, detail: Detail, param: str) -> PreparedImage:
        """Ask the process for one image."""
        process = await self._ready_process()
        try:
            async with asyncio.timeout(self._timeout):
                answer = await process.prepare(data, detail)
        except TimeoutError:
            await process.kill()
            self._restart()
            raise BadRequestError(
                f"'{param}' took more than {self._timeout:g} s to prepare (--image-timeout).",
                param=param,
                code="image_timeout",
            ) from None
        except ImageProcessLostError as error:
            self._restart()
            raise self._lost(error) from error
        if isinstance(answer, PreparedImage):
            return answer
        raise BadRequestError(f"'{param}' {answer.message}.", param=param, code="invalid_image")

    async def _ready_process(self) -> ImageProcess:
        """Return the process, started if there is none. Raises ApiError."""
        if self._is_closed:
            raise _unavailable("The server is ending.", "not_ready")
        starting = self._starting
        if starting is None or _is_lost(starting):
            starting = self._restart()
        try:
            return await asyncio.shield(starting)
        except (ImageProcessLostError, ImagesUnavailableError) as error:
            raise self._lost(error) from error

    def _restart(self) -> asyncio.Task[ImageProcess]:
        self._starting = asyncio.create_task(ImageProcess.start(self._arguments), name="start-images")
        return self._starting

    def _lost(self, error: Exception) -> ApiError:
        logger.warning("the process that prepares images was lost", extra={"detail": str(error)})
        return _unavailable("The process that prepares images was lost; try again.", "image_process_lost")


def _is_lost(starting: asyncio.Task[ImageProcess]) -> bool:
    """Whether the process has ended, or could not be started."""
    return starting.done() and (starting.exception() is not None or starting.result().is_lost)


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": RETRY_AFTER_SECONDS})
