"""``/v1/logits`` as JSON: the rows of each input in one body."""

from __future__ import annotations

from collections.abc import Sequence

from logitserve.answers.answer import inline_bytes, usage
from logitserve.answers.json_pieces import dumps
from logitserve.answers.record import Record
from logitserve.errors import ApiError
from logitserve.jobs.job import Job
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta


class LogitsAnswer:
    """An Answer with one object for each input."""

    tells_errors = False

    def __init__(self, job: Job) -> None:
        self.id: str | None = None
        self.media_type = "application/json"
        self.inline_bytes = inline_bytes(job)
        self.nbytes = 0
        self._job = job
        self._records = [Record(job, index) for index in range(job.num_choices)]

    def add(self, delta: Delta, counts: Counts) -> Sequence[bytes]:  # noqa: ARG002 - counted at the end
        self.nbytes += self._records[delta.index].add(delta)
        return ()

    def end(self, counts: Counts) -> Sequence[bytes]:
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
        self._records = []  # lets each piece be freed once it is sent
        return dumps(
            {
                "object": "list",
                "model": self._job.model_name,
                "system_fingerprint": self._job.model.info.fingerprint,
                "data": data,
                "usage": usage(counts),
            }
        )

    def fill_silence(self) -> Sequence[bytes]:
        return ()

    def tell(self, error: ApiError) -> Sequence[bytes]:  # noqa: ARG002 - a whole body fails before it begins
        return ()
