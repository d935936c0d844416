"""Resolution of a model's name to local files that transformers and the tokenizer can read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.conversions import Conversions
from logitengine.model.checkpoint.files import (
    GGUF_SUFFIX,
    check_directory,
    check_hub_name,
    gguf_path,
    unreachable,
)
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.tokenizer import write_tokenizer
from logitengine.model.int4.tensors import PackedFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with config.json and safetensors, or a .gguf file; and a directory with tokenizer.json.

    Attributes:
        packed: what the files of packed layers say; None for all other models.
    """

    name: str
    path: Path
    tokenizer_path: Path
    packed: PackedFiles | None = field(default=None, compare=False, repr=False)

    @property
    def is_gguf(self) -> bool:
        """Whether ``path`` is a GGUF file."""
        return self.path.suffix == GGUF_SUFFIX


def resolve_checkpoint(model: str, prepared: Path | None = None, *, cache: Path | None = None) -> Checkpoint:
    """Find ``model``: 'smollm2', a directory, a .gguf file, or a hub name. Raises CheckpointError.

    A converted tokenizer is looked for in ``prepared`` and then in ``cache``, by default the user's, where it is
    made if need be.
    """
    conversions = Conversions(prepared, cache)
    gguf = gguf_path(model)
    if gguf is not None:
        return _from_gguf(model, gguf, conversions)
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _from_hub(model)
    packed = check_directory(path)
    return Checkpoint(model, path, _tokenizer_directory(path, conversions), packed)


def _from_hub(name: str) -> Path:
    check_hub_name(name)
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(unreachable(name, error)) from error


def _from_gguf(name: str, path: Path, conversions: Conversions) -> Checkpoint:
    """Convert the tokenizer, which is small, once. The weights stay in the file."""
    header = read_header(path)

    def convert(directory: Path) -> None:
        logger.info("converting the tokenizer of %s, once", path.name)
        started = time.monotonic()
        write_tokenizer(header, directory)
        logger.info(
            "converted the tokenizer of %s",
            path.name,
            extra={"seconds": round(time.monotonic() - started, 1)},
        )

    return Checkpoint(name, path, _converted_tokenizer(conversions, "gguf", path, convert))


def _tokenizer_directory(path: Path, conversions: Conversions) -> Path:
    """Return the model's own directory, or a converted copy if it has only a slow tokenizer."""
    if (path / "tokenizer.json").is_file():
        return path
    source = path / "tokenizer_config.json"

    def convert(directory: Path) -> None:
        # Without the refusal transformers asks the terminal whether to run a checkpoint's code.
        AutoTokenizer.from_pretrained(path, trust_remote_code=False).save_pretrained(directory)

    return _converted_tokenizer(conversions, "tokenizers", source, convert)


def _converted_tokenizer(
    conversions: Conversions, kind: str, source: Path, convert: Callable[[Path], None]
) -> Path:
    """Return the directory of the converted tokenizer. Raises CheckpointError where it cannot be converted."""
    try:
        return conversions.find(kind, source, convert)
    # transformers and tokenizers have no common error for a vocabulary that makes no sense.
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {source} could not be read: {error}") from error
