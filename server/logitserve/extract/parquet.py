"""Parquet files of record batches, in row groups of bounded bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitserve.extract.prompts import Prompt

GROUP_BYTES = 16 << 20
GROUP_ROWS = 1 << 16
SCALAR_COLUMNS = ("id", "prompt_index", "position", "token_id", "logprob")
"""Columns with one value a row. The others are lists, which gain nothing from statistics."""


def row_nbytes(schema: pa.Schema) -> int:
    """Return the bytes of a row's lists. The other columns are small beside them."""
    return sum(
        field.type.list_size * field.type.value_type.bit_width // 8
        for field in schema
        if pa.types.is_fixed_size_list(field.type)
    )


class ParquetSink:
    """A Parquet file whose row groups depend on its rows alone, not on how they arrive. Memory holds one group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._group_rows = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, row_nbytes(schema))))
        self._pending: list[Any] = []
        self._num_pending = 0
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=["id"],
            write_statistics=list(SCALAR_COLUMNS),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            self._flush()
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            room = self._group_rows - self._num_pending
            taken = batch.slice(0, room)
            self._pending.append(taken)
            self._num_pending += taken.num_rows
            batch = batch.slice(taken.num_rows)
            if self._num_pending == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=self._num_pending)
            self._pending, self._num_pending = [], 0


def write_part(answers: Iterable[tuple[Prompt, Path]], path: Path) -> int:
    """Write answers, which are Arrow streams in files, as one part. Return the number of rows.

    Without any answer the part has no columns.
    """
    num_rows = 0
    sink: ParquetSink | None = None
    with contextlib.ExitStack() as stack:
        for prompt, spool in answers:
            with _answer(spool) as reader:
                if sink is None:
                    sink = stack.enter_context(ParquetSink(path, _part_schema(reader.schema)))
                for batch in reader:
                    sink.write(_with_labels(batch, prompt))
                    num_rows += batch.num_rows
    if sink is None:
        pq.write_table(pa.table({}), path)
    return num_rows


def count_rows(spool: Path) -> int:
    """Return the number of rows of an answer. Only the heads of its batches are read."""
    with _answer(spool) as reader:
        return sum(batch.num_rows for batch in reader)


@contextlib.contextmanager
def _answer(spool: Path) -> Iterator[pa.RecordBatchStreamReader]:
    """Yield a reader of an answer. The file is mapped: its pages are read as they are used, and dropped under pressure."""
    with pa.memory_map(str(spool)) as source, pa.ipc.open_stream(source) as reader:
        yield reader


def _part_schema(wire: pa.Schema) -> pa.Schema:
    """Return the schema of a part: the wire's, with the prompt's id and index in the place of ``sequence``."""
    labels = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
    ]
    return pa.schema([*labels, *(field for field in wire if field.name != "sequence")], wire.metadata)


def _with_labels(batch: pa.RecordBatch, prompt: Prompt) -> pa.RecordBatch:
    rows = batch.num_rows
    names = pa.repeat(pa.scalar(prompt.id, pa.string()), rows)
    indices = pa.array(np.full(rows, prompt.index, np.int64))
    columns = [batch.column(name) for name in batch.schema.names if name != "sequence"]
    return pa.RecordBatch.from_arrays([names, indices, *columns], schema=_part_schema(batch.schema))


def read_groups(paths: Iterable[Path], columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of Parquet files, a row group at a time."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=columns).to_batches()


def schema_of(paths: Iterable[Path]) -> pa.Schema | None:
    """Return the schema of the first part that has columns, or None."""
    for path in paths:
        schema = pq.read_schema(path)
        if len(schema):
            return schema
    return None


def write_parquet(parts: list[Path], schema: pa.Schema, path: Path) -> None:
    """Write all parts as one file. Memory holds one row group."""
    with ParquetSink(path, schema) as sink:
        for batch in read_groups(parts):
            sink.write(batch)
