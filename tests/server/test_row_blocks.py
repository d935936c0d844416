"""Blocks of rows in JSON: every dtype and encoding, whole or in pieces."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.messages import Array, LogitsRows
from logitserve.answers.json_pieces import dumps
from logitserve.answers.row_blocks import BlockWriter
from logitserve.protocol.rows import Encoding

# bfloat16 holds each of these numbers exactly.
VALUES = [[0.5, -2.0, 3.0], [1.5, 0.0, -0.25]]


def array_of(values: Any, dtype: str) -> Array:
    numbers = np.array(values, np.float32)
    if dtype == "bfloat16":
        data = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = numbers.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return Array(dtype, numbers.shape, data)


def written(parts: list[LogitsRows], encoding: Encoding) -> dict[str, Any]:
    """Return the block of these parts as a client parses it."""
    writer = BlockWriter(encoding)
    for part in parts:
        writer.add(part)
    block: dict[str, Any] = orjson.loads(b"".join(dumps(writer.finish())))
    return block


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lists_are_numbers_in_every_dtype(dtype: str) -> None:
    block = written([LogitsRows(values=array_of(VALUES, dtype))], "list")
    assert block == {"shape": [2, 3], "dtype": dtype, "encoding": "list", "data": VALUES}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_base64_is_the_engines_bytes(dtype: str) -> None:
    array = array_of(VALUES, dtype)
    block = written([LogitsRows(values=array)], "base64")
    assert base64.b64decode(block["data"], validate=True) == bytes(array.data)
    assert (block["shape"], block["dtype"]) == ([2, 3], dtype)


def test_numbers_that_json_lacks_are_null() -> None:
    values = [[float("-inf"), float("nan"), 1.0]]
    assert written([LogitsRows(values=array_of(values, "float32"))], "list")["data"] == [[None, None, 1.0]]


def test_chosen_columns_have_ids_and_values_and_no_data() -> None:
    rows = LogitsRows(values=array_of(VALUES, "float32"), token_ids=array_of([[1, 2, 3], [4, 5, 6]], "int32"))
    block = written([rows], "list")
    assert block["token_ids"] == [[1, 2, 3], [4, 5, 6]]
    assert block["values"] == VALUES
    assert "data" not in block


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    width=st.integers(1, 5),
    encoding=st.sampled_from(["base64", "list"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_rows_added_piece_by_piece_are_the_same_block(
    sizes: list[int], width: int, encoding: Encoding, dtype: str
) -> None:
    """Base64 cannot simply join pieces whose bytes are no multiple of three, which are among these."""
    numbers = np.arange(sum(sizes) * width, dtype=np.float32).reshape(-1, width)
    pieces = np.split(numbers, np.cumsum(sizes)[:-1])
    whole = written([LogitsRows(values=array_of(numbers, dtype))], encoding)
    assert written([LogitsRows(values=array_of(piece, dtype)) for piece in pieces], encoding) == whole
