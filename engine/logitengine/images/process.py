"""The process that prepares images: one thread works at them, and one receives."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from logitengine.address_space import limit_address_space
from logitengine.images.messages import (
    FromImages,
    ImagesFailed,
    ImagesReady,
    PreparedImage,
    PrepareImage,
    RefusedImage,
    ToImages,
)
from logitengine.link.channel import BlockingChannel, TransportError
from logitengine.logs import configure_logging

if TYPE_CHECKING:
    from logitengine.images.processors import ImageProcessor

logger = logging.getLogger("logitengine.images.process")  # __name__ is __main__

NICENESS = 5
"""Tokens of other requests come before the images of new ones."""

MOST_BYTES = 2 << 30
"""Memory that one image may take, beside its pixels and what the process has at its start."""

BYTES_PER_PIXEL = 16
"""Pillow holds four bytes a pixel, and a conversion or a rotation makes another such image."""

STDERR = 2

EXIT_SECONDS = 5.0
"""Longest wait of an ending process until everything is sent."""


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description="The process that prepares images; started by the server.")
    parser.add_argument("--fd", type=int, required=True, help="connected socket of the server")
    parser.add_argument("--model", required=True, help="directory of the model's files")
    parser.add_argument("--max-image-pixels", type=int, required=True, help="most pixels of an image")
    parser.add_argument("--max-image-tokens", type=int, required=True, help="most tokens of an image")
    parser.add_argument("--log-level", default="info", help="least severe line logged")
    parser.add_argument("--log-format", default="auto", help="text, json or auto")
    arguments = parser.parse_args()
    quieten_libraries()
    configure_logging(arguments.log_level, arguments.log_format)
    # They may come to all of a service's processes. The server decides when to end, and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    channel: BlockingChannel[ToImages] = BlockingChannel(socket.socket(fileno=arguments.fd), ToImages)
    loop = ImageLoop(channel, arguments.max_image_pixels, arguments.max_image_tokens)
    status = loop.run(Path(arguments.model))
    logging.shutdown()
    os._exit(status)


def quieten_libraries() -> None:
    """Keep standard error for Python: libtiff writes to it what it thinks of a client's file."""
    sys.stderr = os.fdopen(os.dup(STDERR), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    os.close(nowhere)


class ImageLoop:
    """Moves messages between the channel and the model's image processor. The process ends with the server."""

    def __init__(self, channel: BlockingChannel[ToImages], max_pixels: int, max_tokens: int) -> None:
        self._channel = channel
        self._max_pixels = max_pixels
        self._max_tokens = max_tokens
        self._inbox: queue.SimpleQueue[PrepareImage] = queue.SimpleQueue()

    def run(self, directory: Path) -> int:
        """Load, then answer until the server closes the socket, which ends the process. Return the status of a failure."""
        threading.Thread(target=self._receive, name="receive", daemon=True).start()
        # Imported late: the thread already knows when the server is gone, and a family may import torch.
        from logitengine.images.model_files import ImageModelError
        from logitengine.images.processors import load_processor

        try:
            processor = load_processor(directory, self._max_tokens)
        except Exception as error:
            if isinstance(error, ImageModelError):
                reason = str(error)
            else:
                logger.exception("the model's image processor cannot be loaded")
                reason = f"{type(error).__name__}: {error}"
            self._send(ImagesFailed(reason))
            self._channel.flush(EXIT_SECONDS)
            return 1
        limit_address_space(MOST_BYTES + BYTES_PER_PIXEL * self._max_pixels)
        self._send(ImagesReady())
        try:
            while True:
                self._send(self._answer(processor, self._inbox.get()))
        except Exception:
            logger.exception("the process that prepares images cannot go on")
            return 1

    def _answer(self, processor: ImageProcessor, message: PrepareImage) -> PreparedImage | RefusedImage:
        from logitengine.images.decoding import RefusedImageError, decode

        try:
            image = decode(message.data.data, self._max_pixels)
            return PreparedImage(message.number, *processor.prepare(image, message.detail))
        except RefusedImageError as error:
            if error.__cause__ is not None:
                logger.warning("an image processor failed", extra={"detail": repr(error.__cause__)})
            return RefusedImage(message.number, str(error))
        except MemoryError:
            return RefusedImage(message.number, "takes more memory to prepare than an image may")

    def _receive(self) -> None:
        message: PrepareImage | None
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except (OSError, TransportError):
            logger.exception("nothing more can be received from the server")
        os._exit(0)

    def _send(self, message: FromImages) -> None:
        try:
            self._channel.send(message)
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    main()
