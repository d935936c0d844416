"""A reader of /v1/logits like any Arrow program: pyarrow reads from the socket while the answer arrives."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@contextlib.contextmanager
def open_logits(url: str, **body: Any) -> Iterator[pa.RecordBatchStreamReader]:
    """Open a reader over the live response. The connection closes at the end of the context."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        connection.request("POST", "/v1/logits", json.dumps(body), {"content-type": "application/json"})
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            assert response.headers["content-type"] == "application/vnd.apache.arrow.stream"
            yield pa.ipc.open_stream(pa.PythonFile(response, "r"))
    finally:
        connection.close()


def read_logits(url: str, **body: Any) -> pa.Table:
    """Return the whole answer as one table."""
    with open_logits(url, **body) as reader:
        return reader.read_all()


def matrix(table: pa.Table | pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return a fixed-size list column as [rows, columns]."""
    chunks = getattr(table[name], "chunks", [table[name]])
    width = table.schema.field(name).type.list_size
    return np.concatenate([chunk.flatten().to_numpy().reshape(-1, width) for chunk in chunks])
