"""The process that checks grammars, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys

import msgspec
from logitengine.link.messages import ModelInfo

from logitserve.grammars.frames import LENGTH_BYTES, Question, Verdict, framed
from logitserve.grammars.source import GrammarSource

COMMAND = (sys.executable, "-m", "logitserve.grammars.checker_process")

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
"""No threads beside the one that forks."""

START_SECONDS = 60.0
"""Time for the process to read the model's tokenizer; it takes about a second."""

GRACE_SECONDS = 30.0
"""Time beyond a question's own after which the process is taken for stuck."""


class ProcessLostError(Exception):
    """The process ended, or did not answer."""


class CheckerProcess:
    """A process that runs. Its questions are answered side by side; the caller bounds how many there are."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Verdict]] = {}
        self._refusal: Verdict | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, info: ModelInfo) -> CheckerProcess:
        """Start it for the model's tokenizer. Raises ProcessLostError."""
        arguments = [info.tokenizer_path, str(info.vocab_size), *map(str, info.eos_token_ids)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=pipe,
            stdout=pipe,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        started = cls(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                first = await started._read()
        except BaseException as error:
            await started.kill()
            if isinstance(error, TimeoutError | EOFError):
                raise ProcessLostError("it did not start") from error
            raise
        if first.outcome == "good":
            started._reading = asyncio.create_task(started._read_all(), name="read-verdicts")
        else:
            started._refusal = first
        return started

    @property
    def is_lost(self) -> bool:
        """Whether it ended though it had a tokenizer to work with."""
        return self._reading is not None and self._reading.done()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, source: GrammarSource, seconds: float) -> Verdict:
        """Return its verdict. Raises ProcessLostError."""
        if self._refusal is not None:
            return self._refusal
        if self.is_lost:
            raise ProcessLostError("it had ended")
        number = next(self._numbers)
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        try:
            async with asyncio.timeout(seconds + GRACE_SECONDS):
                stdin.write(framed(Question(number, source.kind, source.text, seconds)))
                with contextlib.suppress(ConnectionError):
                    await stdin.drain()
                return await answer
        except TimeoutError as error:
            await self.kill()
            raise ProcessLostError("it did not answer") from error
        finally:
            self._asked.pop(number, None)

    async def kill(self) -> None:
        """End it and what it works at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _read_all(self) -> None:
        try:
            while True:
                verdict = await self._read()
                answer = self._asked.get(verdict.number)
                if answer is not None and not answer.done():
                    answer.set_result(verdict)
        except EOFError:
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(ProcessLostError("it ended"))

    async def _read(self) -> Verdict:
        """Return the next verdict. Raises EOFError when the process ends."""
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 - it is a pipe
        length = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "little")
        return msgspec.msgpack.decode(await stdout.readexactly(length), type=Verdict)
