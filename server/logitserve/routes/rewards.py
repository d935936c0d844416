"""/v1/rewards."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from logitserve.access.caller import Caller
from logitserve.answers.readouts import ReadoutsAnswer, RewardReadout, choose_head
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import head_outputs, reading_options
from logitserve.protocol.readouts import RewardsBody
from logitserve.state import HeldImagesDep, StateDep

router = APIRouter(tags=["rewards"])


@router.post("/v1/rewards")
async def create_rewards(
    body: Annotated[RewardsBody, Depends(JsonBody(RewardsBody))],
    state: StateDep,
    held: HeldImagesDep,
    request: Request,
) -> Response:
    """What a value head or classifier makes of each input."""
    name = choose_head(body.head, state.model())
    outputs = head_outputs(name, every_position=body.return_values)
    job = await make_job(reading_options(body, outputs), state, Caller.of(request.scope), held)
    new_readout = partial(RewardReadout, return_values=body.return_values)
    return respond(job, ReadoutsAnswer(job, new_readout, {"head": name}), state, request)
