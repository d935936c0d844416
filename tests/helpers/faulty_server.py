"""`logitserve` with the engine process of faulty_process.

LOGITSERVE_FAULTS=DIRECTORY python faulty_server.py serve MODEL --port 8000 ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from logitserve import cli, serve_command

COMMAND = (sys.executable, str(Path(__file__).with_name("faulty_process.py")))
"""That of faulty_process, which is not imported because it imports torch."""

if __name__ == "__main__":
    setattr(serve_command, "ENGINE_COMMAND", COMMAND)  # noqa: B010 - mypy takes it for a constant
    sys.exit(cli.main(sys.argv[1:]))
