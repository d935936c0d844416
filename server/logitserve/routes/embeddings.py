"""/v1/embeddings and /pooling: vectors from the hidden states."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from logitengine.link.messages import OutputSpec

from logitserve.access.caller import Caller
from logitserve.answers.readouts import (
    EmbeddingReadout,
    HeadValues,
    PooledStates,
    PoolingReadout,
    ReadoutsAnswer,
    choose_head,
)
from logitserve.answers.sending.response import respond
from logitserve.http.body import JsonBody
from logitserve.jobs.job import make_job
from logitserve.jobs.options import head_outputs, reading_options
from logitserve.protocol.limits import too_large
from logitserve.protocol.readouts import EmbeddingsBody, PoolingBody
from logitserve.state import HeldImagesDep, StateDep

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings")
async def create_embeddings(
    body: Annotated[EmbeddingsBody, Depends(JsonBody(EmbeddingsBody))], state: StateDep, request: Request
) -> Response:
    """A vector for each input."""
    hidden_size = state.model().info.hidden_size
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise too_large("dimensions", body.dimensions, hidden_size)
    job = await make_job(
        reading_options(body, OutputSpec(pooling=body.pooling)), state, Caller.of(request.scope)
    )
    new_readout = partial(EmbeddingReadout, body.dimensions, body.encoding_format, normalize=body.normalize)
    return respond(job, ReadoutsAnswer(job, new_readout), state, request)


@router.post("/pooling")
async def create_pooling(
    body: Annotated[PoolingBody, Depends(JsonBody(PoolingBody))],
    state: StateDep,
    held: HeldImagesDep,
    request: Request,
) -> Response:
    """A head's last values for each input, or the last token's hidden states where there is no head."""
    model = state.model()
    source: type[HeadValues | PooledStates]
    if body.head is None and not model.info.heads:
        outputs, source = OutputSpec(pooling="last"), PooledStates
    else:
        outputs, source = head_outputs(choose_head(body.head, model)), HeadValues
    job = await make_job(reading_options(body, outputs), state, Caller.of(request.scope), held)
    answer_id = f"pool-{uuid.uuid4().hex}"
    extras = {"id": answer_id, "created": int(time.time())}
    new_readout = partial(PoolingReadout, source, body.encoding_format)
    return respond(job, ReadoutsAnswer(job, new_readout, extras, answer_id), state, request)
