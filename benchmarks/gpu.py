"""Triton kernels and whole models on one GPU: check and time every kernel, measure decode and prefill rates,
and a peer.

    python benchmarks/gpu.py --json gpu.json             # about 8 minutes on an H100
    python benchmarks/gpu.py --only kernels --model qwen
    python benchmarks/gpu.py --device cpu --tiny         # tries the script out in Triton's interpreter

Rates and bandwidths are compared with what the same device reached in the same run: a large copy (bytes read
plus bytes written) and a large bfloat16 product. "fraction" is the shortest time that either allows over the
measured time. All weights and inputs are random. A kernel that is wrong by more than rounding, or a part that
raises, is reported and makes the exit status 1; a peer that fails is only reported. The JSON is rewritten
after every result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("llama", "qwen")


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":
        # Set before anything imports Triton.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from transformers.utils import logging

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu --tiny tries the script out")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = Run(arguments)
    measure(arguments, run)
    run.print_tables()
    sys.exit(1 if run.is_failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that the interpreter computes in a minute")
    parser.add_argument("--only", choices=["kernels", "models"], help="one part")
    parser.add_argument("--model", choices=MODELS, help="one model's shapes")
    parser.add_argument("--rounds", type=int, default=3, help="of whole models, of which medians are taken")
    parser.add_argument("--repeats", type=int, default=15, help="of kernels, likewise")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, run: Run) -> None:
    import torch
    from gpus.kernels import all_cases
    from gpus.kernels import measure as measure_kernel
    from gpus.models import measure_model
    from gpus.shapes import LLAMA_8B, QWEN_05B, TINY_LLAMA, TINY_QWEN, TINY_SIZES, Sizes
    from gpus.timing import Timer, describe, free_memory, measure_ceilings

    device = torch.device(arguments.device)
    timer = Timer(device, arguments.repeats)
    by_name = dict(
        zip(MODELS, (TINY_LLAMA, TINY_QWEN) if arguments.tiny else (LLAMA_8B, QWEN_05B), strict=True)
    )
    shapes = [by_name[name] for name in MODELS if arguments.model in (None, name)]
    sizes = TINY_SIZES if arguments.tiny else Sizes()
    run.set("machine", describe(device))
    ceilings = measure_ceilings(device, timer, tiny=arguments.tiny)
    run.set("ceilings", {"copy": ceilings.copy, "matmul": ceilings.matmul})
    if arguments.only != "models":
        for shape in shapes:
            for case in all_cases(shape, sizes, device):
                name = f"{case.kernel}, {case.size}"
                run.attempt(name, lambda case=case: run.add_kernel(measure_kernel(case, timer, ceilings)))  # type: ignore[misc]
                free_memory()
    if arguments.only != "kernels":
        for shape in shapes:
            run.attempt(
                shape.name,
                lambda shape=shape: measure_model(  # type: ignore[misc]
                    shape, sizes, device, ceilings, arguments.rounds, run.attempt, run.add_model
                ),
            )
            free_memory()


class Run:
    """Results so far, printed and written to the JSON file as soon as they are known."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._path: Path | None = arguments.json
        self._started = time.perf_counter()
        self.document: dict[str, Any] = {
            "options": {name: value for name, value in vars(arguments).items() if name != "json"},
            "kernels": [],
            "models": [],
            "failures": [],
        }

    @property
    def is_failed(self) -> bool:
        from gpus.models import PEER

        failures = [name for name, _ in self.document["failures"] if not name.endswith(PEER)]
        return bool(failures) or not all(row["ok"] for row in self.document["kernels"])

    def set(self, name: str, value: dict[str, Any]) -> None:
        self.document[name] = value
        print(f"{name}: " + ", ".join(f"{key} {_short(one)}" for key, one in value.items()), flush=True)
        self._write()

    def attempt(self, name: str, function: Callable[[], None]) -> None:
        """Call the function; an exception is reported, and the run continues."""
        try:
            function()
        except Exception as error:  # noqa: BLE001 - one part's failure must not cost the others' results
            traceback.print_exc()
            self.document["failures"].append((name, f"{type(error).__name__}: {error}"[:2000]))
            print(f"FAILED {name}", flush=True)
            self._write()

    def add_kernel(self, row: dict[str, Any]) -> None:
        self.document["kernels"].append(row)
        print(f"[{time.perf_counter() - self._started:4.0f} s] {kernel_line(row)}", flush=True)
        self._write()

    def add_model(self, row: dict[str, Any]) -> None:
        self.document["models"].append(row)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self.document["seconds"] = time.perf_counter() - self._started
            self._path.write_text(json.dumps(self.document, indent=2))

    def print_tables(self) -> None:
        if self.document["kernels"]:
            print(f"\n{'kernel':20} {'size':42}       µs   GB/s TFLOP/s  of floor  error")
        for row in self.document["kernels"]:
            print(kernel_line(row))
        if self.document["models"]:
            print(
                f"\n{'model':14} {'contestant':40} {'batch':10} {'logits':12}  tokens/s  of floor  to logitserve"
            )
        for row in self.document["models"]:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:8.2f}"
            print(
                f"{row['model']:14} {row['contestant']:40} {row['batch']:10} {row['logits']:12} "
                f"{row['tokens per second']:9.1f} {row['fraction']:9.2f} {ratio}"
            )
        for name, error in self.document["failures"]:
            print(f"FAILED {name}: {error.splitlines()[0] if error else ''}")
        print()
        for name in ("machine", "ceilings"):
            self.set(name, self.document[name])
        print(f"{time.perf_counter() - self._started:.0f} s", flush=True)


def kernel_line(row: dict[str, Any]) -> str:
    torch_part = f"  {row['torch']} {row['torch seconds'] * 1e6:.1f} µs" if "torch" in row else ""
    return (
        f"{row['kernel']:20} {row['size']:42} {row['seconds'] * 1e6:8.1f} {row['bytes per second'] / 1e9:6.0f} "
        f"{row['operations per second'] / 1e12:7.1f} {row['fraction']:6.2f} {row['bound'][0]} "
        f"{row['error']:8.1e} {'ok' if row['ok'] else 'FAIL'}{torch_part}"
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
