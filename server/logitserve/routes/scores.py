"""/v1/perplexity and /v1/rewards."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from logitengine.link.messages import HeadSpec

from logitserve.answers.scores import PerplexityScore, RewardScore, choose_head
from logitserve.http.body import JsonBody, documented
from logitserve.jobs.bounds import generative
from logitserve.jobs.scoring import Asked, respond_scored
from logitserve.protocol.scores import PerplexityBody, RewardsBody
from logitserve.state import StateDep

router = APIRouter(tags=["scores"])


@router.post("/v1/perplexity", openapi_extra=documented(PerplexityBody))
async def create_perplexity(
    body: Annotated[PerplexityBody, Depends(JsonBody(PerplexityBody))], state: StateDep, request: Request
) -> Response:
    """How likely the model finds each input."""
    generative(state.model())
    return await respond_scored(body, Asked(prompt_logprobs=0), PerplexityScore, {}, state, request)


@router.post("/v1/rewards", openapi_extra=documented(RewardsBody))
async def create_rewards(
    body: Annotated[RewardsBody, Depends(JsonBody(RewardsBody))], state: StateDep, request: Request
) -> Response:
    """What a value head or classifier makes of each input."""
    name = choose_head(body.head, state.model())
    asked = Asked(head=HeadSpec(name=name, every_position=body.return_values))
    new_score = partial(RewardScore, return_values=body.return_values)
    return await respond_scored(body, asked, new_score, {"head": name}, state, request)
