"""Tokens per second over HTTP, with and without logits, against peers in the same run.

    python benchmarks/serve.py                                   # start a server, 1, 4 and 16 streams
    python benchmarks/serve.py --prefill 512 --context 2000      # and prompt processing, and a stream at a long context
    python benchmarks/serve.py --peer transformers               # and transformers' batched generate, interleaved
    python benchmarks/serve.py --peer openvino                   # and OpenVINO GenAI, if it is installed
    python benchmarks/serve.py --peer-url http://127.0.0.1:9000  # and any OpenAI-compatible server
    python benchmarks/serve.py --schema --streams 16             # and answers that follow a JSON schema
    python benchmarks/serve.py --logits                          # and full-vocabulary float32 base64 rows on every token

Every round measures each contestant once, one after the other, so that a slow minute of the machine affects
all of them. The table shows medians of the rounds. A measurement is the wall-clock time of all streams
together, prompts included. It counts generated tokens, and prompt tokens if only one token is generated.
Prompts are random token ids, different in every round, so no prefix cache can help.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_load import RandomPrompts, greedy, machine, post, serving
from peers import IN_PROCESS, Measure

LONG_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "people",
        "schema": {
            "type": "array",
            "minItems": 10_000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 20},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "kind": {"enum": ["friend", "colleague", "stranger"]},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
                },
                "required": ["name", "age", "kind", "tags"],
                "additionalProperties": False,
            },
        },
    },
}
"""A schema whose shortest text is longer than any answer that is measured."""


@dataclass(frozen=True)
class Load:
    """Streams that start together, each with a prompt and tokens to generate."""

    streams: int
    prompt_tokens: int
    new_tokens: int

    @property
    def counted_tokens(self) -> int:
        return self.streams * (self.prompt_tokens if self.new_tokens == 1 else self.new_tokens)

    def __str__(self) -> str:
        if self.new_tokens == 1:
            return f"prompt of {self.prompt_tokens}"
        return f"{self.streams} x ({self.prompt_tokens} + {self.new_tokens})"


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
    parser.add_argument(
        "--prefill", type=int, nargs="*", default=[], help="also prompts of these lengths alone"
    )
    parser.add_argument(
        "--context", type=int, nargs="*", default=[], help="also one stream after such a prompt"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logits", action="store_true", help="also with the whole vocabulary on every token")
    parser.add_argument("--schema", action="store_true", help="also with a JSON schema that answers follow")
    parser.add_argument("--peer", choices=sorted(IN_PROCESS), action="append", default=[])
    parser.add_argument("--peer-url", action="append", default=[], help="an OpenAI-compatible server")
    parser.add_argument("--peer-model", help="the model name that the peer's URL expects")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def make_contestants(url: str, arguments: argparse.Namespace) -> dict[str, Measure]:
    contestants: dict[str, Measure] = {"logitserve": http_measure(url, {})}
    if arguments.logits:
        contestants["logitserve, full float32 logits"] = http_measure(url, {"return_logits": True})
    if arguments.schema:
        contestants["logitserve, JSON schema"] = http_measure(url, {"response_format": LONG_SCHEMA})
    for peer_url in arguments.peer_url:
        extra = {"model": arguments.peer_model} if arguments.peer_model else {}
        contestants[peer_url] = http_measure(peer_url, extra)
    for peer in arguments.peer:
        contestants[peer] = IN_PROCESS[peer](arguments.model)
    return contestants


def make_loads(arguments: argparse.Namespace) -> list[Load]:
    new_tokens = arguments.new_tokens
    return [
        *(Load(streams, arguments.prompt_tokens, new_tokens) for streams in arguments.streams),
        *(Load(1, prompt_tokens, new_tokens) for prompt_tokens in arguments.context),
        *(Load(1, prompt_tokens, 1) for prompt_tokens in arguments.prefill),
    ]


def http_measure(url: str, extra: dict[str, Any]) -> Measure:
    def measure(prompts: list[list[int]], new_tokens: int) -> float:
        return asyncio.run(run_streams(url, prompts, new_tokens, extra))

    return measure


async def run_streams(url: str, prompts: list[list[int]], new_tokens: int, extra: dict[str, Any]) -> float:
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream_one(url, prompt, new_tokens, extra) for prompt in prompts))
    elapsed = time.perf_counter() - started
    if set(counts) != {new_tokens}:
        raise SystemExit(f"{url} generated {counts} tokens instead of {new_tokens} each")
    return elapsed


async def stream_one(url: str, prompt: list[int], new_tokens: int, extra: dict[str, Any]) -> int:
    """Stream one completion and return the completion tokens that its usage chunk counts."""
    body = {**greedy(prompt, new_tokens), "stream": True, "stream_options": {"include_usage": True}, **extra}
    answer = await post(f"{url}/v1/completions", body)
    return answer.completion_tokens


def measure_rounds(
    contestants: dict[str, Measure], arguments: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Return tokens per second: {contestant: {load: [one per round]}}."""
    results: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    prompts = RandomPrompts()
    for measure in contestants.values():
        measure(prompts(1, arguments.prompt_tokens), arguments.new_tokens)
    for round_number in range(arguments.rounds):
        for load in make_loads(arguments):
            for name, measure in contestants.items():
                rate = load.counted_tokens / measure(
                    prompts(load.streams, load.prompt_tokens), load.new_tokens
                )
                results[name].setdefault(str(load), []).append(rate)
                print(f"round {round_number + 1}  {load!s:>16}  {rate:8.1f} tokens/s  {name}", flush=True)
    return results


def report(results: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    medians = {
        name: {load: statistics.median(rates) for load, rates in by_load.items()}
        for name, by_load in results.items()
    }
    ours = medians["logitserve"]
    print(f"\nmedians of {arguments.rounds} rounds, tokens/s (logitserve's ratio to it)\n")
    print("| contestant | " + " | ".join(ours) + " |")
    print("|---" * (len(ours) + 1) + "|")
    for name, by_load in medians.items():
        cells = [f"{rate:.1f} ({ours[load] / rate:.2f})" for load, rate in by_load.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json:
        document = {"machine": machine(), "options": vars(arguments), "rates": results, "medians": medians}
        arguments.json.write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main()
