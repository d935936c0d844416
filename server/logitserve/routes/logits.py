"""/v1/logits."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.access.caller import Caller
from logitserve.answers import arrow
from logitserve.answers.answer import Answer
from logitserve.answers.arrow import ArrowAnswer
from logitserve.answers.logits_json import LogitsAnswer
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import logits_options
from logitserve.protocol.logits import LogitsBody
from logitserve.state import HeldImagesDep, StateDep

router = APIRouter(tags=["logits"])


@router.post("/v1/logits")
async def create_logits(
    body: Annotated[LogitsBody, Depends(JsonBody(LogitsBody))],
    state: StateDep,
    held: HeldImagesDep,
    request: Request,
) -> Response:
    """The logits of what is read and of what is generated: an Arrow stream, or JSON where ``Accept`` asks for it."""
    options = logits_options(body, as_arrow=not prefers_json(request.headers.get("accept", "")))
    job = await make_job(options, state, Caller.of(request.scope), held)
    logits = job.requests[0].logits
    answer: Answer = LogitsAnswer(job)
    if job.answer.stream and logits is not None:
        answer = ArrowAnswer(job, logits)
    return respond(job, answer, state, request)


def prefers_json(accept: str) -> bool:
    """Return whether the header names JSON and not Arrow too. ``*/*`` and an absent header mean Arrow."""
    named = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return "application/json" in named and arrow.MEDIA_TYPE not in named
