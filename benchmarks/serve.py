"""Generated tokens per second over HTTP, with and without logits, against peers in the same run.

    python benchmarks/serve.py                                   # start a server, 1, 4 and 16 streams
    python benchmarks/serve.py --peer transformers               # and transformers' batched generate, interleaved
    python benchmarks/serve.py --peer-url http://127.0.0.1:9000  # and any OpenAI-compatible server
    python benchmarks/serve.py --logits                          # and full-vocabulary float32 base64 rows on every token

Every round measures each contestant once, one after the other, so that a slow minute of the machine hits all of them;
the table shows medians of the rounds. A measurement is the wall-clock time of all streams together, prompts included.
Prompts are random token ids, different in every round, so no prefix cache can help.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_load import RandomPrompts, greedy, machine, post, serving

Measure = Callable[[list[list[int]]], float]


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(serving(arguments.model, arguments.server_option))
        contestants = make_contestants(url, arguments)
        results = measure_rounds(contestants, arguments)
    report(results, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="model of the server that is started")
    parser.add_argument("--url", help="a server that runs already, instead of starting one")
    parser.add_argument(
        "--server-option", action="append", default=[], help="passed on, e.g. --server-option=--dtype=float32"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logits", action="store_true", help="also with the whole vocabulary on every token")
    parser.add_argument("--peer", choices=["transformers"], action="append", default=[])
    parser.add_argument("--peer-url", action="append", default=[], help="an OpenAI-compatible server")
    parser.add_argument("--peer-model", help="the model name that the peer's URL expects")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def make_contestants(url: str, arguments: argparse.Namespace) -> dict[str, Measure]:
    contestants: dict[str, Measure] = {"logitserve": http_measure(url, arguments, {})}
    if arguments.logits:
        contestants["logitserve, full float32 logits"] = http_measure(url, arguments, {"return_logits": True})
    for peer_url in arguments.peer_url:
        extra = {"model": arguments.peer_model} if arguments.peer_model else {}
        contestants[peer_url] = http_measure(peer_url, arguments, extra)
    if "transformers" in arguments.peer:
        contestants["transformers bfloat16"] = transformers_measure(arguments)
    return contestants


def http_measure(url: str, arguments: argparse.Namespace, extra: dict[str, Any]) -> Measure:
    def measure(prompts: list[list[int]]) -> float:
        return asyncio.run(run_streams(url, prompts, arguments.new_tokens, extra))

    return measure


async def run_streams(url: str, prompts: list[list[int]], new_tokens: int, extra: dict[str, Any]) -> float:
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream_one(url, prompt, new_tokens, extra) for prompt in prompts))
    elapsed = time.perf_counter() - started
    if set(counts) != {new_tokens}:
        raise SystemExit(f"{url} generated {counts} tokens instead of {new_tokens} each")
    return elapsed


async def stream_one(url: str, prompt: list[int], new_tokens: int, extra: dict[str, Any]) -> int:
    """One streamed completion; returns the completion tokens that its usage chunk counts."""
    body = {**greedy(prompt, new_tokens), "stream": True, "stream_options": {"include_usage": True}, **extra}
    answer = await post(f"{url}/v1/completions", body)
    return answer.completion_tokens


def transformers_measure(arguments: argparse.Namespace) -> Measure:
    import torch
    from logitengine.checkpoint import resolve_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        resolve_checkpoint(arguments.model).path, dtype=torch.bfloat16
    ).eval()

    @torch.inference_mode()
    def measure(prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
        )
        elapsed = time.perf_counter() - started
        assert output.shape[1] == ids.shape[1] + arguments.new_tokens
        return elapsed

    return measure


def measure_rounds(
    contestants: dict[str, Measure], arguments: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Tokens per second: {contestant: {streams: [one per round]}}."""
    prompts = RandomPrompts(arguments.prompt_tokens)
    results: dict[str, dict[int, list[float]]] = {name: {} for name in contestants}
    for measure in contestants.values():
        measure(prompts(1))
    for round_number in range(arguments.rounds):
        for streams in arguments.streams:
            for name, measure in contestants.items():
                seconds = measure(prompts(streams))
                rate = streams * arguments.new_tokens / seconds
                results[name].setdefault(streams, []).append(rate)
                print(
                    f"round {round_number + 1}  {streams:3} streams  {rate:8.1f} tokens/s  {name}", flush=True
                )
    return results


def report(results: dict[str, dict[int, list[float]]], arguments: argparse.Namespace) -> None:
    medians = {
        name: {streams: statistics.median(rates) for streams, rates in by_streams.items()}
        for name, by_streams in results.items()
    }
    ours = medians["logitserve"]
    print(f"\nmedians of {arguments.rounds} rounds, tokens/s (logitserve's ratio to it)\n")
    print("| contestant | " + " | ".join(f"{streams} streams" for streams in arguments.streams) + " |")
    print("|---" * (len(arguments.streams) + 1) + "|")
    for name, by_streams in medians.items():
        cells = [f"{by_streams[n]:.1f} ({ours[n] / by_streams[n]:.2f})" for n in arguments.streams]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json:
        document = {"machine": machine(), "options": vars(arguments), "rates": results, "medians": medians}
        arguments.json.write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main()
