"""/v1/logits."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.answers.answering import respond_arrow, respond_whole
from logitserve.answers.arrow import ArrowAnswer
from logitserve.answers.logits import LogitsAnswer
from logitserve.http.body import JsonBody, documented
from logitserve.http.sse import ArrowStream
from logitserve.jobs.job import prepare_logits
from logitserve.protocol.logits import LogitsBody
from logitserve.state import StateDep

router = APIRouter(tags=["logits"])


@router.post("/v1/logits", openapi_extra=documented(LogitsBody))
async def create_logits(
    body: Annotated[LogitsBody, Depends(JsonBody(LogitsBody))], state: StateDep, request: Request
) -> Response:
    """The logits of what is read and of what is generated: an Arrow stream, or JSON where ``Accept`` asks for it."""
    if prefers_json(request.headers.get("accept", "")):
        job = await prepare_logits(body, state, scored=False)
        return await respond_whole(job, LogitsAnswer(job, state.model()), state, request)
    job = await prepare_logits(body, state, scored=True)
    return await respond_arrow(job, ArrowAnswer(job, body, state.model()), state, request)


def prefers_json(accept: str) -> bool:
    """Whether the header names JSON and not Arrow too; ``*/*`` and silence mean Arrow."""
    named = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return "application/json" in named and ArrowStream.media_type not in named
