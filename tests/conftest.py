"""Fixtures for all tests: the real default model, loaded once, and a tiny random one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton chooses it when transformers imports
# Triton below.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from logitengine.model.checkpoint.resolve import Checkpoint, resolve_checkpoint
from packaged_models import QWEN_CODER, packaged_checkpoint, transformers_directory
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def pytest_configure() -> None:
    # A shell without job control starts background commands with SIGINT ignored, and nohup with SIGHUP. The
    # commands that tests start and send these to would inherit that setting.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """Return the default model's files; the tokenizer is converted once per machine."""
    return resolve_checkpoint("smollm2")


@pytest.fixture(scope="session")
def smollm2_directory(smollm2: Checkpoint) -> Path:
    """Return the default model as transformers reads it from its file, in float32, saved once per machine."""
    return transformers_directory(smollm2)


@pytest.fixture(scope="session")
def smollm2_float32(smollm2_directory: Path) -> PreTrainedModel:
    """Return transformers' own float32 model on the same weights, as the reference."""
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
        smollm2_directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.eval()
    return model


@pytest.fixture(scope="session")
def qwen_coder() -> Checkpoint:
    """Return the files of Qwen2.5-Coder-0.5B-Instruct. Skips where they are not installed or not wanted."""
    return packaged_checkpoint(QWEN_CODER)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: Checkpoint) -> Path:
    """Save a random two-layer Llama with SmolLM2's tokenizer, small enough for a fast start."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((smollm2.tokenizer_path / name).read_bytes())
    return directory
