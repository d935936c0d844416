"""Stop strings, which cut a text in the same place wherever the borders of tokens fall."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitserve.text.stop_strings import StopStrings, ThinkingGate

# A small alphabet makes matches, near matches and overlaps common.
texts = st.text(alphabet="abé", max_size=30)
stop_lists = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=4)


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut the text before the stop string that ends first, and before the longest of those that end there."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            longest = max(whole, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in pairwise(borders)]


@given(texts, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_the_cut_is_the_naive_one_for_every_split_of_the_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopStrings(stops)
    released = "".join(matcher.push(piece) for piece in pieces_of(text, cuts)) + matcher.finish()
    assert (released, matcher.matched) == naive_cut(text, stops)


@given(texts, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    released = "".join(matcher.push(character) for character in text)
    if matcher.matched is None:
        held = text[len(released) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_text_passes_through_at_once() -> None:
    matcher = StopStrings([])
    assert matcher.push("anything") == "anything"
    assert matcher.finish() == ""


def test_nothing_comes_after_a_match() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("one E") == "one "
    assert matcher.push("ND two") == ""
    assert matcher.matched == "END"
    assert matcher.push("three") == matcher.finish() == ""


def through_gate(pieces: list[str], *, is_open: bool) -> tuple[str, str]:
    gate = ThinkingGate("<think>", "</think>", is_open=is_open)
    told = [gate.split(piece) for piece in pieces]
    return "".join(thinking for thinking, _ in told), "".join(rest for _, rest in told) + gate.finish()


@pytest.mark.parametrize(
    ("text", "is_open", "thinking"),
    [
        ("<think>a</think>b</think>", False, "<think>a</think>"),
        (" \n<think>a</think>b", False, " \n<think>a</think>"),
        ("a</think>b", True, "a</think>"),
        ("a</think", True, "a</think"),
        ("a<think>b</think>", False, ""),
        ("<thin", False, ""),
        ("<thinking></think>", False, ""),
        (" " * 17 + "<think>a</think>", False, ""),
        ("", False, ""),
    ],
)
def test_the_thinking_ends_with_its_closing_string(text: str, is_open: bool, thinking: str) -> None:
    for pieces in ([text], list(text)):
        assert through_gate(pieces, is_open=is_open) == (thinking, text.removeprefix(thinking))


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", ">", " ", "a"]), max_size=12
    ),
    is_open=st.booleans(),
)
def test_the_end_of_the_thinking_does_not_depend_on_how_the_text_was_cut(
    pieces: list[str], is_open: bool
) -> None:
    whole = through_gate(["".join(pieces)], is_open=is_open)
    assert through_gate(pieces, is_open=is_open) == whole
    assert through_gate(list("".join(pieces)), is_open=is_open) == whole
