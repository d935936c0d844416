"""Batches of logits out of an Arrow stream's bytes."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logitclient import DecodeError, LogitsBatch, MissingDependencyError, StreamError, operations
from logitclient.arrow import ArrowDecoder
from numpy.typing import NDArray

pa = pytest.importorskip("pyarrow")

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def fixed(values: NDArray[Any]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def columns(values: NDArray[Any]) -> dict[str, Any]:
    count = len(values)
    return {
        "sequence": pa.array(np.zeros(count, np.int32)),
        "position": pa.array(np.arange(1, count + 1, dtype=np.int32)),
        "token_id": pa.array([*range(count - 1), None], pa.int32()),
        "logprob": pa.array([-0.5] * (count - 1) + [None], pa.float32()),
        "logits": fixed(values),
    }


def written(batches: list[dict[str, Any]], **metadata: str) -> bytes:
    sink = io.BytesIO()
    schema = pa.RecordBatch.from_pydict(batches[0]).schema.with_metadata(
        {"model": "m", "stage": "raw", "dtype": "float32", "positions": "prompt", **metadata}
    )
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_arrays(list(batch.values()), schema=schema))
    return sink.getvalue()


def read(data: bytes, size: int | None = None) -> list[LogitsBatch]:
    decoder = ArrowDecoder()
    step = size or len(data)
    batches = [
        batch for start in range(0, len(data), step) for batch in decoder.feed(data[start : start + step])
    ]
    decoder.finish()
    return batches


WHOLE = written([columns(ROWS), columns(ROWS[:2] + 1)])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, len(WHOLE)))
def test_batches_are_read_in_any_pieces(size: int) -> None:
    first, second = read(WHOLE, size)
    assert first.sequence.tolist() == [0, 0, 0, 0]
    assert first.position.tolist() == [1, 2, 3, 4]
    assert first.token_id.tolist() == [0, 1, 2, -1]
    assert first.logprob[:3].tolist() == [-0.5] * 3
    assert np.isnan(first.logprob[3])
    assert np.array_equal(first.logits.values, ROWS)
    assert first.logits.token_ids is None
    assert first.hidden_states is None
    assert len(second) == 2
    assert np.array_equal(second.logits.values, ROWS[:2] + 1)


def test_a_batch_is_given_as_soon_as_it_is_whole() -> None:
    decoder = ArrowDecoder()
    first_end = next(end for end in range(len(WHOLE)) if ArrowDecoder().feed(WHOLE[:end]))
    assert decoder.feed(WHOLE[: first_end - 1]) == []
    assert len(decoder.feed(WHOLE[first_end - 1 : first_end])) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_read_exactly(dtype: str) -> None:
    stored = (ROWS.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else ROWS.astype(dtype)
    (batch,) = read(written([columns(stored) | {"hidden_states": fixed(stored[:, :2])}], dtype=dtype))
    assert batch.logits.dtype == dtype
    assert np.array_equal(batch.logits.values, ROWS)
    assert batch.hidden_states is not None
    assert np.array_equal(batch.hidden_states.values, ROWS[:, :2])
    assert str(batch.logits.to_torch().dtype) == f"torch.{dtype}"


def test_the_top_k_come_with_their_ids() -> None:
    ids = np.array([[4, 2, 9]] * 4, np.int32)
    table = columns(ROWS)
    table |= {"top_ids": fixed(ids), "top_logits": table.pop("logits")}
    (batch,) = read(written([table]))
    assert np.array_equal(batch.logits.values, ROWS)
    assert batch.logits.token_ids is not None
    assert np.array_equal(batch.logits.token_ids, ids)


def test_chosen_columns_are_named_for_every_row() -> None:
    (batch,) = read(written([columns(ROWS)], token_ids="[7, 5, 6]"))
    assert batch.logits.token_ids is not None
    assert batch.logits.token_ids.tolist() == [[7, 5, 6]] * 4


def test_a_batch_tells_what_its_rows_are() -> None:
    (batch,) = read(written([columns(ROWS)]))
    assert (batch.stage, batch.batch_invariant) == ("raw", True)
    (batch,) = read(written([columns(ROWS)], stage="processed", batch_invariant="false"))
    assert (batch.stage, batch.batch_invariant) == ("processed", False)


def test_a_stream_of_no_batches_is_empty() -> None:
    empty = written([columns(ROWS)])
    schema_bytes = 8 + struct.unpack_from("<i", empty, 4)[0]
    assert read(empty[:schema_bytes] + b"\xff\xff\xff\xff\0\0\0\0") == []


@pytest.mark.parametrize("missing", [1, 8, 9, 100, len(WHOLE)])
def test_a_stream_that_was_cut_off_is_told(missing: int) -> None:
    decoder = ArrowDecoder()
    decoder.feed(WHOLE[: len(WHOLE) - missing])
    with pytest.raises(StreamError, match="end marker"):
        decoder.finish()


@pytest.mark.parametrize(
    "data",
    [
        b"<html>nothing of the kind</html>",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\xff\xff\xff\xff\x08\0\0\0" + b"\xf0" * 8,
        b"\xff\xff\xff\xff\x08\0\0\0" + b"\0" * 8,
        WHOLE[: 8 + struct.unpack_from("<i", WHOLE, 4)[0]] * 2,
        written([columns(ROWS)], dtype="float16"),
        written([columns(ROWS)], dtype="float64"),
        written([columns(ROWS)], stage="cooked"),
        written([columns(ROWS)], token_ids="[1,"),
        written([columns(ROWS)], token_ids="[1,2]"),
        written([{name: column for name, column in columns(ROWS).items() if name != "logits"}]),
        written([columns(ROWS) | {"position": pa.array([1, 2, 3, None], pa.int32())}]),
        written([columns(ROWS) | {"position": pa.array([1, 2, 3, 4], pa.int64())}]),
        written([columns(ROWS) | {"logits": pa.array([[1.0], None, None, None], pa.list_(pa.float32(), 1))}]),
        written([columns(ROWS) | {"logits": pa.array(["a", "b", "c", "d"])}]),
    ],
)
def test_what_is_no_stream_of_logits_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        ArrowDecoder().feed(data)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_read_or_refused_but_never_worse(place: int, value: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[place] = value
    with contextlib.suppress(DecodeError, StreamError):
        read(bytes(damaged))


def test_without_pyarrow_the_extra_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    operation = operations.stream_logits("a", None, {})
    with pytest.raises(MissingDependencyError, match=r"logitclient\[arrow\]"):
        operation.decoder()
