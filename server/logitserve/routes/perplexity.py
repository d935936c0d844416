"""/v1/perplexity."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from logitengine.link.messages import OutputSpec

from logitserve.access.caller import Caller
from logitserve.answers.readouts import PerplexityReadout, ReadoutsAnswer
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import reading_options
from logitserve.protocol.readouts import PerplexityBody
from logitserve.state import StateDep

router = APIRouter(tags=["perplexity"])


@router.post("/v1/perplexity")
async def create_perplexity(
    body: Annotated[PerplexityBody, Depends(JsonBody(PerplexityBody))], state: StateDep, request: Request
) -> Response:
    """How likely the model finds each input."""
    job = await make_job(
        reading_options(body, OutputSpec(prompt_logprobs=0)), state, Caller.of(request.scope)
    )
    return respond(job, ReadoutsAnswer(job, PerplexityReadout), state, request)
