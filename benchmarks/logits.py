"""Cost of logits: tokens per second and bytes per token, against the same run without them.

    python benchmarks/logits.py

Every round measures each kind of request once, one after the other. The table shows medians of the rounds
and, in brackets, the speed relative to the requests without logits in the same round. Bytes per token count
the HTTP body. The last two lines read whole prompts and count their tokens: without rows, and with every row
as float16 over Arrow. The second of them is relative to the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from http_load import Answer, RandomPrompts, greedy, machine, post, serving

FULL_FLOAT16 = {"dtype": "float16"}

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "top-20": {"return_logits": {"top_k": 20}},
    "2 ids": {"return_logits": {"token_ids": [9891, 2822]}},
    "full float16, base64 SSE": {"return_logits": FULL_FLOAT16},
}
ARROW = "full float16, Arrow"
PROMPTS = "prompts alone (tokens/s)"
PROMPT_ROWS = "prompt rows, full float16, Arrow (rows/s)"
BASELINES = {PROMPTS: PROMPTS, PROMPT_ROWS: PROMPTS}
"""Baseline of a kind's speed, if it is not "none"."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="model of the server that is started")
    parser.add_argument("--url", help="a server that runs already, instead of starting one")
    parser.add_argument("--server-option", action="append", default=[], help="passed on to the server")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(serving(arguments.model, arguments.server_option))
        rounds = measure_rounds(url, arguments)
    report(rounds, arguments)


def measure_rounds(
    url: str, arguments: argparse.Namespace
) -> list[dict[tuple[str, int], tuple[float, float]]]:
    """Return per round: {(kind, streams): (tokens or rows per second, bytes per token or row)}."""
    prompts = RandomPrompts()
    rounds = []
    for number in range(arguments.rounds + 1):
        figures = {}
        for streams in arguments.streams:
            for kind in (*KINDS, ARROW, PROMPTS, PROMPT_ROWS):
                tokens = arguments.prompt_tokens if kind in BASELINES else arguments.new_tokens
                seconds, answers = asyncio.run(
                    run(url, kind, prompts(streams, arguments.prompt_tokens), arguments.new_tokens)
                )
                nbytes = sum(answer.nbytes for answer in answers)
                figures[kind, streams] = (streams * tokens / seconds, nbytes / (streams * tokens))
                print(
                    f"round {number}  {streams:3} streams  {figures[kind, streams][0]:8.1f}/s  {kind}",
                    flush=True,
                )
        rounds.append(figures)
    return rounds[1:]  # round 0 warms up


async def run(url: str, kind: str, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[Answer]]:
    started = time.perf_counter()
    answers = await asyncio.gather(*(one(url, kind, prompt, new_tokens) for prompt in prompts))
    return time.perf_counter() - started, answers


async def one(url: str, kind: str, prompt: list[int], new_tokens: int) -> Answer:
    body = greedy(prompt, 1 if kind == PROMPTS else new_tokens)
    if kind == PROMPTS:
        return await post(f"{url}/v1/completions", body)
    if kind in KINDS:
        extra = {"stream": True, "stream_options": {"include_usage": True}, **KINDS[kind]}
        answer = await post(f"{url}/v1/completions", {**body, **extra})
        if answer.completion_tokens != new_tokens:
            raise SystemExit(f"{kind}: {answer.completion_tokens} tokens instead of {new_tokens}")
        return answer
    prompt_ids = body.pop("prompt")
    positions = "prompt" if kind == PROMPT_ROWS else "generated"
    body |= {"input": prompt_ids, "positions": positions, **FULL_FLOAT16}
    if kind == PROMPT_ROWS:
        body["max_tokens"] = 0
    return await post(f"{url}/v1/logits", body)


def report(rounds: list[dict[tuple[str, int], tuple[float, float]]], arguments: argparse.Namespace) -> None:
    print(f"\nmedians of {arguments.rounds} rounds\n")
    columns = [f"{streams} streams | kB/token" for streams in arguments.streams]
    print("| asked for | " + " | ".join(columns) + " |")
    print("|---" * (2 * len(columns) + 1) + "|")
    table: dict[str, dict[int, dict[str, float]]] = {}
    for kind in (*KINDS, ARROW, PROMPTS, PROMPT_ROWS):
        cells = []
        baseline = BASELINES.get(kind, "none")
        for streams in arguments.streams:
            rate = statistics.median(figures[kind, streams][0] for figures in rounds)
            ratio = statistics.median(
                figures[kind, streams][0] / figures[baseline, streams][0] for figures in rounds
            )
            nbytes = rounds[0][kind, streams][1]
            table.setdefault(kind, {})[streams] = {"rate": rate, "ratio": ratio, "bytes": nbytes}
            cells.append(f"{rate:.1f} ({ratio:.2f}) | {nbytes / 1000:.2f}")
        print(f"| {kind} | " + " | ".join(cells) + " |")
    if arguments.json:
        document = {"machine": machine(), "options": vars(arguments), "table": table}
        arguments.json.write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main()
