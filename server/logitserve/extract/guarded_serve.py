"""``python -m logitserve.extract.guarded_serve MODEL``: ``logitserve serve`` that ends when its standard input does.

A killed parent cannot stop its child; the pipe between them closes all the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from logitserve.cli import main


def _stop_with_parent() -> None:
    # os.read, since a thread that waits inside sys.stdin holds a lock that the interpreter's end needs.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.exit(main(["serve", *sys.argv[1:]]))
