"""The parts of benchmarks/soak.py that judge: memory of two minutes, answers, and the plot of what was sampled."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from soak_load import Received, Request, judge
from soak_processes import Life
from soak_report import memory_check, process_panels, svg

MIB = 1 << 20
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 %d Whatever\r\ncontent-length: 4\r\n\r\n"


def life(mebibytes: list[int]) -> Life:
    """Return a process with a sample every ten seconds from second 0 on."""
    sampled = Life(1, "engine", 4711)
    for number, size in enumerate(mebibytes):
        sampled.seconds.append(10.0 * number)
        sampled.rss.append(size * MIB)
        sampled.pss.append(size * MIB)
        sampled.descriptors.append(20)
    return sampled


@pytest.mark.parametrize(("last", "holds"), [(104, True), (106, False), (96, True), (94, False)])
def test_memory_may_change_by_five_in_a_hundred_after_minute_two(last: int, holds: bool) -> None:
    # The first minute and a single peak count for nothing.
    check = memory_check(life([50] * 6 + [100, 100, 400, 100, 100, 100] + [300] * 6 + [last] * 6), 0, 240)
    assert check is not None
    assert check.holds is holds
    assert f"100.0 MiB, then {last}.0 MiB" in check.found


def test_memory_is_not_judged_when_minute_two_is_the_last_one() -> None:
    assert memory_check(life([100] * 18), 0, 179) is None


def test_minute_two_counts_from_the_last_start() -> None:
    check = memory_check(life([10] * 18 + [100] * 18), 120, 360)
    assert check is not None
    assert check.holds


@pytest.mark.parametrize(
    ("head", "tail", "status", "outcome"),
    [
        (SSE, b"data: {}\n\n\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", 200, "as expected"),
        (SSE, b'data: {"error": {}}\n\n\r\n0\r\n\r\n', 200, "failed: no end of the events"),
        (SSE, b"data: {}\n\n\r\n", 200, "failed: cut off"),
        (JSON % 200, b"{  }", 200, "as expected"),
        (JSON % 200, b"{ ", 200, "failed: cut off"),
        (JSON % 400, b"{  }", 400, "as expected"),
        (JSON % 200, b"{  }", 400, "failed: status 200"),
        (JSON % 502, b"{  }", 200, "failed: status 502"),
        (JSON % 429, b"{  }", 200, "refused with 429"),
        (b"", b"", 200, "failed: status 0"),
    ],
)
def test_an_answer_is_as_expected_only_if_it_is_whole(
    head: bytes, tail: bytes, status: int, outcome: str
) -> None:
    received = Received(head, tail, len(tail))
    assert judge(Request("a kind", "/v1/completions", {}, status), received).startswith(outcome)


def test_the_plot_is_xml_and_names_every_process_once_in_each_panel() -> None:
    second_life = life([90] * 3)
    second_life.seconds = [40.0, 80.0, 90.0]  # it did not run for a while
    root = ET.fromstring(svg(process_panels([life([100] * 4), second_life])))  # noqa: S314 - our own
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [element.text for element in root.iterfind("svg:text", names)]
    assert texts.count("replica 1 engine") == 2
    assert len(root.findall("svg:polyline", names)) == 2 * 3
