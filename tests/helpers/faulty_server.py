"""`logitserve` with the engine process of faulty_process.

LOGITSERVE_FAULTS=DIRECTORY python faulty_server.py serve MODEL --port 8000 ...
"""

from __future__ import annotations

import sys

import faulty_process
from logitserve import cli, serve_command

if __name__ == "__main__":
    setattr(serve_command, "ENGINE_COMMAND", faulty_process.COMMAND)  # noqa: B010 - mypy takes it for a constant
    sys.exit(cli.main(sys.argv[1:]))
