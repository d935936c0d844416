"""Waits of decoding streams for a token while others read whole prompts' rows.

    python benchmarks/token_gaps.py

Some streams decode. Beside them run in turn: nobody, plain prompts, and prompts whose every row is sent as
float16 over Arrow. The table shows the median and the longest gap between two tokens of one stream, and both
in units of a full-budget step. That unit is the median time, in the same run, of a prompt that fills one
step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

from http_load import READ_SIZE, RandomPrompts, greedy, machine, post, serving

BUDGET = 512
"""Default number of tokens of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--url", help="a server that runs already, instead of starting one")
    parser.add_argument("--decoding", type=int, default=4, help="streams that decode")
    parser.add_argument("--beside", type=int, default=16, help="prompts that are read beside them")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(serving(arguments.model, []))
        figures = asyncio.run(measure(url, arguments))
    report(figures, arguments)


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds of full-budget steps, and of the gaps between tokens beside each kind of neighbour."""
    prompts = RandomPrompts()
    figures: dict[str, list[float]] = {"step": [], "nobody": [], "plain prompts": [], "prompt rows": []}
    for number in range(arguments.rounds + 1):
        steps = []
        for prompt in prompts(5, BUDGET):
            answer = await post(f"{url}/v1/completions", greedy(prompt, 1))
            steps.append(answer.seconds)
        found = {"step": steps}
        for kind in ("nobody", "plain prompts", "prompt rows"):
            found[kind] = await gaps_beside(url, kind, prompts, arguments)
        if number:  # the first round warms up
            for name, seconds in found.items():
                figures[name] += seconds
    return figures


async def gaps_beside(
    url: str, kind: str, prompts: RandomPrompts, arguments: argparse.Namespace
) -> list[float]:
    done = asyncio.Event()
    decoding = [
        asyncio.create_task(token_gaps(url, prompt, done)) for prompt in prompts(arguments.decoding, 16)
    ]
    await asyncio.sleep(0.5)
    if kind == "nobody":
        await asyncio.sleep(3)
    else:
        beside = prompts(arguments.beside, arguments.prompt_tokens)
        await asyncio.gather(*(neighbour(url, kind, prompt) for prompt in beside))
    done.set()
    return [gap for gaps in await asyncio.gather(*decoding) for gap in gaps]


async def neighbour(url: str, kind: str, prompt: list[int]) -> None:
    if kind == "plain prompts":
        await post(f"{url}/v1/completions", greedy(prompt, 1))
    else:
        rows = {"input": prompt, "positions": "prompt", "max_tokens": 0, "dtype": "float16"}
        await post(f"{url}/v1/logits", rows)


async def token_gaps(url: str, prompt: list[int], done: asyncio.Event) -> list[float]:
    """Return seconds between the events of one stream, from the second token on, until ``done``."""
    body = json.dumps({**greedy(prompt, 1500), "stream": True}).encode()
    target = urlsplit(url)
    reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=READ_SIZE)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    gaps: list[float] = []
    last: float | None = None
    while not done.is_set() and (line := await reader.readline()):
        if line.startswith(b"data: {"):
            current = time.perf_counter()
            if last is not None:
                gaps.append(current - last)
            last = current
    writer.close()
    return gaps[1:]


def report(figures: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    step = statistics.median(figures.pop("step"))
    print(f"\na full-budget step: {1000 * step:.1f} ms (median)\n")
    print("| beside | median gap, ms | longest, ms | longest, steps |")
    print("|---|---|---|---|")
    for kind, gaps in figures.items():
        median, longest = statistics.median(gaps), max(gaps)
        print(f"| {kind} | {1000 * median:.1f} | {1000 * longest:.1f} | {longest / step:.2f} |")
    if arguments.json:
        document = {"machine": machine(), "options": vars(arguments), "step": step, "gaps": figures}
        arguments.json.write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main()
