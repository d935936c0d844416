"""A decoder of /v1/logits' Arrow stream: bytes in, batches out. It needs pyarrow, and knows nothing of HTTP.

pyarrow reads streams from blocking files only, and an async client has none. So the bytes are cut into messages here,
and pyarrow is given one whole message at a time. The framing is
https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitclient.errors import DecodeError, MissingDependencyError, StreamError
from logitclient.results import LogitsBatch
from logitclient.rows import FLOATS, STORAGE, Rows, widen

CONTINUATION = b"\xff\xff\xff\xff"
PREFIX_BYTES = 8
LARGEST_METADATA = 16 << 20

# pyarrow raises OSError for a broken flatbuffer. The rest come from columns that are missing or of another type.
MALFORMED = (OSError, AttributeError, KeyError, OverflowError, TypeError, ValueError)


class MessageCutter:
    """A cutter of a stream's bytes into encapsulated messages. It holds no more bytes than it was fed."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = PREFIX_BYTES
        self._has_body_length = False
        self.done = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that ``data`` completes, each with its prefix. Raises DecodeError."""
        self._held += data
        messages = []
        while not self.done and len(self._held) >= self._wanted:
            if self._wanted == PREFIX_BYTES:
                self._read_prefix()
            elif not self._has_body_length:
                self._wanted += _body_length(self._held[PREFIX_BYTES:])
                self._has_body_length = True
            else:
                with memoryview(self._held) as held:
                    messages.append(bytes(held[: self._wanted]))
                del self._held[: self._wanted]
                self._wanted, self._has_body_length = PREFIX_BYTES, False
        return messages

    def _read_prefix(self) -> None:
        (length,) = struct.unpack_from("<i", self._held, 4)
        if self._held[:4] != CONTINUATION or not 0 <= length <= LARGEST_METADATA:
            raise DecodeError("this is no Arrow stream")
        self.done = length == 0
        self._wanted += length


def _body_length(metadata: bytearray) -> int:
    """Return ``bodyLength``, the fourth field of the flatbuffer table Message."""
    try:
        (table,) = struct.unpack_from("<I", metadata, 0)
        (back,) = struct.unpack_from("<i", metadata, table)
        (size,) = struct.unpack_from("<H", metadata, table - back)
        if size <= 10:
            return 0
        (offset,) = struct.unpack_from("<H", metadata, table - back + 10)
        length: int = struct.unpack_from("<q", metadata, table + offset)[0] if offset else 0
    except struct.error as error:
        raise DecodeError(f"an Arrow message is malformed: {error}") from error
    if length < 0:
        raise DecodeError(f"an Arrow message has a body of {length} bytes")
    return length


class ArrowDecoder:
    """A decoder of batches of logits. Making one without pyarrow raises MissingDependencyError."""

    usage = None

    def __init__(self) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise MissingDependencyError("pyarrow", "arrow") from error
        self._pa: Any = pa
        self._cutter = MessageCutter()
        self._schema: Any = None

    def feed(self, data: bytes) -> list[LogitsBatch]:
        """Return the batches that ``data`` completes. Raises DecodeError."""
        batches = []
        for message in self._cutter.feed(data):
            try:
                batch = self._read(message)
            except (self._pa.ArrowException, *MALFORMED) as error:
                raise DecodeError(f"an Arrow message is malformed: {error!r}") from error
            if batch is not None:
                batches.append(batch)
        return batches

    def finish(self) -> None:
        """Check the end. Raises StreamError unless the stream's end marker was read."""
        if not self._cutter.done:
            raise StreamError("the Arrow stream ended before its end marker")

    def _read(self, encapsulated: bytes) -> LogitsBatch | None:
        message = self._pa.ipc.read_message(encapsulated)
        if self._schema is None:
            self._schema = self._pa.ipc.read_schema(message)
            return None
        batch = self._pa.ipc.read_record_batch(message, self._schema)
        batch.validate(full=True)
        return self._batch(batch)

    def _batch(self, batch: Any) -> LogitsBatch:
        metadata = {key.decode(): value.decode() for key, value in (self._schema.metadata or {}).items()}
        dtype = metadata["dtype"]
        if dtype not in FLOATS:
            raise DecodeError(f"the stream's dtype is {dtype!r}, not one of {', '.join(FLOATS)}")
        names = set(batch.schema.names)
        stage = metadata["stage"]
        if stage not in ("raw", "processed"):
            raise DecodeError(f"the stream's stage is {stage!r}")
        token_ids: NDArray[np.int32] | None
        if "top_ids" in names:
            values, token_ids = _matrix(batch["top_logits"]), _integers(_matrix(batch["top_ids"]))
        else:
            values, token_ids = (
                _matrix(batch["logits"]),
                _requested_columns(metadata.get("token_ids"), batch.num_rows),
            )
        hidden = _matrix(batch["hidden_states"]) if "hidden_states" in names else None
        return LogitsBatch(
            sequence=_integers(_column(batch["sequence"])),
            position=_integers(_column(batch["position"])),
            token_id=_integers(_column(batch["token_id"].fill_null(-1))),
            logprob=_column(batch["logprob"].fill_null(float("nan"))).astype(np.float32, copy=False),
            logits=_rows(values, dtype, token_ids),
            hidden_states=None if hidden is None else _rows(hidden, dtype),
            stage=stage,
            batch_invariant=metadata.get("batch_invariant") != "false",
        )


def _rows(stored: NDArray[Any], dtype: str, token_ids: NDArray[np.int32] | None = None) -> Rows:
    if stored.dtype != STORAGE[dtype]:
        raise DecodeError(f"a column holds {stored.dtype}, where the stream's dtype is {dtype}")
    if token_ids is not None and token_ids.shape != stored.shape:
        raise DecodeError(
            f"{list(token_ids.shape)} token ids name the columns of {list(stored.shape)} logits"
        )
    return Rows(widen(stored, dtype), token_ids, dtype=dtype)


def _column(column: Any) -> NDArray[Any]:
    if column.null_count:
        raise DecodeError("a column holds nulls that it may not hold")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=True)
    return values


def _integers(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.int32, casting="safe", copy=False)


def _matrix(column: Any) -> NDArray[Any]:
    """Return a fixed-size list column as [rows, columns], without a copy."""
    if column.null_count:
        raise DecodeError("a list column holds nulls")
    return _column(column.flatten()).reshape(len(column), column.type.list_size)


def _requested_columns(token_ids: str | None, num_rows: int) -> NDArray[np.int32] | None:
    """Return the requested columns of every row [rows, k], which the schema names once."""
    if token_ids is None:
        return None
    ids = np.array(json.loads(token_ids), np.int32)
    return np.broadcast_to(ids, (num_rows, len(ids)))
