"""Checks of clients' grammars in a process of their own, within bounds of time and memory."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict

import msgspec
from logitengine.link.messages import ModelInfo

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError, BadRequestError
from logitserve.grammars.frames import LENGTH_BYTES, Question, Verdict
from logitserve.grammars.source import GrammarKind, GrammarSource

COMMAND = (sys.executable, "-m", "logitserve.grammars.checker_process")

START_SECONDS = 60.0
"""Time for the process to read the model's tokenizer; it takes about a second."""

MOST_KEPT = 64
"""Verdicts that are kept for later requests."""

LONGEST_REASON = 300


class _CheckerProcess:
    """The process that runs, with a question at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, info: ModelInfo) -> _CheckerProcess:
        arguments = [info.tokenizer_path, str(info.vocab_size), *map(str, info.eos_token_ids)]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdin=pipe, stdout=pipe))

    @property
    def is_dead(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, question: Question) -> Verdict:
        """Return the process's verdict. Raises EOFError when it dies."""
        content = msgspec.msgpack.encode(question)
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        try:
            stdin.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
            await stdin.drain()
        except ConnectionError as error:
            raise EOFError from error
        return await self.read()

    async def read(self) -> Verdict:
        """Return the next verdict. Raises EOFError when the process dies."""
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 - it is a pipe
        length = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "little")
        return msgspec.msgpack.decode(await stdout.readexactly(length), type=Verdict)

    async def kill(self) -> None:
        if not self.is_dead:
            self._process.kill()
        await self._process.wait()


class GrammarChecker:
    """Says of a grammar whether it can be honoured, and in which form the engine takes it.

    The process starts with the first grammar and is replaced when it takes too long or too much memory. It has one
    grammar at a time; verdicts are kept by content.

    Args:
        seconds: time for one grammar.
        queue_seconds: time for the process to come free; 0: any.
    """

    def __init__(self, seconds: float, queue_seconds: float) -> None:
        self._seconds = seconds
        self._queue_seconds = queue_seconds
        self._process: _CheckerProcess | None = None
        self._free = asyncio.Lock()
        self._kept: OrderedDict[tuple[GrammarKind, str], Verdict] = OrderedDict()

    async def check(self, source: GrammarSource, info: ModelInfo) -> str:
        """Return the grammar for the engine. Raises BadRequestError, and ApiError 503 when the process came not free."""
        key = (source.kind, source.text)
        verdict = self._kept.get(key)
        if verdict is None:
            await self._wait_free()
            try:
                verdict = self._kept.get(key) or await self._ask(source, info)
            finally:
                self._free.release()
            self._kept[key] = verdict
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        if verdict.error is not None:
            raise _refused(source.param, verdict.error)
        return verdict.grammar

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    async def _wait_free(self) -> None:
        try:
            async with asyncio.timeout(self._queue_seconds or None):
                await self._free.acquire()
        except TimeoutError:
            raise ApiError(
                503,
                f"Grammars of other requests were being compiled for {self._queue_seconds:g} s (--queue-timeout); try again.",
                code="queue_timeout",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            ) from None

    async def _ask(self, source: GrammarSource, info: ModelInfo) -> Verdict:
        """Ask the process. It is killed whenever it does not answer, as when the client leaves."""
        is_answered = False
        try:
            if self._process is None or self._process.is_dead:
                await self._start(info)
            assert self._process is not None  # noqa: S101 - it has just been started
            async with asyncio.timeout(self._seconds):
                verdict = await self._process.ask(Question(source.kind, source.text))
            is_answered = True
        except TimeoutError:
            raise BadRequestError(
                f"'{source.param}' took more than {self._seconds:g} s to compile (--grammar-timeout).",
                param=source.param,
                code="grammar_timeout",
            ) from None
        except EOFError:
            raise _refused(source.param, "it takes too much memory to compile") from None
        finally:
            if not is_answered:
                await self.close()
        return verdict

    async def _start(self, info: ModelInfo) -> None:
        self._process = await _CheckerProcess.start(info)
        try:
            async with asyncio.timeout(START_SECONDS):
                verdict = await self._process.read()
        except (TimeoutError, EOFError) as error:
            raise RuntimeError("the process that compiles grammars did not start") from error
        if verdict.error is not None:
            raise BadRequestError(verdict.error[0].upper() + verdict.error[1:], code="unsupported_parameter")


def _refused(param: str, reason: str) -> BadRequestError:
    reason = reason.replace("Unimplemented keys:", "unsupported keywords:").partition(" Enable '")[0]
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + "..."
    return BadRequestError(f"'{param}' cannot be honoured: {reason}.", param=param, code="invalid_grammar")
