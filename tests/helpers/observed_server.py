"""`logitserve` with a second door: at SIGUSR1 it writes its engine's statistics to a file.

python observed_server.py STATS_FILE serve MODEL --port 8000 ...
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from logitengine.config import EngineConfig
from logitengine.link.client import EngineClient
from logitserve import cli, serve_command


def main(stats_file: Path, arguments: list[str]) -> int:
    class ObservedClient(EngineClient):
        def __init__(self, config: EngineConfig, *, command: Sequence[str]) -> None:
            super().__init__(config, command=command)
            signal.signal(signal.SIGUSR1, lambda *_: self._write())

        def _write(self) -> None:
            fresh = stats_file.with_suffix(".new")
            fresh.write_bytes(msgspec.json.encode(msgspec.structs.asdict(self.stats)))
            fresh.replace(stats_file)  # a reader never sees half of it

    setattr(serve_command, "EngineClient", ObservedClient)  # noqa: B010 - mypy takes no class for another
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
