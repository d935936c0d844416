"""Rows of numbers as they go into JSON: base64 of the engine's bytes, or nested lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pybase64
from logitengine.link.messages import Array, LogitsRows
from numpy.typing import NDArray

from logitserve.protocol.rows import Encoding


class BlockWriter:
    """Rows of one block, encoded as they come, so that an answer holds them once and encoded.

    The block is ``{"shape", "dtype", "encoding", "data"}``, or with chosen columns ``"token_ids"`` and ``"values"``
    instead of ``"data"``, all [rows, k]. Numbers that JSON lacks are null under "list".
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._values = _column(encoding)
        self._token_ids = _column(encoding)
        self._num_rows = 0
        self._width = 0
        self._dtype = ""
        self._has_columns = False

    def add(self, rows: LogitsRows) -> None:
        """Append rows: [rows, V], or [rows, k] with their columns."""
        count, self._width = rows.values.shape
        self._num_rows += count
        self._dtype = rows.values.dtype
        self._values.add(rows.values)
        if rows.token_ids is not None:
            self._has_columns = True
            self._token_ids.add(rows.token_ids)

    def finish(self) -> dict[str, Any]:
        """The block. Its large members are orjson fragments."""
        block: dict[str, Any] = {
            "shape": [self._num_rows, self._width],
            "dtype": self._dtype,
            "encoding": self._encoding,
        }
        if self._has_columns:
            block["token_ids"] = self._token_ids.finish()
            block["values"] = self._values.finish()
        else:
            block["data"] = self._values.finish()
        return block


class RowBlocks:
    """The rows of one choice, logits or hidden states: ``{"generated": block, "prompt": {**block, "offset"}}``."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._generated: BlockWriter | None = None
        self._prompt: BlockWriter | None = None
        self._offset = 0

    @property
    def is_empty(self) -> bool:
        return self._generated is None and self._prompt is None

    def add_generated(self, rows: LogitsRows) -> None:
        if self._generated is None:
            self._generated = BlockWriter(self._encoding)
        self._generated.add(rows)

    def add_prompt(self, rows: LogitsRows, offset: int) -> None:
        """Append prompt rows, the first of them at position ``offset``."""
        if self._prompt is None:
            self._prompt, self._offset = BlockWriter(self._encoding), offset
        self._prompt.add(rows)

    def finish(self) -> dict[str, Any]:
        """The blocks that have rows."""
        blocks: dict[str, Any] = {}
        if self._generated is not None:
            blocks["generated"] = self._generated.finish()
        if self._prompt is not None:
            blocks["prompt"] = {**self._prompt.finish(), "offset": self._offset}
        return blocks


class _Base64Column:
    """Base64 of several arrays end to end: what does not fill three bytes waits for the next."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._rest = b""

    def add(self, array: Array) -> None:
        data = memoryview(array.data).cast("B")
        if self._rest:
            data = memoryview(self._rest + bytes(data))
        whole = len(data) - len(data) % 3
        self._parts.append(pybase64.b64encode(data[:whole]))
        self._rest = bytes(data[whole:])

    def finish(self) -> orjson.Fragment:
        return orjson.Fragment(b"".join([b'"', *self._parts, pybase64.b64encode(self._rest), b'"']))


class _ListColumn:
    """Nested lists, one row at a time."""

    def __init__(self) -> None:
        self._rows: list[bytes] = []

    def add(self, array: Array) -> None:
        for row in to_numpy(array):
            self._rows.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))

    def finish(self) -> orjson.Fragment:
        return orjson.Fragment(b"[" + b",".join(self._rows) + b"]")


def _column(encoding: Encoding) -> _Base64Column | _ListColumn:
    return _Base64Column() if encoding == "base64" else _ListColumn()


def to_numpy(array: Array) -> NDArray[Any]:
    """The array's numbers in their shape; bfloat16, which numpy lacks, widened to float32."""
    if array.dtype == "bfloat16":
        bits = np.frombuffer(array.data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(array.shape)
    return np.frombuffer(array.data, dtype=np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)
