"""Every Triton kernel compiles for the named GPUs, without spilling and within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that one block may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

KERNELS = Path(__file__).parents[2] / "kernels" / "logitkernels" / "triton"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_kernels_compile_without_spills_for(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, str(script), str(arch)], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    usages = [json.loads(line) for line in result.stdout.splitlines()]
    spilling = [usage for usage in usages if usage["stack"] or usage["local"]]
    assert not spilling, spilling
    too_large = [usage for usage in usages if usage["shared"] > SHARED_MEMORY[arch]]
    assert not too_large, too_large
    compiled = {usage["kernel"] for usage in usages}
    assert compiled == kernels_in_sources(), "each kernel was compiled in some configuration"


def kernels_in_sources() -> set[str]:
    """Return the names of the functions that are launched. By the project's convention they end in `_kernel`."""
    lines = [line for path in KERNELS.glob("*.py") for line in path.read_text().splitlines()]
    return {line[4 : line.index("(")] for line in lines if line.startswith("def ") and "_kernel(" in line}
