"""Checks of clients' grammars in processes of their own, within bounds of time and memory."""

from __future__ import annotations

import asyncio
import logging

from logitengine.link.messages import ModelInfo

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError, BadRequestError
from logitserve.grammars.frames import MOST_BYTES, Verdict, shortened
from logitserve.grammars.lines import Line
from logitserve.grammars.process import CheckerProcess, ProcessLostError
from logitserve.grammars.source import GrammarSource
from logitserve.grammars.verdicts import Digest, KeptVerdicts, digest_of

logger = logging.getLogger(__name__)

QUICK_SHARE = 1 / 50
"""Share of the time for a grammar in which almost all that people write are compiled, and no other is waited for."""


class _Check:
    """The check of one grammar, for all requests that ask for it.

    Attributes:
        num_waiting: requests that wait for its verdict.
        is_running: whether it has a place, and not merely stands in line.
    """

    def __init__(self) -> None:
        self.task: asyncio.Task[Verdict]
        self.num_waiting = 0
        self.is_running = False


class GrammarChecker:
    """Says of a grammar whether it can be honoured, and in which form the engine takes it.

    Each grammar is tried for a short time first. Those that take longer stand in a second line, where one at a time
    has all the time: they hold up nobody but each other. Equal grammars share a check, and its verdict is kept. A check
    that has begun goes on when its clients have left.

    Args:
        seconds: time for one grammar.
        queue_seconds: time for which a grammar waits for others; 0: any.
    """

    def __init__(self, seconds: float, queue_seconds: float) -> None:
        self._seconds = seconds
        self._queue_seconds = queue_seconds
        self._quick, self._thorough = Line(seconds * QUICK_SHARE), Line(seconds)
        self._process: CheckerProcess | None = None
        self._starting = asyncio.Lock()
        self._checks: dict[Digest, _Check] = {}
        self._kept = KeptVerdicts()

    async def check(self, source: GrammarSource, info: ModelInfo) -> str:
        """Return the grammar for the engine. Raises BadRequestError for a fault of the grammar, else ApiError."""
        digest = digest_of(source)
        verdict = self._kept.get(digest)
        if verdict is None:
            verdict = await self._share(digest, source, info)
        if verdict.outcome == "good":
            return verdict.grammar
        raise self._refusal(source.param, verdict)

    async def close(self) -> None:
        """End the process, and the checks."""
        tasks = [check.task for check in self._checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    async def _share(self, digest: Digest, source: GrammarSource, info: ModelInfo) -> Verdict:
        """Return the verdict of the check that runs for this grammar already, or of a new one."""
        check = self._checks.get(digest)
        if check is None:
            check = self._checks[digest] = _Check()
            check.task = asyncio.create_task(self._decide(check, digest, source, info), name="check-grammar")
        check.num_waiting += 1
        try:
            await asyncio.wait({check.task})
        finally:
            check.num_waiting -= 1
            if not (check.num_waiting or check.is_running):
                check.task.cancel()
                self._checks.pop(digest, None)
        return check.task.result()

    async def _decide(self, check: _Check, digest: Digest, source: GrammarSource, info: ModelInfo) -> Verdict:
        """Ask the process, in the quick line and then in the other, and keep the verdict."""
        try:
            verdict = await self._ask(check, self._quick, source, info)
            if verdict.outcome == "timeout":
                if not check.num_waiting:
                    return verdict  # to nobody: it had a fraction of its time
                verdict = await self._ask(check, self._thorough, source, info)
            if verdict.outcome == "died":
                logger.warning(
                    "the check of a grammar died", extra={"param": source.param, "detail": verdict.detail}
                )
            self._kept.add(digest, verdict)
            return verdict
        finally:
            if self._checks.get(digest) is check:
                del self._checks[digest]

    async def _ask(self, check: _Check, line: Line, source: GrammarSource, info: ModelInfo) -> Verdict:
        """Stand in line and ask the process. Raises ApiError when the wait is too long, or the process is lost."""
        try:
            async with asyncio.timeout(self._queue_seconds or None) as limit, line.turn(len(source.text)):
                limit.reschedule(None)
                check.is_running = True
                try:
                    return await (await self._running_process(info)).ask(source, line.seconds)
                finally:
                    check.is_running = False
        except TimeoutError:
            raise ApiError(
                503,
                f"Grammars of other requests were being compiled for {self._queue_seconds:g} s (--queue-timeout); try again.",
                code="queue_timeout",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            ) from None
        except ProcessLostError as error:
            logger.warning("the process that compiles grammars was lost", extra={"detail": str(error)})
            raise ApiError(
                503,
                "The process that compiles grammars was lost; try again.",
                code="grammar_checker_lost",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            ) from error

    async def _running_process(self, info: ModelInfo) -> CheckerProcess:
        """Return the process, started if there is none. Raises ProcessLostError."""
        async with self._starting:
            if self._process is None or self._process.is_lost:
                self._process = await CheckerProcess.start(info)
            return self._process

    def _refusal(self, param: str, verdict: Verdict) -> ApiError:
        """Return the error for a grammar without a form that the engine takes."""
        match verdict.outcome:
            case "timeout":
                return BadRequestError(
                    f"'{param}' took more than {self._seconds:g} s to compile (--grammar-timeout).",
                    param=param,
                    code="grammar_timeout",
                )
            case "memory":
                return BadRequestError(
                    f"'{param}' cannot be honoured: it takes more than {MOST_BYTES >> 20} MiB to compile.",
                    param=param,
                    code="grammar_too_large",
                )
            case "died":
                return ApiError(
                    500,
                    f"'{param}' cannot be honoured: the program that compiles it failed ({shortened(verdict.detail)}).",
                    param=param,
                    code="grammar_check_failed",
                    headers={"x-should-retry": "false"},
                )
            case "unsupported":
                return BadRequestError(
                    f"'{param}' cannot be honoured: {shortened(verdict.detail)}.",
                    param=param,
                    code="unsupported_parameter",
                )
            case _:
                reason = verdict.detail.replace("Unimplemented keys:", "unsupported keywords:")
                reason = shortened(reason.partition(" Enable '")[0])
                return BadRequestError(
                    f"'{param}' cannot be honoured: {reason}.", param=param, code="invalid_grammar"
                )
