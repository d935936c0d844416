from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    """Require a CUDA device and compiled kernels for every test here."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        pytest.fail("unset TRITON_INTERPRET: nothing would be compiled")
