"""Compiles the Triton kernels for an architecture without its GPU: python compile_kernels.py ARCH [--all].

Every operation is called as the engine calls it, on tensors without storage, and launches are replaced by
compilations. Prints a JSON line for each kernel: the call, its registers, and its bytes of stack and local
memory (spills) and of shared memory. Must run without TRITON_INTERPRET. ``--all`` combines all choices
instead of covering each one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from logitkernels import AttentionMetadata, AttentionOptions
from logitkernels.sampling import SamplingSize
from logitkernels.triton import TritonKernels
from logitkernels.triton.matmul import matmul
from logitkernels.triton.rms_norm import add_rms_norm, rms_norm
from logitkernels.triton.store_kv import rope_and_store
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (16, 16), (32, 32))
GROUPS = (1, 3, 4, 7, 8, 16)
BLOCK_SIZES = (8, 16, 32, 64)
VOCABULARIES = (320, 49152, 128256, 151936, 262144)
WEIGHTS = (
    (1152, 896),
    (896, 896),
    (896, 4864),
    (6144, 4096),
    (4096, 14336),
    (28672, 4096),
    (128256, 4096),
    (320, 64),
)

Call = tuple[str, Callable[[], object]]


class OfflineDriver:
    """Parts of a driver that compilation needs."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0


@dataclass(frozen=True, slots=True)
class Usage:
    kernel: str
    call: str
    registers: int
    stack: int
    local: int
    shared: int


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_calls(*, everything: bool) -> Iterator[Call]:
    """Calls of both kernels for a mixed batch."""
    options: list[dict[str, Any]] = [{}, {"sliding_window": 512, "softcap": 30.0, "sinks": True}]
    if everything:
        cases = list(product(HEADS, DTYPES, GROUPS, BLOCK_SIZES, options, (False, True)))
    else:
        cases = [
            (heads, dtype, 4, 16, chosen, False)
            for heads, dtype, chosen in product(HEADS[:6], (torch.bfloat16, torch.float32), options)
            if not chosen or dtype == torch.bfloat16
        ]
        cases += [(HEADS[3], torch.float16, group, 16, options[0], False) for group in (1, 7)]
        cases += [(HEADS[3], torch.bfloat16, 8, size, options[0], False) for size in (8, 32)]
        cases += [(heads, dtype, 4, 16, options[0], True) for heads in HEADS[3:6:2] for dtype in DTYPES[::2]]
    for (size, value_size), dtype, group, block_size, chosen, invariant in cases:
        name = f"attention D={size} Dv={value_size} {dtype} group={group} block={block_size} {chosen} {invariant=}"
        yield name, partial(attend, size, value_size, dtype, group, block_size, chosen, invariant=invariant)


def attend(
    size: int,
    value_size: int,
    dtype: torch.dtype,
    group: int,
    block_size: int,
    options: dict[str, Any],
    *,
    invariant: bool,
) -> None:
    kv_heads, sequences, tokens = 8, 32, 512
    options = {**options, "sinks": empty(kv_heads * group)} if options.get("sinks") else options
    TritonKernels(batch_invariant=invariant).paged_attention(
        empty(tokens, kv_heads * group, size, dtype=dtype),
        empty(1024, kv_heads, block_size, size, dtype=dtype),
        empty(1024, kv_heads, block_size, value_size, dtype=dtype),
        AttentionMetadata(
            query_start=empty(sequences + 1, dtype=torch.int32),
            seq_lens=empty(sequences, dtype=torch.int32),
            block_tables=empty(sequences, 256, dtype=torch.int32),
            slot_mapping=empty(tokens, dtype=torch.int64),
            max_query_len=128,
            max_seq_len=256 * block_size,
        ),
        AttentionOptions(0.1, **options),
    )


