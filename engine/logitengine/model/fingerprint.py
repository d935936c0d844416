"""The fingerprint of a loaded model: a digest of all that decides the bits of its rows.

Where rows are batch invariant, two servers with one fingerprint give equal rows for equal token ids. The reverse
need not hold: an edit of a comment in the kernels' sources changes the fingerprint and no bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import logitkernels
import PIL
import torch
import transformers
from logitkernels import Kernels

import logitengine
from logitengine.model.checkpoint.conversions import cache_directory
from logitengine.run.devices import Device

NUM_DIGITS = 16

NOT_NUMERIC = ("_name_or_path", "transformers_version", "architectures")
"""Members of config.json that name where a model comes from."""

SOURCES = {Path(logitkernels.__file__).parent: ("**/*.py", "**/*.cpp", "**/*.h")} | {
    Path(logitengine.__file__).parent / room: ("**/*.py",) for room in ("model", "run", "images", "schedule")
}
"""Folders whose files compute rows, and which of their files do."""

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files that say how images are prepared."""


class WeightsDigest:
    """The digest of a checkpoint's weights and config, computed on a thread while the model loads.

    A file's digest is kept in the user's cache, under its path, size and times.
    """

    @classmethod
    def of_directory(cls, directory: Path) -> WeightsDigest:
        """Return the digest of a Hugging Face directory."""
        processors = [path for name in PROCESSORS if (path := directory / name).is_file()]
        return cls(
            sorted(directory.glob("*.safetensors")),
            json.loads((directory / "config.json").read_bytes()),
            [json.loads(path.read_bytes()) for path in processors],
        )

    def __init__(self, files: Sequence[Path], config: dict[str, Any], processors: Sequence[Any] = ()) -> None:
        """Take the files that hold the weights, what a config says about numbers, and how images are prepared."""
        self._files = files
        self._config = config
        self._processors = processors
        self._digests: Future[list[str]] = Future()
        # A daemon: a model that is refused meanwhile ends the process at once.
        threading.Thread(target=self._compute, name="digest", daemon=True).start()

    def _compute(self) -> None:
        try:
            self._digests.set_result([file_digest(path) for path in self._files])
        except Exception as error:  # noqa: BLE001 - for whoever waits
            self._digests.set_exception(error)

    def result(self) -> str:
        """Wait for the digest. Raises OSError for a file that cannot be read."""
        names = [path.name for path in self._files]
        files = list(zip(names, self._digests.result(), strict=True))
        return digest_of([digest_of_config(self._config), files, *self._processors])


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content. It is computed once for a path, size and time of change."""
    status = path.resolve().stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    identity = f"{path.resolve()}|{status.st_size}|{status.st_ino}|{times}"
    root = cache_directory() / "digests"
    kept = root / hashlib.sha256(identity.encode()).hexdigest()[:24]
    with contextlib.suppress(OSError):
        return kept.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start this time again
        root.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=root, prefix=".draft-")
        with os.fdopen(descriptor, "w") as file_of_digest:
            file_of_digest.write(digest)
        Path(draft).replace(kept)
    return digest


def digest_of_config(config: dict[str, Any]) -> str:
    """Return the digest of what a config decides about numbers."""
    known = {name: value for name, value in config.items() if name not in NOT_NUMERIC}
    return digest_of(known)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(
    weights: str,
    stored_as: str,
    dtype: str,
    kernels: Kernels,
    device: Device,
    *,
    is_fused: bool,
    reads_images: bool = False,
) -> str:
    """Return the fingerprint.

    Args:
        weights: the result of WeightsDigest.
        stored_as: how linear layers store their weights.
        reads_images: whether the model has an image encoder, whose layers are dense and of which torch computes a part.
    """
    facts = [weights, stored_as, dtype, kernels.name, kernels.batch_invariant, is_fused, _sources_digest()]
    facts += [
        torch.__version__,
        transformers.__version__,
        *_machine(
            kernels, device, is_fused=is_fused, has_dense="dense" in stored_as or reads_images, dtype=dtype
        ),
    ]
    if reads_images:
        facts += [PIL.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return f"fp_{digest_of(facts)[:NUM_DIGITS]}"


def _machine(kernels: Kernels, device: Device, *, is_fused: bool, has_dense: bool, dtype: str) -> list[Any]:
    """Return what the machine adds: nothing of its instruction sets where no row depends on them."""
    if device.torch_device.type == "cuda":
        gpu = [torch.cuda.get_device_name(device.torch_device), torch.version.cuda]
        return [*gpu, _triton_version()] if kernels.name == "triton" else gpu
    machine: list[Any] = [platform.machine()]
    if kernels.name != "cpu" or not is_fused:  # torch computes
        machine += [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    if kernels.name == "cpu" and has_dense and dtype == "bfloat16":
        machine.append(kernels.bf16_sums)
    return machine


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in _source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _source_files() -> Iterable[Path]:
    for folder, patterns in SOURCES.items():
        yield from sorted(path for pattern in patterns for path in folder.glob(pattern))


def _triton_version() -> str:
    """Return the version of Triton, whose compiler orders the sums of its kernels."""
    import triton

    found: str = triton.__version__
    return found
