"""Parts from answers: a bounded number of requests under way, each answer to a file, whole parts in their places."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import RefusedPromptError
from logitserve.extract.files import written_whole
from logitserve.extract.parts import PartsFolder
from logitserve.extract.progress import Progress
from logitserve.extract.prompts import Prompt, PromptFile
from logitserve.extract.source import LogitsSource
from logitserve.extract.tables import count_rows, write_part

OPEN_PARTS = 2
"""So that requests go on while a part is written."""


class Collector:
    """Asks a source for the prompts of the missing parts."""

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
        """Finish these parts. Raises ExceptionGroup with the ExtractError that stopped it."""
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
        """None, or what there is to note about a refused prompt."""
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
        """Before the part itself: a part that exists is complete with its notes."""
        path = self._folder.refused(number)
        path.unlink(missing_ok=True)
        if refusals:
            with written_whole(path) as unfinished:
                unfinished.write_bytes(b"".join(refusals))

    def _write(self, number: int, answers: list[tuple[Prompt, Path]]) -> int:
        with written_whole(self._folder.part(number)) as unfinished:
            num_rows = write_part(answers, unfinished)
        for _, spool in answers:
            spool.unlink()
        return num_rows
