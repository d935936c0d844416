"""``/v1/logits`` as JSON: the rows of each input in one body."""

from __future__ import annotations

import orjson

from logitserve.answers.generation import Counts, Delta
from logitserve.answers.record import Record
from logitserve.jobs.job import Job
from logitserve.state import Model


class LogitsAnswer:
    """Collects deltas into one object for each input."""

    def __init__(self, job: Job, model: Model) -> None:
        self._job = job
        self._records = [Record(job, model, index) for index in range(job.num_choices)]

    def add(self, delta: Delta) -> None:
        self._records[delta.index].add(delta)

    def whole(self, counts: Counts) -> bytes:
        data = [
            {
                "object": "logits",
                "index": record.index,
                "token_ids": record.token_ids,
                "prompt_token_ids": record.prompt.token_ids,
                **record.rows(),
                "finish_reason": record.finish_reason,
            }
            for record in self._records
        ]
        envelope = {"object": "list", "model": self._job.model_name, "data": data, "usage": counts.usage()}
        return orjson.dumps(envelope)
