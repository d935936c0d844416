"""Rows as an Arrow IPC stream: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from logitengine.link.messages import Array, LogitsRows, LogitsSpec, Logprobs

from logitserve.errors import ApiError
from logitserve.jobs.job import Job
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta

MEDIA_TYPE = "application/vnd.apache.arrow.stream"

TYPES: dict[str, Any] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),  # the bits: Arrow has no such type
    "int32": pa.int32(),
}
SENT_BYTES = 256 << 10
"""Most bytes handed on at once. No more than this is on its way to a slow reader, however long a batch is."""


class ArrowAnswer:
    """An Answer of record batches; the engine's arrays are not copied."""

    nbytes = 0
    tells_errors = False

    def __init__(self, job: Job, logits: LogitsSpec) -> None:
        self.id: str | None = None
        self.media_type = MEDIA_TYPE
        self.inline_bytes = sys.maxsize  # nothing is copied
        self._job = job
        self._has_top = logits.top_k is not None
        self._num_generated = [0] * len(job.requests)
        self._schema = _schema(job, logits)
        self._has_begun = False
        self._pieces = _Pieces()
        self._writer = pa.ipc.new_stream(self._pieces, self._schema)

    def add(self, delta: Delta, counts: Counts) -> Iterator[bytes | memoryview]:  # noqa: ARG002 - as for the end
        """Yield batches of the delta's prompt rows and generated rows.

        The schema precedes the first batch.
        """
        prompt, index = delta.prompt, delta.index
        if prompt is not None and prompt.logits is not None:
            token_ids = self._job.requests[index].prompt_token_ids[prompt.offset + 1 :]
            yield from self._batch(
                index, prompt.offset + 1, token_ids, prompt.logprobs, prompt.logits, prompt.hidden_states
            )
        if delta.logits is not None:
            position = len(self._job.requests[index].prompt_token_ids) + self._num_generated[index]
            yield from self._batch(
                index, position, delta.token_ids, delta.logprobs, delta.logits, delta.hidden_states
            )
        self._num_generated[index] += len(delta.token_ids)

    def end(self, counts: Counts) -> Iterator[bytes | memoryview]:  # noqa: ARG002 - Arrow has no place for them
        """Yield the end-of-stream marker."""
        self._writer.close()
        return self._pieces.take()

    def fill_silence(self) -> Sequence[bytes]:
        """Return the schema, once: the format has no other bytes without meaning."""
        if self._has_begun:
            return ()
        self._has_begun = True
        schema: bytes = self._schema.serialize().to_pybytes()
        self._pieces.skip(len(schema))  # the writer repeats it before its first batch
        return [schema]

    def tell(self, error: ApiError) -> Iterator[bytes | memoryview]:  # noqa: ARG002 - batches cannot tell of an error
        return iter(())

    def _batch(
        self,
        index: int,
        position: int,
        token_ids: Sequence[int],
        logprobs: Logprobs | None,
        logits: LogitsRows,
        hidden_states: Array | None,
    ) -> Iterator[bytes | memoryview]:
        """Yield the batch of rows that predict the tokens from ``position`` on.

        Where tokens are fewer than rows, the last rows have nulls.
        """
        rows = logits.values.shape[0]
        known = [] if logprobs is None else logprobs.token_logprobs
        columns = [
            pa.array(np.full(rows, index, np.int32)),
            pa.array(np.arange(position, position + rows, dtype=np.int32)),
            _padded(token_ids, rows, pa.int32()),
            _padded(known, rows, pa.float32()),
        ]
        if self._has_top and logits.token_ids is not None:
            columns.append(_fixed_lists(logits.token_ids))
        columns.append(_fixed_lists(logits.values))
        if hidden_states is not None:
            columns.append(_fixed_lists(hidden_states))
        self._has_begun = True
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        return self._pieces.take()


class _Pieces:
    """A file for the writer, which keeps the written bytes until they are taken."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes | pa.Buffer] = []
        self._num_skipped = 0

    def write(self, piece: bytes | pa.Buffer) -> int:
        if self._num_skipped:
            rest = bytes(piece)[self._num_skipped :]
            self._num_skipped -= len(piece) - len(rest)
            self._pieces.append(rest)
        else:
            self._pieces.append(piece)
        return len(piece)

    def skip(self, nbytes: int) -> None:
        """Drop the next bytes that are written."""
        self._num_skipped = nbytes

    def flush(self) -> None:
        """Do nothing: the bytes stay until they are taken."""

    def take(self) -> Iterator[bytes | memoryview]:
        """Yield the written bytes, in pieces of SENT_BYTES at most.

        They are joined where they fit one piece, which costs less than sending several. Else short pieces are
        joined, and long ones are views.
        """
        pieces, self._pieces = self._pieces, []
        if sum(map(len, pieces)) <= SENT_BYTES:
            yield b"".join(pieces)
            return
        small: list[bytes | pa.Buffer] = []
        for piece in pieces:
            if len(piece) <= SENT_BYTES // 8:
                small.append(piece)
                continue
            yield b"".join(small)
            small = []
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), SENT_BYTES):
                yield view[start : start + SENT_BYTES]
        yield b"".join(small)


def _schema(job: Job, logits: LogitsSpec) -> pa.Schema:
    info = job.model.info
    metadata = {
        "model": job.model_name,
        "stage": logits.stage,
        "dtype": logits.dtype,
        "positions": logits.positions,
        "system_fingerprint": info.fingerprint,
        "batch_invariant": orjson.dumps(info.batch_invariant),
    }
    fields = [
        pa.field("sequence", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32()),
        pa.field("logprob", pa.float32()),
    ]
    if logits.top_k is not None:
        fields.append(_list_field("top_ids", "int32", logits.top_k))
        fields.append(_list_field("top_logits", logits.dtype, logits.top_k))
    elif logits.token_ids is not None:
        fields.append(_list_field("logits", logits.dtype, len(logits.token_ids)))
        metadata["token_ids"] = orjson.dumps(logits.token_ids)
    else:
        fields.append(_list_field("logits", logits.dtype, info.vocab_size))
    hidden_states = job.requests[0].hidden_states
    if hidden_states is not None:
        fields.append(_list_field("hidden_states", hidden_states.dtype, info.hidden_size))
    return pa.schema(fields, metadata)


def _list_field(name: str, dtype: str, width: int) -> pa.Field:
    return pa.field(name, _list_type(dtype, width), nullable=False)


def _list_type(dtype: str, width: int) -> pa.DataType:
    return pa.list_(pa.field("item", TYPES[dtype], nullable=False), width)


def _padded(values: Sequence[float], rows: int, kind: pa.DataType) -> pa.Array:
    """Return the first ``rows`` values, with nulls where there are fewer."""
    known = list(values[:rows])
    return pa.array([*known, *[None] * (rows - len(known))], kind)


def _fixed_lists(array: Array) -> pa.Array:
    """Return ``array`` [rows, width] as fixed-size lists over its own bytes."""
    rows, width = array.shape
    values = pa.Array.from_buffers(TYPES[array.dtype], rows * width, [None, pa.py_buffer(array.data)])
    return pa.FixedSizeListArray.from_arrays(values, type=_list_type(array.dtype, width))
