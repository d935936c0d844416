"""Record batches to Parquet, in row groups of bounded bytes."""

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
PLAIN = ("id", "prompt_index", "position", "token_id", "logprob")
"""The columns of one number or name a row; the rest are lists, for which statistics and dictionaries are a waste."""


def row_nbytes(schema: pa.Schema) -> int:
    """Bytes of a row's lists, beside which its other columns are few."""
    return sum(
        field.type.list_size * field.type.value_type.bit_width // 8
        for field in schema
        if pa.types.is_fixed_size_list(field.type)
    )


class ParquetSink:
    """A Parquet file whose row groups depend on its rows alone, not on how they arrive. Holds one group."""

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
            write_statistics=list(PLAIN),
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
    """Join answers, which are Arrow streams in files, in their order. Returns the number of rows.

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
                    sink.write(_labelled(batch, prompt))
                    num_rows += batch.num_rows
    if sink is None:
        pq.write_table(pa.table({}), path)
    return num_rows


def count_rows(spool: Path) -> int:
    """The rows of an answer. Only the heads of its batches are read."""
    with _answer(spool) as reader:
        return sum(batch.num_rows for batch in reader)


@contextlib.contextmanager
def _answer(spool: Path) -> Iterator[pa.RecordBatchStreamReader]:
    """A memory map: the pages of a batch are read where they are used, and dropped under pressure."""
    with pa.memory_map(str(spool)) as source, pa.ipc.open_stream(source) as reader:
        yield reader


def _part_schema(wire: pa.Schema) -> pa.Schema:
    """The wire's columns, with the prompt's id and index in the place of ``sequence``."""
    labels = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
    ]
    return pa.schema([*labels, *(field for field in wire if field.name != "sequence")], wire.metadata)


def _labelled(batch: pa.RecordBatch, prompt: Prompt) -> pa.RecordBatch:
    rows = batch.num_rows
    names = pa.repeat(pa.scalar(prompt.id, pa.string()), rows)
    indices = pa.array(np.full(rows, prompt.index, np.int64))
    columns = [batch.column(name) for name in batch.schema.names if name != "sequence"]
    return pa.RecordBatch.from_arrays([names, indices, *columns], schema=_part_schema(batch.schema))


def read_groups(paths: Iterable[Path], columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of Parquet files, a row group at a time."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=columns).to_batches()


def schema_of(paths: Iterable[Path]) -> pa.Schema | None:
    """The schema of the first part that has columns."""
    for path in paths:
        schema = pq.read_schema(path)
        if len(schema):
            return schema
    return None


def write_parquet(parts: list[Path], schema: pa.Schema, path: Path) -> None:
    """All parts as one file. Holds one row group."""
    with ParquetSink(path, schema) as sink:
        for batch in read_groups(parts):
            sink.write(batch)
