"""The collector of an extraction: a bounded number of requests under way, and parts made of their answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from logitserve.extract.atomic_files import write_atomically
from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import RefusedPromptError
from logitserve.extract.parquet import count_rows, write_part
from logitserve.extract.parts import PartsFolder
from logitserve.extract.progress import Progress
from logitserve.extract.prompts import Prompt, PromptFile
from logitserve.extract.source import LogitsSource

OPEN_PARTS = 2
"""Two, so that requests go on while a part is written."""


class Collector:
    """A writer of missing parts, which asks a source for the rows of their prompts."""

    def __init__(
        self,
        source: LogitsSource,
        prompts: PromptFile,
        folder: PartsFolder,
        config: ExtractConfig,
        progress: Progress,
    ) -> None:
        self._source = source
        self._prompts = prompts
        self._folder = folder
        self._skip_refused = config.skip_refused
        self._progress = progress
        self._requests = asyncio.Semaphore(config.concurrency)
        self._open_parts = asyncio.Semaphore(OPEN_PARTS)

    async def collect(self, missing: list[int]) -> None:
        """Write these parts. Raises ExceptionGroup with the ExtractError that ended the work."""
        async with asyncio.TaskGroup() as group:
            for number in missing:
                await self._open_parts.acquire()
                group.create_task(self._part(number))

    async def _part(self, number: int) -> None:
        prompts = self._prompts.read(self._folder.indices(number))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._fetch(prompt)) for prompt in prompts]
        refusals = [task.result() for task in tasks]
        self._note(number, [refusal for refusal in refusals if refusal is not None])
        answers = [
            (prompt, self._folder.spool(prompt.index))
            for prompt, refusal in zip(prompts, refusals, strict=True)
            if refusal is None
        ]
        num_rows = await asyncio.to_thread(self._write, number, answers)
        self._progress.part_done(number, len(prompts), num_rows)
        self._open_parts.release()

    async def _fetch(self, prompt: Prompt) -> bytes | None:
        """Spool the answer. Return the note about a refused prompt, or None."""
        spool = self._folder.spool(prompt.index)
        async with self._requests:
            try:
                await self._source.fetch(prompt, spool)
            except RefusedPromptError as error:
                if not self._skip_refused:
                    raise
                self._progress.prompt_done(0)
                return orjson.dumps(
                    {"line": prompt.index + 1, "id": prompt.id, "message": error.reason},
                    option=orjson.OPT_APPEND_NEWLINE,
                )
        self._progress.prompt_done(count_rows(spool))
        return None

    def _note(self, number: int, refusals: list[bytes]) -> None:
        """Write the notes of a part. They come before the part, so that a part that exists has its notes."""
        path = self._folder.refused(number)
        path.unlink(missing_ok=True)
        if refusals:
            with write_atomically(path) as unfinished:
                unfinished.write_bytes(b"".join(refusals))

    def _write(self, number: int, answers: list[tuple[Prompt, Path]]) -> int:
        with write_atomically(self._folder.part(number)) as unfinished:
            num_rows = write_part(answers, unfinished)
        for _, spool in answers:
            spool.unlink()
        return num_rows
