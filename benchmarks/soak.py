"""Memory and descriptors of two replicas under mixed load for a quarter of an hour, one of them restarted again and again.

    python benchmarks/soak.py --json soak.json --plot soak.svg     # behind nginx, as docker/nginx configures it
    python benchmarks/soak.py --balancer none --minutes 5

Clients send chats, completions, rows in every form, embeddings, texts to tokenize and bad requests. Some read
slowly and some leave. One replica gets SIGTERM every few minutes and is started again when it has ended; the
other one runs on. At minute two and at the end the clients pause, and the descriptors of processes at rest
are counted.

The exit code is 1 unless all of this holds:

- The median resident memory of each process that was never restarted is in the last minute within 5 % of that
  in minute two. For the replica that is restarted, minute two counts from its last start.
- Processes at rest have as many descriptors as they had at minute two. The restarted replica's have as many
  as the other one's.
- The KV cache was filled before minute two was over: 95 % of it was seen in use, or a sequence was preempted.
- No request failed. A request that a full server refuses with 429 has not failed.
- No server logged an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from http_load import machine
from soak_load import Traffic
from soak_processes import Life, Replica, nginx
from soak_report import (
    COLOURS,
    MINUTE,
    Check,
    Line,
    Panel,
    descriptor_check,
    memory_check,
    print_table,
    process_panels,
    svg,
)

SAMPLE_SECONDS = 5
SAMPLES_PER_LINE = 6
REST_SECONDS = 20
START_ALLOWANCE = 30
"""Seconds that a restart may take, so that three minutes are left after the last one."""

FULL = 0.95


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        options = [arguments.model, *server_options(arguments)]
        replicas = [Replica(number, options, folder / f"replica-{number}.log") for number in (1, 2)]
        for replica in replicas:
            stack.callback(replica.kill)
            replica.start()
        if arguments.balancer == "nginx":
            addresses = [stack.enter_context(nginx(replicas, folder))]
        else:
            addresses = [replica.address for replica in replicas]
        soak = Soak(arguments, replicas, addresses)
        asyncio.run(soak.run())
        for replica in replicas:
            replica.stop()
            soak.logged += replica.log_lines()
    checks = soak.checks()
    report(soak, checks)
    if not all(check.holds for check in checks):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--restart-every", type=float, default=3.5, help="minutes; 0: never")
    parser.add_argument("--balancer", choices=["nginx", "none"], default="nginx")
    parser.add_argument("--kv-cache-bytes", default="32MiB", help="of each replica")
    parser.add_argument("--server-option", action="append", default=[], help="passed on to both servers")
    parser.add_argument("--json", type=Path, help="also write samples and figures here")
    parser.add_argument("--plot", type=Path, help="also draw them here, as SVG")
    return parser.parse_args()


def server_options(arguments: argparse.Namespace) -> list[str]:
    """Return options that let two replicas share the cores, and that fill cache, windows and budgets soon."""
    bounds = {
        "--num-threads": "1",
        "--kv-cache-bytes": arguments.kv_cache_bytes,
        "--max-held-bytes": "128MiB",
        "--logits-window-bytes": "1MiB",
        "--drain-timeout": "60",
    }
    pairs = (word for pair in bounds.items() for word in pair)
    return ["--listen-when-ready", *pairs, *arguments.server_option]


class Soak:
    """One run: load, restarts and samples side by side."""

    def __init__(
        self, arguments: argparse.Namespace, replicas: list[Replica], addresses: list[tuple[str, int]]
    ) -> None:
        self.arguments = arguments
        self.steady, self.restarted = replicas
        self.replicas = replicas
        self.traffic = Traffic(addresses)
        self.end = MINUTE * arguments.minutes
        self.restarts: list[float] = []
        self.at_rest: list[dict[int, int]] = []
        self.logged: list[str] = []
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    async def run(self) -> None:
        self._started = time.monotonic()
        self.traffic.resume()
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self.traffic.client()) for _ in range(self.arguments.clients)]
            beside += [tasks.create_task(self.sample()), tasks.create_task(self.restart())]
            for moment in (2 * MINUTE, self.end):
                await asyncio.sleep(moment - self.seconds)
                await self.rest()
            for task in beside:
                task.cancel()

    async def rest(self) -> None:
        """Pause the clients, and note the descriptors of each process once they are as few as they get."""
        await self.traffic.pause()
        least: dict[int, int] = {}
        until = self.seconds + REST_SECONDS
        while self.seconds < until:
            await asyncio.sleep(1)
            for replica in self.replicas:
                for pid, descriptors in replica.descriptors().items():
                    least[pid] = min(descriptors, least.get(pid, descriptors))
        self.at_rest.append(least)
        self.traffic.resume()

    async def sample(self) -> None:
        for number in itertools.count():
            seconds = round(self.seconds, 1)
            for replica in self.replicas:
                replica.sample(seconds)
                await replica.sample_metrics(seconds)
            if number % SAMPLES_PER_LINE == 0:
                answered = sum(self.traffic.counts.values())
                failed = f"{self.traffic.num_failed} failed"
                line = f"{seconds / MINUTE:5.1f} min  {answered:6} answers, {failed}  {self.memory_line()}"
                print(line, flush=True)
            await asyncio.sleep(SAMPLE_SECONDS - (self.seconds - seconds))

    def memory_line(self) -> str:
        lives = [life for replica in self.replicas for life in replica.current if life.rss]
        return "  ".join(f"{life.name} {life.rss[-1] >> 20} MiB" for life in lives)

    async def restart(self) -> None:
        every = MINUTE * self.arguments.restart_every
        number = 1
        while every and number * every <= self.end - 3 * MINUTE - START_ALLOWANCE:
            await asyncio.sleep(number * every - self.seconds)
            await asyncio.to_thread(self.restarted.stop)
            await asyncio.to_thread(self.restarted.start)
            self.restarts.append(round(self.seconds, 1))
            number += 1

    @property
    def lives(self) -> list[Life]:
        return [life for replica in self.replicas for life in replica.lives]

    def checks(self) -> list[Check]:
        """Return what must hold, as the module says."""
        return [*self.memory_checks(), *self.descriptor_checks(), self.cache_check(), *self.failure_checks()]

    def memory_checks(self) -> list[Check]:
        begin = self.restarts[-1] if self.restarts else 0.0
        judged = [memory_check(life, 0.0, self.end) for life in self.steady.lives]
        judged += [memory_check(life, begin, self.end) for life in self.restarted.lives[-2:]]
        return [check for check in judged if check is not None]

    def descriptor_checks(self) -> list[Check]:
        early, late = self.at_rest
        checks = []
        for steady, other in zip(self.steady.lives, self.restarted.lives[-2:], strict=True):
            checks.append(descriptor_check(steady, early[steady.pid], late[steady.pid]))
            checks.append(descriptor_check(other, early[steady.pid], late[other.pid]))
        return checks

    def cache_check(self) -> Check:
        seconds, used, blocks, preemptions = (
            self.steady.metrics[name]
            for name in (
                "seconds",
                "logitserve:kv_blocks_used",
                "logitserve:kv_blocks",
                "vllm:num_preemptions_total",
            )
        )
        early = sum(second < 2 * MINUTE for second in seconds)
        most = max((x / y for x, y in zip(used[:early], blocks[:early], strict=True)), default=0)
        preempted = max(preemptions[:early], default=0)
        found = f"{100 * most:.0f} % used, {preempted:.0f} preemptions"
        return Check("replica 1: KV cache before minute two", most >= FULL or preempted > 0, found)

    def failure_checks(self) -> list[Check]:
        failed = self.traffic.num_failed
        lines = [line for line in self.logged if ": warning: " not in line]
        return [
            Check("requests that failed", not failed, str(failed)),
            Check("lines in the servers' logs above warning", not lines, str(len(lines))),
        ]


def report(soak: Soak, checks: list[Check]) -> None:
    counts: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in soak.traffic.counts.items():
        counts.setdefault(kind, {})[outcome] = count
    for line in [*soak.traffic.failures, *soak.logged]:
        print(line)
    print_table(checks, counts)
    arguments = soak.arguments
    if arguments.json:
        arguments.json.write_text(document(soak, checks, counts))
    if arguments.plot:
        arguments.plot.write_text(svg([*process_panels(soak.lives), *metric_panels(soak)]))


def document(soak: Soak, checks: list[Check], counts: dict[str, dict[str, int]]) -> str:
    """Return everything as JSON, with a line for each process and for each replica's metrics."""
    parts: dict[str, Any] = {
        "machine": machine(),
        "options": {
            name: value for name, value in vars(soak.arguments).items() if name not in ("json", "plot")
        },
        "checks": [vars(check) for check in checks],
        "requests": counts,
        "restarts": soak.restarts,
        "processes": [vars(life) for life in soak.lives],
        "metrics": [replica.metrics for replica in soak.replicas],
    }
    members = []
    for name, value in parts.items():
        is_list = isinstance(value, list)
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if is_list else json.dumps(value)
        members.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(members) + "\n}\n"


def metric_panels(soak: Soak) -> list[Panel]:
    panels = []
    for title, name, scale in (
        ("KV blocks used", "logitserve:kv_blocks_used", 1),
        ("held for clients, MiB", "logitserve:held_bytes", 1 << 20),
        ("requests in flight", "logitserve:requests_in_flight", 1),
    ):
        lines = [
            Line(
                f"replica {replica.number}",
                colour,
                replica.metrics["seconds"],
                [value / scale for value in replica.metrics[name]],
            )
            for replica, colour in zip(soak.replicas, COLOURS, strict=False)
        ]
        panels.append(Panel(title, lines))
    return panels


if __name__ == "__main__":
    main()
