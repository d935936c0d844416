"""Metadata of a GGUF file by key, with a record of what was read. Free of torch."""

from __future__ import annotations

import numpy as np

from logitengine.errors import CheckpointError
from logitengine.model.gguf.header import Header, StringArray, Value

IGNORED_PREFIXES = ("general.", "quantize.", "split.", "tokenizer.", "mradermacher.", "prometheus.")
"""Keys that describe the file or its maker, or that the tokenizer's conversion reads."""

IGNORED_KEYS = frozenset(
    {
        # Whether the scaling was trained; the frequencies follow from the type and the factor alone.
        "rope.scaling.finetuned",
        # Layout of tensors in files of old converters, of tensors that are checked by their shapes.
        "tensor_data_layout",
        # How many tokens an image takes; the tower that reads images is a file of its own.
        "mm.tokens_per_image",
    }
)
"""Keys of an architecture that change no logits."""


class Keys:
    """Metadata of the file's architecture, by keys without the architecture's name.

    What is read is remembered, so that a key that nobody read can be refused.
    """

    def __init__(self, header: Header) -> None:
        """Raise CheckpointError for a file that names no architecture."""
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{header.path} is damaged: it has no general.architecture")
        self.architecture = architecture
        self._header = header
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self._name(key) in self._header.metadata

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._header.tensors

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        """Return a whole number from ``least`` on. An array of equal numbers, one a layer, is that number."""
        value = self._single(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._refused(key, f"is no whole number from {least} on")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 on."""
        return self.integer(key, default, 1)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._single(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise self._refused(key, "is no finite number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._single(key, default)
        if not isinstance(value, bool):
            raise self._refused(key, "is neither true nor false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._single(key, default)
        if not isinstance(value, str):
            raise self._refused(key, "is no text")
        return value

    def array(self, key: str) -> list[int | float | bool] | None:
        """Return the numbers of an array; None if the key is missing or holds no array."""
        value = self._header.metadata.get(self._name(key))
        if not isinstance(value, np.ndarray):
            return None
        self._read.add(self._name(key))
        found: list[int | float | bool] = value.tolist()
        return found

    def must_be(self, key: str, *expected: Value) -> None:
        """Refuse a file in which the key has another value; it may be missing."""
        if self.has(key) and self._single(key, None) not in expected:
            raise self._refused(
                key, f"is not {' or '.join(map(str, expected))}, which is all that is supported"
            )

    def token_id(self, key: str) -> int | None:
        """Return the id of a special token of ``tokenizer.ggml``; None if the file names none."""
        value = self._header.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not int:
            raise self.damaged(f"tokenizer.ggml.{key} is no token's id")
        return value

    def check_all_read(self) -> None:
        """Refuse a file with a key that nobody read and that is not known to be harmless."""
        for name in self._header.metadata:
            short = name.removeprefix(f"{self.architecture}.")
            if name in self._read or name.startswith(IGNORED_PREFIXES) or short in IGNORED_KEYS:
                continue
            raise CheckpointError(
                f"{self._header.path} cannot be served: its metadata key {name} is not known here for architecture "
                f"{self.architecture}, and might change the logits"
            )

    def damaged(self, why: str) -> CheckpointError:
        """Return the error that refuses a file whose numbers do not fit each other."""
        return CheckpointError(f"{self._header.path} is damaged: {why}")

    def _single(self, key: str, default: Value | None) -> Value:
        name = self._name(key)
        self._read.add(name)
        value = self._header.metadata.get(name, default)
        if value is None:
            raise CheckpointError(f"{self._header.path} is damaged: its metadata lacks {name}")
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise self._refused(key, "differs from layer to layer, which is not supported")
            first: Value = value[0].item()
            return first
        if isinstance(value, StringArray):
            raise self._refused(key, "is an array of strings")
        return value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _refused(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._header.path} cannot be served: {self._name(key)} {why}")
