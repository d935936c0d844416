"""Blocks of the wire become arrays, or are refused."""

from __future__ import annotations

import base64
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from logitclient import DecodeError, MissingDependencyError, Rows
from logitclient.rows import decode_block
from numpy.typing import NDArray

VALUES = np.array([[0.5, -2.0, 3.25], [np.inf, -np.inf, 1e-3]], np.float32)


def base64_of(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype("<u2")


def stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def block(**changes: Any) -> dict[str, Any]:
    whole = {"shape": [2, 3], "dtype": "float32", "encoding": "base64", "data": base64_of(VALUES)}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_base64_is_read_bit_by_bit(dtype: str) -> None:
    data = stored(VALUES, dtype)
    rows = decode_block(block(dtype=dtype, data=base64_of(data)))
    assert rows.dtype == dtype
    assert rows.token_ids is None
    assert len(rows) == 2
    expected = data.astype(np.uint32) << 16 if dtype == "bfloat16" else data
    assert np.array_equal(rows.values, expected.view(np.float32) if dtype == "bfloat16" else expected)
    assert rows.values.dtype == (np.float16 if dtype == "float16" else np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("encoding", ["base64", "list"])
def test_chosen_columns_come_with_their_ids(dtype: str, encoding: str) -> None:
    values = np.array([[0.5, -2.0], [4.0, 0.25]], np.float32)
    ids = np.array([[7, 3], [49151, 0]], np.int32)
    written: dict[str, Any] = (
        {"values": base64_of(stored(values, dtype)), "token_ids": base64_of(ids)}
        if encoding == "base64"
        else {"values": values.tolist(), "token_ids": ids.tolist()}
    )
    rows = decode_block({"shape": [2, 2], "dtype": dtype, "encoding": encoding, "offset": 5, **written})
    assert np.array_equal(rows.values, values)
    assert rows.token_ids is not None
    assert rows.token_ids.dtype == np.int32
    assert np.array_equal(rows.token_ids, ids)
    assert rows.offset == 5


def test_a_null_in_a_list_is_what_the_caller_says() -> None:
    written = block(shape=[1, 2], encoding="list", data=[[1.5, None]])
    assert math.isnan(decode_block(written).values[0, 1])
    assert decode_block(written, null=-math.inf).values.tolist() == [[1.5, -math.inf]]


@pytest.mark.parametrize("encoding", ["base64", "list"])
def test_no_rows_keep_their_width(encoding: str) -> None:
    rows = decode_block(block(shape=[0, 3], encoding=encoding, data="" if encoding == "base64" else []))
    assert rows.values.shape == (0, 3)


@pytest.mark.parametrize(
    "malformed",
    [
        None,
        [],
        "text",
        block(shape=None),
        block(shape=[6]),
        block(shape=[2, -3]),
        block(shape=[2.0, 3]),
        block(shape=[True, 6]),
        block(shape=[2, 4]),
        block(shape=[1 << 40, 1 << 40]),
        block(dtype="float64"),
        block(dtype="int32"),
        block(dtype=None),
        block(dtype="float16"),
        block(encoding="hex"),
        block(encoding=None),
        block(data=None),
        block(data=base64_of(VALUES)[:-4]),
        block(data=base64_of(VALUES)[:-1]),
        block(data="*" + base64_of(VALUES)[1:]),
        block(data="é"),
        block(data=[[1, 2, 3], [4, 5, 6]]),
        block(offset=-1),
        block(offset="0"),
        block(values=base64_of(VALUES)),
        block(values=base64_of(VALUES), token_ids=base64_of(np.zeros((2, 2), np.int32))),
        block(encoding="list"),
        block(encoding="list", data=[[1, 2, 3]]),
        block(encoding="list", data=[[1, 2, 3], [4, 5]]),
        block(encoding="list", data=[[1, 2, 3], [4, 5, "x"]]),
        block(encoding="list", data=[[1, 2, 3], [4, 5, 1e300]]),
        block(encoding="list", data=[[1, 2, 3], [4, 5, {}]]),
        block(encoding="list", values=VALUES.tolist()),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2, 3.5]] * 2),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2, -3]] * 2),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2, 1 << 31]] * 2),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2, 1 << 70]] * 2),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2, None]] * 2),
        block(encoding="list", values=[[1, 2, 3]] * 2, token_ids=[[1, 2], [3]]),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(malformed: Any) -> None:
    with pytest.raises(DecodeError):
        decode_block(malformed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_gets_the_wires_dtype_and_bits(dtype: str) -> None:
    data = stored(VALUES, dtype)
    rows = decode_block(block(dtype=dtype, data=base64_of(data)))
    tensor = rows.to_torch()
    assert tensor.dtype == getattr(torch, dtype)
    bits = tensor.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
    assert bits.tobytes() == data.tobytes()


def test_a_tensor_is_a_copy() -> None:
    rows = decode_block(block())
    rows.to_torch().zero_()
    assert np.array_equal(rows.values, VALUES)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"logitclient\[torch\]"):
        Rows(VALUES).to_torch()