def pointwise_calls(*, everything: bool) -> Iterator[Call]:
    kernels = TritonKernels()
    sizes = (64, 576, 896, 4096, 16384) if everything else (896, 4096, 16384)
    for n, dtype in product(sizes, DTYPES):
        x, weight = empty(512, n, dtype=dtype), empty(n)
        yield f"rms_norm {n} {dtype}", partial(rms_norm, empty(512, n), weight, 1e-5, dtype)
        yield f"rms_norm {n} {dtype} alone", partial(rms_norm, x, weight, 1e-5, dtype)
        yield f"add_rms_norm {n} {dtype}", partial(add_rms_norm, empty(512, n), x, weight, 1e-5, dtype)
        gate_up = empty(512, 2 * n, dtype=dtype)
        yield f"silu_and_mul {n} {dtype}", partial(kernels.silu_and_mul, gate_up)
        yield f"gelu_and_mul {n} {dtype}", partial(kernels.gelu_and_mul, gate_up)
    blocks = BLOCK_SIZES if everything else (16,)
    for (size, value_size), dtype, block_size, norms in product(HEADS, DTYPES, blocks, (False, True)):
        name = f"{size} {dtype} block={block_size} {norms=}"
        yield f"rope_and_store {name}", partial(store, size, dtype, block_size, norms=norms)
        if not norms:
            key, value = empty(512, 8, size, dtype=dtype), empty(512, 8, value_size, dtype=dtype)
            caches = (
                empty(64, 8, block_size, size, dtype=dtype),
                empty(64, 8, block_size, value_size, dtype=dtype),
            )
            slots = empty(512, dtype=torch.int64)
            yield f"store_kv {name}", partial(kernels.store_kv, key, value, *caches, slots)


def store(size: int, dtype: torch.dtype, block_size: int, *, norms: bool) -> None:
    heads = empty(512, 48, size, dtype=dtype)
    query, key, value = heads.split([32, 8, 8], dim=1)
    norm = empty(size) if norms else None
    caches = (empty(64, 8, block_size, size, dtype=dtype), empty(64, 8, block_size, size, dtype=dtype))
    tables = (empty(512, size), empty(512, size))
    slots = empty(512, dtype=torch.int64)
    rope_and_store(query, key, value, *tables, *caches, slots, q_norm=norm, k_norm=norm, eps=1e-6)


def matmul_calls(*, everything: bool) -> Iterator[Call]:
    for (n, k), dtype, bias in product(WEIGHTS, DTYPES, (False, True)):
        if everything or not bias or (n, k) == WEIGHTS[0]:
            weight = empty(n, k, dtype=dtype)
            yield (
                f"matmul {n}x{k} {dtype} {bias=}",
                partial(matmul, empty(64, k, dtype=dtype), weight, empty(n, dtype=dtype) if bias else None),
            )


def logits_calls(*, everything: bool) -> Iterator[Call]:
    kernels = TritonKernels()
    for vocabulary in VOCABULARIES if everything else VOCABULARIES[:3]:
        logits = empty(16, vocabulary)
        for k in (1, 20, 200):
            yield f"top_k_logits {vocabulary} {k}", partial(kernels.top_k_logits, logits, k)
        yield (
            f"gather_logits {vocabulary}",
            partial(kernels.gather_logits, logits, empty(16, 3, dtype=torch.int64)),
        )
        for has_masks in (False, True):
            yield f"sample {vocabulary} {has_masks=}", partial(draw_rows, vocabulary, has_masks=has_masks)


def draw_rows(vocabulary: int, *, has_masks: bool) -> None:
    size = SamplingSize(num_rows=16, num_edits=64, has_masks=has_masks)
    prepared = TritonKernels().prepare_sampling([], vocabulary, size=size)
    tensors = {name: empty(*array.shape, dtype=torch.int32) for name, array in prepared.arrays.items()}
    prepared.draw(empty(16, vocabulary), tensors, empty(16, dtype=torch.int32))


def all_calls(*, everything: bool) -> list[Call]:
    parts = (attention_calls, pointwise_calls, matmul_calls, logits_calls)
    return [call for part in parts for call in part(everything=everything)]


def compile_call(arch: int, index: int, *, everything: bool) -> list[Usage]:
    """Return the resources of each kernel that the call launches."""
    name, call = all_calls(everything=everything)[index]
    driver.set_active(OfflineDriver(arch))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return [usage_of(kernel, name) for kernel in compiled]


def usage_of(kernel: Any, call: str) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(kernel.name, call, found["REG"], found["STACK"], found["LOCAL"], kernel.metadata.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, help="80, 90 or 100")
    parser.add_argument("--all", action="store_true", help="every combination")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    count = len(all_calls(everything=arguments.all))
    work = partial(compile_call, arguments.arch, everything=arguments.all)
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for usages in pool.map(work, range(count), chunksize=4):
            for usage in usages:
                print(json.dumps({name: getattr(usage, name) for name in Usage.__slots__}), flush=True)


if __name__ == "__main__":
    main()
