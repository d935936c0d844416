"""A whole run of benchmarks/gpu.py in Triton's interpreter: it must work on a rented GPU at the first try."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
KERNELS = {
    "paged_prefill",
    "paged_decode",
    "store_kv",
    "rope_and_store",
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "matmul",
    "sample",
    "top_k_logits",
    "gather_logits",
}


@pytest.mark.interpreted
@pytest.mark.timeout(900)
def test_the_gpu_benchmark_checks_every_kernel_and_measures_models_and_their_peer(tmp_path: Path) -> None:
    found = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--model", "qwen", "--rounds", "1", "--repeats", "1"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--json", str(found)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    document = json.loads(found.read_text())
    assert document["failures"] == []
    assert {row["kernel"] for row in document["kernels"]} >= KERNELS
    assert all(row["ok"] and row["seconds"] > 0 for row in document["kernels"])
    measured = {(row["contestant"], row["batch"], row["logits"]) for row in document["models"]}
    assert {
        ("logitserve", "decode 3", "none"),
        ("logitserve", "decode 3", "top-5"),
        ("logitserve", "decode 3", "all, float16"),
        ("logitserve", "prefill", "none"),
        ("logitserve, batch invariant", "decode 1", "none"),
        ("logitserve, batch invariant", "prefill", "none"),
        ("transformers continuous batching, sdpa", "decode 3", "none"),
        ("transformers continuous batching, sdpa", "prefill", "none"),
    } <= measured
