"""A histogram that is observed once for every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenHistogram(Collector):
    """Counts of durations in classes, for one thread.

    prometheus_client's own takes two locks and a search through all classes, which is several times the cost.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[HistogramMetricFamily]:
        yield histogram(self._name, self._documentation, self._bounds, self._counts, self._sum)


def histogram(
    name: str, documentation: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    """Return a histogram of values counted by class. The last class has no bound."""
    buckets: list[tuple[str, float]] = []
    number = 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        number += count
        buckets.append((floatToGoString(bound), number))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=total)
