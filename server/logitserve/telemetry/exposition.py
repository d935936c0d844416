"""The metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from logitserve.state import ServerState

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

NO_MODEL = "unknown"
"""Name of the model until it is loaded, where no option names it."""


class ModelMetrics(Collector):
    """The app's metrics with the model's name as a label of each.

    prometheus_client's ``_created`` series are left out: they double the page, and Prometheus has no use for them.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        name = self._state.model_name or NO_MODEL
        for metric in self._state.metrics.registry.collect():
            metric.samples = [
                sample._replace(labels={"model_name": name, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


def metrics_page(state: ServerState) -> bytes:
    """Return the state of all metrics in Prometheus's text format."""
    return generate_latest(ModelMetrics(state))
