"""Resolution of a model's name to local files that transformers and the tokenizer can read."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitengine.errors import CheckpointError
from logitengine.model.conversions import Conversions
from logitengine.model.files import check_directory, check_hub_name, gguf_path, unreachable
from logitengine.model.weight_sources import write_stored_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with config.json and safetensors, and one with tokenizer.json."""

    name: str
    path: Path
    tokenizer_path: Path


def resolve_checkpoint(model: str, prepared: Path | None = None, *, cache: Path | None = None) -> Checkpoint:
    """Find ``model``: 'smollm2', a directory, a .gguf file, or a hub name. Raises CheckpointError.

    A converted copy is looked for in ``prepared`` and then in ``cache``, by default the user's, where it is
    made if need be.
    """
    conversions = Conversions(prepared, cache)
    gguf = gguf_path(model)
    if gguf is not None:
        return _from_gguf(model, gguf, conversions)
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _from_hub(model)
    check_directory(path)
    return Checkpoint(model, path, _tokenizer_directory(path, conversions))


def _from_hub(name: str) -> Path:
    check_hub_name(name)
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(unreachable(name, error)) from error


def _from_gguf(name: str, gguf: Path, conversions: Conversions) -> Checkpoint:
    """Convert once; later starts read the copy. transformers takes 15 s to dequantise and read a vocabulary."""

    def convert(directory: Path) -> None:
        logger.info("converting %s, once", gguf.name)
        started = time.monotonic()
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = model.config.to_dict()
        del config["quantization_config"]
        config["architectures"] = [type(model).__name__]
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        model.generation_config.save_pretrained(directory)
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        for tied in model.all_tied_weights_keys:
            weights.pop(tied, None)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        write_stored_blocks(gguf, model, directory)
        logger.info("converted %s", gguf.name, extra={"seconds": round(time.monotonic() - started, 1)})

    try:
        path = conversions.find("gguf", gguf, convert)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{gguf} could not be read as a GGUF model: {error}") from error
    return Checkpoint(name, path, path)


def _tokenizer_directory(path: Path, conversions: Conversions) -> Path:
    """Return the model's own directory, or a converted copy if it has only a slow tokenizer."""
    if (path / "tokenizer.json").is_file():
        return path
    source = path / "tokenizer_config.json"

    def convert(directory: Path) -> None:
        # Without the refusal transformers asks the terminal whether to run a checkpoint's code.
        AutoTokenizer.from_pretrained(path, trust_remote_code=False).save_pretrained(directory)

    return conversions.find("tokenizers", source, convert)
