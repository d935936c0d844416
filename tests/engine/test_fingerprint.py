"""The fingerprint of a loaded model: alike where all bits are decided alike, another where anything differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.model.fingerprint import file_digest, fingerprint
from logitengine.model.loader import load
from logitengine.run.devices import choose_device
from logitkernels.cpu import CpuKernels
from safetensors.torch import load_file, save_file
from tiny_models import save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), vocab_size=64)


def fingerprint_of(path: Path, **options: Any) -> str:
    defaults = {"dtype": "float32", "num_blocks": 16, "num_threads": 1}
    return load(EngineConfig.model_validate({"model": str(path), **defaults, **options})).info.fingerprint


def copy_of(llama: Path, directory: Path) -> Path:
    shutil.copytree(llama, directory)
    return directory


def test_what_changes_no_row_changes_no_fingerprint(llama: Path, tmp_path: Path) -> None:
    expected = fingerprint_of(llama)
    assert expected.startswith("fp_")
    assert fingerprint_of(llama) == expected
    sizes = {"num_blocks": 32, "block_size": 8, "max_model_len": 100, "num_threads": 2, "max_num_seqs": 3}
    assert fingerprint_of(llama, **sizes) == expected
    copy = copy_of(llama, tmp_path / "elsewhere")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "transformers_version": "9", "_name_or_path": "x"})
    )
    assert fingerprint_of(copy) == expected


def test_whatever_may_change_a_row_changes_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    changed_config = copy_of(llama, tmp_path / "config")
    config = json.loads((llama / "config.json").read_text())
    (changed_config / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed_weight = copy_of(llama, tmp_path / "weight")
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, changed_weight / "model.safetensors", metadata={"format": "pt"})
    found = [
        fingerprint_of(llama),
        fingerprint_of(changed_config),
        fingerprint_of(changed_weight),
        fingerprint_of(llama, dtype="bfloat16"),
        fingerprint_of(llama, weights="int8"),
        fingerprint_of(llama, kernels="reference"),
    ]
    assert len(set(found)) == len(found)


def test_instruction_sets_matter_where_the_processor_sums_in_its_own_order(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "weights": "int8"}]
    found = []
    for order in ("ONE_BY_ONE", "IN_PAIRS"):
        monkeypatch.setattr(CpuKernels, "bf16_sums", order)
        found.append([fingerprint_of(llama, **case) for case in cases])
    assert [a == b for a, b in zip(*found, strict=True)] == [True, False, True]


def test_instruction_sets_matter_for_the_dense_layers_of_an_image_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels, device = CpuKernels(), choose_device("cpu")
    found = []
    for order in ("IN_PAIRS", "IN_TILES"):
        monkeypatch.setattr(CpuKernels, "bf16_sums", order)
        found.append(
            [
                fingerprint(
                    "w", "int8 (Q8_0)", "bfloat16", kernels, device, is_fused=True, reads_images=images
                )
                for images in (False, True)
            ]
        )
    assert [a == b for a, b in zip(*found, strict=True)] == [True, False]


def test_a_files_digest_is_computed_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    (kept,) = (tmp_path / "cache" / "logitserve" / "digests").iterdir()
    kept.write_text("kept")
    assert file_digest(path) == "kept"
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    (tmp_path / "weights").write_bytes(b"one")
    assert file_digest(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()


def test_equal_fingerprints_come_with_equal_bits(llama: Path, tmp_path: Path) -> None:
    copy = copy_of(llama, tmp_path / "copy")
    one, other = (
        load(EngineConfig(model=str(path), dtype="float32", num_blocks=16)) for path in (llama, copy)
    )
    assert one.info.fingerprint == other.info.fingerprint
    hidden = torch.randn(3, one.info.hidden_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.runner.head(hidden), other.runner.head(hidden))
