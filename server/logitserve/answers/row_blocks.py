"""Rows of numbers as they go into JSON: base64 of the engine's bytes, or nested lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pybase64
from logitengine.link.messages import Array, LogitsRows
from numpy.typing import NDArray

from logitserve.answers.json_pieces import JsonArray, JsonPieces
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

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are written."""
        return self._values.nbytes + self._token_ids.nbytes

    def finish(self) -> dict[str, Any]:
        """The block, for `json_pieces.dumps`."""
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

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are written."""
        return sum(block.nbytes for block in (self._generated, self._prompt) if block is not None)

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
        self._pieces: list[bytes] = []
        self._rest = b""
        self.nbytes = 0

    def add(self, array: Array) -> None:
        data = memoryview(array.data).cast("B")
        if self._rest:
            data = memoryview(self._rest + bytes(data))
        whole = len(data) - len(data) % 3
        self._pieces.append(pybase64.b64encode(data[:whole]))
        self.nbytes += len(self._pieces[-1])
        self._rest = bytes(data[whole:])

    def finish(self) -> JsonPieces:
        return JsonPieces([b'"', *self._pieces, pybase64.b64encode(self._rest), b'"'])


class _ListColumn:
    """Nested lists, one row at a time."""

    def __init__(self) -> None:
        self._rows = JsonArray()

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def add(self, array: Array) -> None:
        self._rows.extend(to_numpy(array))

    def finish(self) -> JsonPieces:
        return self._rows.finish()


def _column(encoding: Encoding) -> _Base64Column | _ListColumn:
    return _Base64Column() if encoding == "base64" else _ListColumn()


def to_numpy(array: Array) -> NDArray[Any]:
    """The array's numbers in their shape; bfloat16, which numpy lacks, widened to float32."""
    if array.dtype == "bfloat16":
        bits = np.frombuffer(array.data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(array.shape)
    return np.frombuffer(array.data, dtype=np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)
