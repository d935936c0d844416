"""The process that checks grammars: what is shared, what waits for whom, and how checks end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from formed_chats import CHAT, body, json_schema, one_token, refused_with
from logitserve.grammars import verdicts
from logitserve.grammars.frames import Verdict
from logitserve.grammars.lines import Line
from logitserve.grammars.source import GrammarSource
from logitserve.grammars.verdicts import KeptVerdicts, digest_of
from scripted_engine import App, OpenApp

pytestmark = pytest.mark.anyio


async def test_an_equal_grammar_is_checked_once(open_app: OpenApp) -> None:
    good = {"response_format": json_schema({"type": "integer"})}
    bad = {"response_format": json_schema({"not": {}})}
    async with open_app(one_token) as app:
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
        await app.state.grammars.close()
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
            assert app.state.grammars._process is None
        first, second = app.engine.requests
        assert first.grammar == second.grammar


def test_kept_verdicts_are_bounded_in_bytes_and_those_of_a_busy_machine_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, large = KeptVerdicts(), "x" * 1_000_000
    digests = [digest_of(GrammarSource("regex", str(number), "regex")) for number in range(20)]
    for digest in digests:
        kept.add(digest, Verdict(1, "good", large))
        kept.add(digest, Verdict(1, "good", large))
        assert kept.get(digests[0]) is not None, "what is used stays"
        assert kept.nbytes <= verdicts.MOST_BYTES
    assert [kept.get(digest) is None for digest in digests] == [False, *[True] * 16, False, False, False]
    now = time.monotonic()
    kept.add(digests[1], Verdict(1, "timeout"))
    kept.add(digests[2], Verdict(1, "refused"))
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert kept.get(digests[1]) is not None
    monkeypatch.setattr(time, "monotonic", lambda: now + 62)
    assert kept.get(digests[1]) is None
    assert kept.get(digests[2]) is not None


SCHEMA = "response_format.json_schema.schema"

SLOW: dict[str, Any] = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}
"""A schema of 2 kB that takes minutes to compile."""


def slow(title: str = "") -> dict[str, Any]:
    """Return a body with a schema that takes minutes, for each title another one."""
    return body(CHAT, response_format=json_schema({**SLOW, "title": title}))


async def test_a_grammar_that_compiles_for_long_is_refused(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=0.5) as app:
        error = refused_with(await app.post(CHAT, slow()), 400)
        assert (error["code"], error["param"]) == ("grammar_timeout", SCHEMA)
        assert "--grammar-timeout" in error["message"]


async def test_many_slow_grammars_hold_up_nobody_but_each_other(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=60) as app:
        attackers = [asyncio.create_task(app.post(CHAT, slow(str(i)))) for i in range(12)]
        await running_forks(app, 2)
        for fields in ({}, *({"structured_outputs": {"choice": [choice]}} for choice in "abc")):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == 200
        assert not any(attacker.done() for attacker in attackers), "minutes of compiling were not waited for"
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)


async def test_equal_slow_grammars_share_a_check_and_its_verdict_is_kept(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        answers = await asyncio.gather(*(app.post(CHAT, slow()) for _ in range(60)))
        assert {refused_with(answer, 400)["code"] for answer in answers} == {"grammar_timeout"}
        await app.state.grammars.close()
        text_form = body(CHAT, structured_outputs={"json": json.dumps(SLOW | {"title": ""})})
        error = refused_with(await app.post(CHAT, text_form), 400)
        assert (error["code"], error["param"]) == ("grammar_timeout", "structured_outputs.json")
        assert app.state.grammars._process is None, "the verdict was kept"


async def test_a_check_goes_on_when_its_client_has_left(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        leaver = asyncio.create_task(app.post(CHAT, slow()))
        (fork,) = await running_forks(app, 1)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert refused_with(await app.post(CHAT, slow()), 400)["code"] == "grammar_timeout"
        assert fork not in forks_of(app)
        assert not app.state.grammars._checks


async def test_a_check_that_nobody_waits_for_any_more_leaves_its_line(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        first = [asyncio.create_task(app.post(CHAT, slow(title))) for title in "ab"]
        await running_forks(app, 2)
        leaver = asyncio.create_task(app.post(CHAT, slow("the last in the line")))
        while len(app.state.grammars._checks) < 3:  # noqa: ASYNC110 - nobody is told that a check was made
            await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert len(app.state.grammars._checks) == 2
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)


async def test_a_grammar_that_was_tried_for_nobody_does_not_join_the_slow_ones(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        first = asyncio.create_task(app.post(CHAT, slow("a")))
        await running_forks(app, 1)
        leaver = asyncio.create_task(app.post(CHAT, slow("b")))
        await running_forks(app, 2)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        while len(app.state.grammars._checks) > 1:  # noqa: ASYNC110 - nobody is told that a check has ended
            await asyncio.sleep(0.01)
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_grammar_that_waits_for_others_for_long_is_told_to_come_again(open_app: OpenApp) -> None:
    async with open_app(one_token, queue_timeout=0.1) as app:
        async with app.state.grammars._quick.turn(1):
            answer = await app.post(CHAT, body(CHAT, response_format={"type": "json_object"}))
        assert refused_with(answer, 503)["code"] == "queue_timeout"
        assert "Retry-After" in answer.headers


async def test_places_are_given_to_the_shortest_first() -> None:
    line, order = Line(1), []

    async def stand(length: int) -> None:
        async with line.turn(length):
            order.append(length)

    async with line.turn(9):
        tasks = [asyncio.create_task(stand(length)) for length in (3, 1, 2, 1)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 2, 3]
    async with line.turn(1):
        pass


async def test_the_ways_in_which_a_check_dies_are_told_apart(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        for number, status, code in (
            (signal.SIGKILL, 400, "grammar_too_large"),
            (signal.SIGABRT, 400, "grammar_too_large"),
            (signal.SIGSEGV, 500, "grammar_check_failed"),
        ):
            working = asyncio.create_task(app.post(CHAT, slow(number.name)))
            (fork,) = await running_forks(app, 1)
            assert "the check of a grammar died" not in caplog.text
            os.kill(fork, number)
            error = refused_with(await working, status)
            assert (error["code"], error["param"]) == (code, SCHEMA)
        assert "the check of a grammar died" in caplog.text
        working = asyncio.create_task(app.post(CHAT, slow("no memory")))
        (fork,) = await running_forks(app, 1)
        while resource.prlimit(fork, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        assert resource.prlimit(fork, resource.RLIMIT_AS)[0] < 2 << 30
        resource.prlimit(fork, resource.RLIMIT_AS, (1 << 20, 1 << 20))
        error = refused_with(await working, 400)
        assert (error["code"], "1024 MiB" in error["message"]) == ("grammar_too_large", True)
        process = app.state.grammars._process
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "b"}))).status_code == 200
        assert app.state.grammars._process is process, "the others' process lived on"


async def test_a_lost_process_is_replaced_and_no_verdict(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        working = asyncio.create_task(app.post(CHAT, slow()))
        (fork,) = await running_forks(app, 1)
        await kill_checker(app)
        answer = await working
        assert refused_with(answer, 503)["code"] == "grammar_checker_lost"
        assert "Retry-After" in answer.headers
        assert "the process that compiles grammars was lost" in caplog.text
        os.kill(fork, signal.SIGKILL)
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "b"}))).status_code == 200


def forks_of(app: App) -> list[int]:
    process = app.state.grammars._process
    if process is None or process.is_lost:
        return []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


async def running_forks(app: App, count: int) -> list[int]:
    """Return the processes that compile, once there are so many and they have begun with the last of their lines."""
    while (  # noqa: ASYNC110 - the process tells nobody whom it has started
        len(forks := forks_of(app)) < count or not app.state.grammars._thorough._is_taken
    ):
        await asyncio.sleep(0.01)
    return forks


async def kill_checker(app: App) -> None:
    process = app.state.grammars._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process._process.wait()
