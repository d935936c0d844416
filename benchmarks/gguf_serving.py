"""A GGUF file served: start, memory, what stays on disk, and speed, beside llama.cpp's server on the same file.

    python benchmarks/gguf_serving.py FILE                            # this server alone
    python benchmarks/gguf_serving.py FILE --llama-server PATH        # and llama.cpp's, each load in turns
    python benchmarks/gguf_serving.py FILE --streams 1 --no-prefill   # one stream, as for a large file
    python benchmarks/gguf_serving.py FILE --fill                     # memory with every KV block and token id used

Each server is started with an empty cache directory, but for the compiled kernels, as on the first start with a file. A start
ends with the first answer. Memory is the peak of the largest process, with the pages of mapped files that it has touched.
benchmarks/random_gguf.py writes a large file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from http_load import greedy, machine, post
from logitengine.model.checkpoint.conversions import cache_directory
from serve import http_measure, measure_rounds, report
from soak_processes import free_port

KV_BYTES = 256 << 20
MIB = 1 << 20
START_SECONDS = 300
LEAP = 7919
"""Distance of successive token ids of the prompt that fills the cache. It is prime, so that they go through all ids."""


@dataclass(frozen=True)
class Start:
    """Seconds to the first answer, the largest process's peak, and what is left in the cache directory."""

    seconds: float
    peak_bytes: int
    files_bytes: int
    files: list[str]


class Server:
    """A server on a port of its own and in a cache directory of its own."""

    def __init__(self, name: str, command: list[str], cache: Path) -> None:
        """Take the command without its port, and a directory in which nothing but kernels is prepared."""
        self.name = name
        self.port = free_port()
        self._cache = cache
        self._prepared = set(_files(cache))
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "LLAMA_CACHE": str(cache)}
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def first_answer(self) -> float:
        """Wait for the first answer and return the seconds since the start."""
        body = greedy([100, 200, 300], 1)
        while time.monotonic() < self._started + START_SECONDS:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self._process.returncode}")
            with contextlib.suppress(OSError, SystemExit):  # nobody listens yet, or the model is not loaded
                asyncio.run(post(f"{self.url}/v1/completions", body))
                return time.monotonic() - self._started
            time.sleep(0.05)
        raise SystemExit(f"{self.name} did not answer within {START_SECONDS} s")

    def peak_bytes(self) -> int:
        """Return the largest peak of resident memory (VmHWM) of the server's processes."""
        own = psutil.Process(self._process.pid)
        return max(_peak(process.pid) for process in (own, *own.children(recursive=True)))

    def left(self) -> dict[str, int]:
        """Return the sizes of the files that the server has left in its cache directory."""
        return {
            str(path.relative_to(self._cache)): path.stat().st_size
            for path in _files(self._cache)
            if path not in self._prepared
        }

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=60)


def main() -> None:
    arguments = parse_arguments()
    commands = {"logitserve": our_command(arguments)}
    if arguments.llama_server:
        commands["llama-server"] = llama_command(arguments)
    with contextlib.ExitStack() as stack:
        servers, starts = [], {}
        for name, command in commands.items():
            server = stack.enter_context(running(name, command))
            starts[name] = started(server)
            servers.append(server)
        report_starts(starts, arguments)
        urls = {server.name: server.url for server in servers}
        rates = measure_rounds({name: http_measure(url, {}) for name, url in urls.items()}, arguments)
        report(rates, arguments)
        if arguments.fill:
            fill(servers[0].url)
        peaks = {server.name: server.peak_bytes() for server in servers}
    print("\n| after the loads | peak, MiB |\n|---|---|")
    for name, peak in peaks.items():
        print(f"| {name} | {peak / MIB:.0f} |")
    if arguments.figures:
        document = {
            "machine": machine(),
            "file": arguments.file.name,
            "starts": {name: asdict(start) for name, start in starts.items()},
            "rates": rates,
            "peaks": peaks,
        }
        arguments.figures.write_text(json.dumps(document, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, built for this machine")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-prefill", dest="prefill", action="store_const", const=[], default=[512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--fill", action="store_true", help="end with a prompt that fills logitserve's KV cache"
    )
    parser.add_argument("--figures", type=Path, help="also write the figures here, as JSON")
    parser.set_defaults(context=[], json=None)
    return parser.parse_args()


def our_command(arguments: argparse.Namespace) -> list[str]:
    options = ["--kv-cache-bytes", str(KV_BYTES), "--log-level", "warning"]
    return [sys.executable, "-m", "logitserve", "serve", str(arguments.file), *options]


def llama_command(arguments: argparse.Namespace) -> list[str]:
    """Return llama.cpp's command: a slot a stream, each with room for the longest load, and no cache of prompts."""
    longest = max([arguments.prompt_tokens + arguments.new_tokens, *arguments.prefill]) + 8
    slots = max(arguments.streams)
    options = {"--parallel": slots, "--ctx-size": slots * longest, "--cache-ram": 0}
    flags = [str(part) for option in options.items() for part in option]
    threads = str(len(os.sched_getaffinity(0)))
    return [
        str(arguments.llama_server),
        "--model",
        str(arguments.file),
        *flags,
        "--threads",
        threads,
        "--no-ui",
    ]


@contextlib.contextmanager
def running(name: str, command: list[str]) -> Iterator[Server]:
    """Run a server whose cache directory holds the compiled kernels alone."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        kernels = cache_directory() / "kernels"
        if kernels.is_dir():
            shutil.copytree(kernels, cache / "logitserve" / "kernels")
        server = Server(name, command, cache)
        try:
            yield server
        finally:
            server.stop()


def started(server: Server) -> Start:
    seconds = server.first_answer()
    left = server.left()
    return Start(seconds, server.peak_bytes(), sum(left.values()), sorted(left))


def report_starts(starts: Mapping[str, Start], arguments: argparse.Namespace) -> None:
    size = arguments.file.stat().st_size
    print(f"{arguments.file.name}: {size / MIB:.0f} MiB; KV cache of logitserve: {KV_BYTES / MIB:.0f} MiB\n")
    print(
        "| started | first answer, s | peak, MiB | beyond the file, MiB | left on disk, MiB |\n|---|---|---|---|---|"
    )
    for name, start in starts.items():
        beyond = (start.peak_bytes - size) / MIB
        print(
            f"| {name} | {start.seconds:.1f} | {start.peak_bytes / MIB:.0f} | {beyond:.0f} | {start.files_bytes / MIB:.1f} |"
        )
    for name, start in starts.items():
        print(f"\nleft on disk by {name}: {', '.join(start.files) or 'nothing'}", flush=True)


def fill(url: str) -> None:
    """Send a prompt as long as the model takes, of ids from all of the vocabulary."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]
    prompt = [i * LEAP % model["vocab_size"] for i in range(model["max_model_len"] - 1)]
    asyncio.run(post(f"{url}/v1/completions", greedy(prompt, 1)))


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _peak(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) << 10


if __name__ == "__main__":
    main()
