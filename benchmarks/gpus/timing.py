"""Times of work on a GPU and the GPU's ceilings, shared by the parts of gpu.py."""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import triton

Call = Callable[[], object]

CACHE_BYTES = 256 << 20
"""Total bytes of rotated inputs: several times the L2 cache (H100: 50 MB), so that no call finds its inputs there."""

MAX_SETS = 256
"""Most sets of inputs. Inputs below CACHE_BYTES / MAX_SETS are bound by the launch, not by where they lie."""

SMALL_SECONDS = 1e-3
"""Bound below which calls are timed by replaying a graph of many, which omits the host's cost of launching them."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates the device reached: bytes per second (read plus written) of a copy, operations per second in bfloat16."""

    copy: float
    matmul: float

    def floor(self, nbytes: float, flops: float) -> float:
        """Return the shortest possible time of the work in seconds."""
        return max(nbytes / self.copy, flops / self.matmul)


class Timer:
    """Measures median seconds of a call. On a CPU, used only to try the script, it measures by the host's clock."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._is_cuda = device.type == "cuda"
        self._repeats = repeats

    def sets(self, nbytes: int) -> int:
        """Return how many sets of inputs of ``nbytes`` must alternate."""
        return min(MAX_SETS, 1 + CACHE_BYTES // nbytes) if self._is_cuda else 2

    def median(self, calls: Sequence[Call]) -> float:
        """Return the seconds of one call, with the calls alternating. Each one runs once before timing starts."""
        for call in calls:
            call()
        estimate = self._once(calls) / len(calls)
        if self._is_cuda and estimate < SMALL_SECONDS:
            return self._replayed(calls, estimate)
        rounds = max(1, -(-self._repeats // len(calls)))
        return statistics.median(self._once([call]) for _ in range(rounds) for call in calls)

    def _once(self, calls: Sequence[Call]) -> float:
        """Return the seconds of all calls together."""
        if not self._is_cuda:
            started = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def _replayed(self, calls: Sequence[Call], estimate: float) -> float:
        cycles = max(1, min(1000 // len(calls), int(2 * SMALL_SECONDS / (estimate * len(calls)))))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(cycles):
                for call in calls:
                    call()
        graph.replay()
        seconds = [self._once([graph.replay]) for _ in range(self._repeats)]
        return statistics.median(seconds) / (cycles * len(calls))


def measure_ceilings(device: torch.device, timer: Timer, *, tiny: bool) -> Ceilings:
    """Measure a large copy and a large product of random numbers."""
    ceilings = Ceilings(
        _copy_rate(device, timer, 1 << 16 if tiny else 1 << 30),
        _matmul_rate(device, timer, 64 if tiny else 8192),
    )
    free_memory()
    return ceilings


def _copy_rate(device: torch.device, timer: Timer, numel: int) -> float:
    source = torch.empty(numel, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer.median([lambda: target.copy_(source)])


def _matmul_rate(device: torch.device, timer: Timer, size: int) -> float:
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(a)
    return 2 * size**3 / timer.median([lambda: torch.mm(a, b, out=out)])


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device and the versions on which figures depend."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(asked, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout else None
