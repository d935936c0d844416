"""Progress of an extraction: a bar on a terminal, a log line for each part elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)


class Progress:
    """Counts of prompts and rows. Prompts of parts from earlier runs count as done, but not in the rate."""

    def __init__(self, num_prompts: int, num_done: int) -> None:
        self._is_bar = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_prompts, initial=num_done, unit="prompt", file=sys.stderr, disable=not self._is_bar
        )
        self._num_prompts = num_prompts
        self._num_done = num_done
        self._num_rows = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        self._bar.close()

    def prompt_done(self, num_rows: int) -> None:
        self._num_rows += num_rows
        self._bar.set_postfix_str(f"{self._rate:.0f} rows/s", refresh=False)
        self._bar.update()

    def part_done(self, number: int, num_prompts: int, num_rows: int) -> None:
        self._num_done += num_prompts
        if not self._is_bar:
            logger.info(
                "part written",
                extra={
                    "part": number,
                    "rows": num_rows,
                    "rows_per_s": round(self._rate),
                    "prompts_done": self._num_done,
                    "prompts": self._num_prompts,
                },
            )

    @property
    def _rate(self) -> float:
        return self._num_rows / max(1e-9, time.monotonic() - self._started)


def say(message: str) -> None:
    """Print a line, or log it where there is no terminal. No bar may be open."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{message}\n")
    else:
        logger.info(message)
