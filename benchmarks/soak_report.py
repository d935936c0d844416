"""A soak's verdict, table and plot."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from soak_processes import Life

MINUTE = 60.0
GAP_SECONDS = 12
TOLERANCE = 0.05
MIB = 1 << 20

WIDTH, PANEL_HEIGHT, LEFT, RIGHT, GAP = 960, 170, 70, 190, 46
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


@dataclass(frozen=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    holds: bool
    found: str


def median_between(life: Life, start: float, end: float) -> float | None:
    """Return the median resident bytes of the samples in [start, end), or None if there are none."""
    chosen = [rss for second, rss in zip(life.seconds, life.rss, strict=True) if start <= second < end]
    return statistics.median(chosen) if chosen else None


def memory_check(life: Life, begin: float, end: float) -> Check | None:
    """Compare the last minute before ``end`` with the second one after ``begin``; None if they are not apart."""
    if begin + 2 * MINUTE > end - MINUTE:
        return None
    early = median_between(life, begin + MINUTE, begin + 2 * MINUTE)
    late = median_between(life, end - MINUTE, end)
    if early is None or late is None:
        return Check(f"{life.name}: resident memory", holds=False, found="no samples")
    change = late / early - 1
    found = f"{early / MIB:.1f} MiB, then {late / MIB:.1f} MiB: {100 * change:+.1f} %"
    return Check(f"{life.name}: resident memory", abs(change) <= TOLERANCE, found)


def descriptor_check(life: Life, expected: int, found: int) -> Check:
    return Check(f"{life.name}: descriptors at rest", expected == found, f"{expected}, then {found}")


def print_table(checks: list[Check], counts: dict[str, dict[str, int]]) -> None:
    outcomes = sorted({outcome for by_outcome in counts.values() for outcome in by_outcome})
    print("\n| requests | " + " | ".join(outcomes) + " |")
    print("|---" * (len(outcomes) + 1) + "|")
    for kind, by_outcome in sorted(counts.items()):
        print(f"| {kind} | " + " | ".join(str(by_outcome.get(outcome, 0)) for outcome in outcomes) + " |")
    print("\n| check | found | holds |")
    print("|---|---|---|")
    for check in checks:
        print(f"| {check.name} | {check.found} | {'yes' if check.holds else 'NO'} |")


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line]


def process_panels(lives: list[Life]) -> list[Panel]:
    """Return resident MiB and descriptors; the lives of one role have one colour."""
    colours = dict(zip(dict.fromkeys(life.name for life in lives), COLOURS, strict=False))
    return [
        Panel(
            "resident memory, MiB",
            [
                Line(life.name, colours[life.name], life.seconds, [rss / MIB for rss in life.rss])
                for life in lives
            ],
        ),
        Panel(
            "open descriptors",
            [Line(life.name, colours[life.name], life.seconds, life.descriptors) for life in lives],
        ),
    ]


def svg(panels: list[Panel]) -> str:
    """Draw the panels below each other over the same time."""
    seconds = max(x for panel in panels for line in panel.lines for x in line.xs)
    height = len(panels) * (PANEL_HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += panel_parts(panel, GAP + number * (PANEL_HEIGHT + GAP), seconds)
    return "\n".join([*parts, "</svg>\n"])


def round_up(most: float) -> float:
    """Return the least number of 4, 8, 12, 20, 40 ... that is not below ``most``, so that quarters of it are round."""
    power = 1
    while True:
        for step in (4, 8, 12, 20):
            if step * power >= most:
                return step * power
        power *= 10


def pieces(line: Line) -> list[list[tuple[float, float]]]:
    """Return the line's points, parted where there was no sample for a while: the process did not run."""
    parted: list[list[tuple[float, float]]] = []
    last = -float("inf")
    for x, y in zip(line.xs, line.ys, strict=True):
        if x - last > GAP_SECONDS:
            parted.append([])
        parted[-1].append((x, y))
        last = x
    return parted


def panel_parts(panel: Panel, top: float, seconds: float) -> list[str]:
    width = WIDTH - LEFT - RIGHT
    bottom = top + PANEL_HEIGHT
    most = round_up(max((y for line in panel.lines for y in line.ys), default=0))
    parts = [f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{html.escape(panel.title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * PANEL_HEIGHT
        parts.append(f'<path d="M{LEFT} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * most:.4g}</text>')
    for minute in range(int(seconds // MINUTE) + 1):
        x = LEFT + minute * MINUTE / seconds * width
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{minute}</text>')
    for line in panel.lines:
        for piece in pieces(line):
            points = " ".join(
                f"{LEFT + x / seconds * width:.1f},{bottom - y / most * PANEL_HEIGHT:.1f}" for x, y in piece
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="1.5"/>'
            )
    for number, (label, colour) in enumerate({line.label: line.colour for line in panel.lines}.items()):
        y = top + 12 + 18 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 10} {y - 4}h16" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y}">{html.escape(label)}</text>')
    return parts
