"""/metrics as a test reads it."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Page:
    """The samples of one scrape."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, text: str) -> Page:
        """Read a page. Raises ValueError for one that Prometheus could not read, or with a sample twice."""
        samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                if key in samples:
                    msg = f"{key} is there twice"
                    raise ValueError(msg)
                samples[key] = sample.value
        return cls(samples)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name that have these labels and perhaps others."""
        return sum(
            value
            for (other, own), value in self.samples.items()
            if other == name and labels.items() <= dict(own).items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(own) for other, own in self.samples if other == name]
