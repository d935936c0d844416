"""``python -m logitserve.extract.guarded_serve MODEL``: a server that ends when its standard input does.

A killed parent cannot stop its child, but the pipe between them closes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from logitserve.cli import main


def _stop_with_parent() -> None:
    # sys.stdin would hold a lock while it waits, and the interpreter needs that lock to end.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.exit(main(["serve", *sys.argv[1:]]))
