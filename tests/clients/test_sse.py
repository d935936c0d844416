"""Events out of bytes, however the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logitclient.sse import Event, SSEDecoder

TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
LINE_END = st.sampled_from([b"\n", b"\r", b"\r\n"])
NOISE = st.sampled_from([b":", b": keep-alive", b"id: 7", b"retry: 10", b"unknown: x", b"nonsense"])


def decode(pieces: list[bytes]) -> list[Event]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(bounds)]


@st.composite
def written_events(draw: st.DrawFn) -> tuple[list[Event], bytes]:
    """Events, and one of the ways to write them."""
    events = []
    # One kind for a whole stream: "\r" and "\n" on two lines of their own cannot be told from one end.
    line_end = draw(LINE_END)
    written = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    for _ in range(draw(st.integers(0, 4))):
        lines = draw(st.lists(TEXT, min_size=1, max_size=3))
        name = draw(st.sampled_from(["", "message", "delta"]))
        fields = [f"event: {name}".encode()] if name else []
        space = draw(st.sampled_from(["", " "]))
        for line in lines:
            # One leading space is the format's, not the value's.
            fields += [f"data:{' ' if line.startswith(' ') else space}{line}".encode()]
        fields.insert(draw(st.integers(0, len(fields))), draw(NOISE))
        written += b"".join(field + line_end for field in fields)
        written += line_end
        events.append(Event("\n".join(lines), name or "message"))
    return events, written


@settings(deadline=None)
@given(written_events(), st.lists(st.integers(0, 500), max_size=12))
def test_what_was_written_is_read_in_any_pieces(case: tuple[list[Event], bytes], places: list[int]) -> None:
    events, written = case
    assert decode(cut(written, places)) == events


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([b"data", b":", b" ", b"\r", b"\n", b"\r\n", b"x", b"\xc3", b"\xa9"]), max_size=40
    ),
    st.lists(st.integers(0, 200), max_size=20),
)
def test_pieces_never_change_what_is_read(parts: list[bytes], places: list[int]) -> None:
    data = b"".join(parts)
    assert decode(cut(data, places)) == decode([data])


def test_single_bytes_spell_an_event() -> None:
    data = "event: delta\r\ndata: é\r\ndata:  two\r\n\r\n".encode()
    assert decode([data[i : i + 1] for i in range(len(data))]) == [Event("é\n two", "delta")]


def test_an_event_is_given_as_soon_as_its_blank_line_begins() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\r\n") == []
    assert decoder.feed(b"\r") == [Event("a")]
    assert decoder.feed(b"\ndata: b\n\n") == [Event("b")]


@pytest.mark.parametrize(
    "data", [b"\n\n", b": only a comment\n\n", b"event: x\n\n", b"data: unfinished", b"data: x\n"]
)
def test_what_is_no_event_gives_none(data: bytes) -> None:
    assert decode([data]) == []


def test_bytes_that_are_no_utf8_are_replaced() -> None:
    assert decode([b"data: \xff\n\n"]) == [Event("\ufffd")]


def test_a_field_without_a_colon_has_an_empty_value() -> None:
    assert decode([b"data\ndata\n\n"]) == [Event("\n")]


def test_the_end_marker_is_known() -> None:
    assert [event.is_done for event in decode([b"data: x\n\ndata: [DONE]\n\n"])] == [False, True]
