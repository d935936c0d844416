"""The process that prepares images, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Sequence

from logitengine.images.messages import (
    Detail,
    FromImages,
    ImagesFailed,
    ImagesReady,
    PreparedImage,
    PrepareImage,
    RefusedImage,
)
from logitengine.link.channel import AsyncChannel, TransportError
from logitengine.link.messages import Array

COMMAND = (sys.executable, "-m", "logitengine.images.process")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""One thread works."""

START_SECONDS = 120.0
"""Time until the process is ready; libraries from a cold disk may take most of it."""


class ImageProcessLostError(OSError):
    """The process ended, or did not start."""


class ImagesUnavailableError(ValueError):
    """No process can prepare this model's images; the message says why."""


class ImageProcess:
    """A process that runs, and works at one image at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._answer: asyncio.Future[FromImages] = asyncio.get_running_loop().create_future()
        self._expected = 0  # the number of the image at work; 0 before the process is ready
        self._channel: AsyncChannel[FromImages]
        self._watching: asyncio.Task[None]

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> ImageProcess:
        """Start it and wait until it is ready. Raises ImageProcessLostError or ImagesUnavailableError."""
        started = await cls._spawn(arguments)
        try:
            await started.wait_ready()
        except BaseException:
            await started.kill()
            raise
        return started

    @classmethod
    async def _spawn(cls, arguments: Sequence[str]) -> ImageProcess:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *COMMAND,
                    "--fd",
                    str(theirs.fileno()),
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT},
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                )
            spawned = cls(process)
            spawned._channel = await AsyncChannel.over(ours, FromImages, spawned._on_message)
        except BaseException as error:
            ours.close()  # at which a process ends
            if isinstance(error, OSError):
                raise ImageProcessLostError(
                    f"the process that prepares images did not start: {error}"
                ) from error
            raise
        spawned._watching = asyncio.create_task(spawned._watch(), name="watch-images")
        return spawned

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""
        return self._watching.done()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def prepare(self, data: bytes, detail: Detail) -> PreparedImage | RefusedImage:
        """Return its answer. Called for one image at a time. Raises ImageProcessLostError."""
        if self.is_lost:
            raise ImageProcessLostError("the process that prepares images had ended")
        self._expected = next(self._numbers)
        self._answer = asyncio.get_running_loop().create_future()
        self._channel.send(PrepareImage(self._expected, Array("uint8", (len(data),), data), detail))
        answer = await self._answer
        assert isinstance(answer, PreparedImage | RefusedImage)  # noqa: S101 - it has this image's number
        return answer

    async def kill(self) -> None:
        """End it, whatever it works at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._channel.close()
        await self._process.wait()
        await self._watching

    async def wait_ready(self) -> None:
        """Wait for its first message. Raises ImageProcessLostError or ImagesUnavailableError."""
        try:
            async with asyncio.timeout(START_SECONDS):
                first = await self._answer
        except TimeoutError as error:
            raise ImageProcessLostError("the process that prepares images did not start") from error
        if isinstance(first, ImagesFailed):
            raise ImagesUnavailableError(f"images cannot be prepared: {first.message}")

    def _on_message(self, message: FromImages) -> None:
        number = 0 if isinstance(message, ImagesReady | ImagesFailed) else message.number
        if number == self._expected and not self._answer.done():
            self._answer.set_result(message)

    async def _watch(self) -> None:
        """Wait until the process has ended or has said what is no message."""
        reason = "the process that prepares images ended"
        try:
            await self._channel.wait_closed()
        except TransportError as error:
            reason = f"the process that prepares images sent what is no message: {error}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if not self._answer.done():
            self._answer.set_exception(ImageProcessLostError(reason))
            self._answer.exception()  # nobody may be waiting
