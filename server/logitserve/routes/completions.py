"""/v1/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.answers.answering import respond
from logitserve.answers.completion import CompletionAnswer
from logitserve.http.body import JsonBody, documented
from logitserve.jobs.job import prepare_completion
from logitserve.protocol.completions import CompletionBody
from logitserve.state import StateDep

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", openapi_extra=documented(CompletionBody))
async def create_completion(
    body: Annotated[CompletionBody, Depends(JsonBody(CompletionBody))], state: StateDep, request: Request
) -> Response:
    """Continue one or more prompts as they are, without a chat template."""
    job = await prepare_completion(body, state)
    return await respond(job, CompletionAnswer(job, state.model(), body), state, request)
