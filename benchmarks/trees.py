"""This checkout against another one over HTTP, with alternating servers in one run, and the other one against itself.

    git worktree add ../old COMMIT
    python benchmarks/trees.py ../old                # the loads of serve.py and the kinds of logits.py
    python benchmarks/trees.py ../old --only kinds   # or one of the two

Three servers run side by side and only one has work at a time: this checkout's, the other one's, and the
other one's again. A round measures every load on each, one after the other, in an order that changes with the
round. The table shows, for each load, medians of the rounds' ratios to the other checkout: this one's, and
the control's. The control's ratio would be 1 on a quiet machine. Both checkouts use the packages of the
Python that starts this script.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import logits
from http_load import RandomPrompts, machine, serving
from serve import Load, run_streams

HERE = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "engine", "server", "clients/python")
NEW, OLD, CONTROL = "this checkout", "the other", "the other again"

Measure = Callable[[str, RandomPrompts], float]
"""Measures the seconds of a load at a server's address."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the other checkout's folder")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", choices=["loads", "kinds"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--context", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    measures = make_measures(arguments)
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(server_of(folder, arguments.model))
            for name, folder in ((NEW, HERE), (OLD, arguments.other), (CONTROL, arguments.other))
        }
        seconds = measure_rounds(urls, measures, arguments.rounds)
    report(seconds, arguments)


@contextlib.contextmanager
def server_of(folder: Path, model: str) -> Iterator[str]:
    """Run a server from a checkout's own sources."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder.resolve() / source) for source in SOURCES)
    with serving(model, []) as url:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        yield url


def make_measures(arguments: argparse.Namespace) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    if arguments.only != "kinds":
        loads = [
            *(Load(streams, arguments.prompt_tokens, arguments.new_tokens) for streams in arguments.streams),
            *(Load(1, length, arguments.new_tokens) for length in arguments.context),
            *(Load(1, length, 1) for length in arguments.prefill),
        ]
        measures |= {str(load): measure_load(load) for load in loads}
    if arguments.only != "loads":
        for streams in (min(arguments.streams), max(arguments.streams)):
            for kind in (*logits.KINDS, logits.ARROW, logits.PROMPT_ROWS):
                if kind != "none":
                    measures[f"{streams} x {kind}"] = measure_kind(kind, streams, arguments)
    return measures


def measure_load(load: Load) -> Measure:
    def measure(url: str, prompts: RandomPrompts) -> float:
        return asyncio.run(run_streams(url, prompts(load.streams, load.prompt_tokens), load.new_tokens, {}))

    return measure


def measure_kind(kind: str, streams: int, arguments: argparse.Namespace) -> Measure:
    # A prompt that fits in one step would not measure how a long one is cut.
    length = 4 * arguments.prompt_tokens if kind == logits.PROMPT_ROWS else arguments.prompt_tokens

    def measure(url: str, prompts: RandomPrompts) -> float:
        return asyncio.run(logits.run(url, kind, prompts(streams, length), arguments.new_tokens))[0]

    return measure


def measure_rounds(
    urls: dict[str, str], measures: dict[str, Measure], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return seconds: {load: {server: [one per round]}}. An additional first round warms up."""
    prompts = RandomPrompts()
    seconds: dict[str, dict[str, list[float]]] = {load: {name: [] for name in urls} for load in measures}
    for number in range(rounds + 1):
        names = list(urls)
        order = names[number % 3 :] + names[: number % 3]
        for load, measure in measures.items():
            for name in order:
                taken = measure(urls[name], prompts)
                if number:
                    seconds[load][name].append(taken)
            if number:
                latest = "  ".join(f"{name} {seconds[load][name][-1]:.3f} s" for name in urls)
                print(f"round {number}  {load}:  {latest}", flush=True)
    return seconds


def report(seconds: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    print(f"\nmedians of {arguments.rounds} rounds: speed relative to the other checkout\n")
    print("| load | this checkout | control | ratio of the two |")
    print("|---|---|---|---|")
    table = {}
    for load, taken in seconds.items():
        ratio, control = (
            statistics.median(old / mine for old, mine in zip(taken[OLD], taken[name], strict=True))
            for name in (NEW, CONTROL)
        )
        table[load] = {"ratio": ratio, "control": control}
        print(f"| {load} | {ratio:.3f} | {control:.3f} | {ratio / control:.3f} |")
    if arguments.json:
        document = {"machine": machine(), "options": vars(arguments), "table": table, "seconds": seconds}
        arguments.json.write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main()
