"""The real process that prepares images, at which some files are faults: b"hang", b"crash", b"bloat", b"defect"."""

from __future__ import annotations

import os
import signal
import sys
import time

from logitengine.images import decoding
from logitengine.images.process import main
from PIL import Image

COMMAND = (sys.executable, __file__)

decode = decoding.decode


def faulty_decode(data: bytes, max_pixels: int) -> Image.Image:
    match bytes(data):
        case b"hang":
            time.sleep(3600)
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"bloat":
            bytearray(4 << 30)
        case b"defect":
            raise ZeroDivisionError
    return decode(data, max_pixels)


if __name__ == "__main__":
    setattr(decoding, "decode", faulty_decode)  # noqa: B010 - mypy forbids the plain assignment
    main()
