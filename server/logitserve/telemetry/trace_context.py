"""W3C Trace Context: the trace that a client says its request belongs to."""

from __future__ import annotations

import re

_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)

LONGEST = 512
"""Longest header that is read."""


def trace_id_of(traceparent: bytes) -> str | None:
    """Return the trace id of a valid ``traceparent`` header, else None.

    Only versions above 00 may have more than the four fields.
    """
    if len(traceparent) > LONGEST:
        return None
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (match[2] is not None and traceparent.startswith(b"00")):
        return None
    return match[1].decode()
