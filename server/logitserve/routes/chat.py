"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.access.caller import Caller
from logitserve.answers.chat import ChatAnswer
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import chat_options
from logitserve.protocol.chat import ChatBody
from logitserve.state import HeldImagesDep, StateDep

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: Annotated[ChatBody, Depends(JsonBody(ChatBody))],
    state: StateDep,
    held: HeldImagesDep,
    request: Request,
) -> Response:
    """Continue a conversation."""
    job = await make_job(chat_options(body), state, Caller.of(request.scope), held)
    return respond(job, ChatAnswer(job), state, request)
