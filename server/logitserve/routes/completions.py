"""/v1/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.access.caller import Caller
from logitserve.answers.best_of import BestOfAnswer
from logitserve.answers.completion import CompletionAnswer
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import completion_options
from logitserve.protocol.completions import CompletionBody
from logitserve.state import StateDep

router = APIRouter(tags=["completions"])


@router.post("/v1/completions")
async def create_completion(
    body: Annotated[CompletionBody, Depends(JsonBody(CompletionBody))], state: StateDep, request: Request
) -> Response:
    """Continue one or more prompts as they are, without a chat template."""
    job = await make_job(completion_options(body), state, Caller.of(request.scope))
    best = job.answer.best
    answer = CompletionAnswer(job) if best is None else BestOfAnswer(job, best)
    return respond(job, answer, state, request)
