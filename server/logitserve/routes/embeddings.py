"""/v1/embeddings and /pooling: vectors from the hidden states."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from logitengine.link.messages import HeadSpec

from logitserve.answers.scores import EmbeddingScore, PooledScore, PoolingScore, ValuesScore, choose_head
from logitserve.http.body import JsonBody, documented
from logitserve.http.request_log import LogFields
from logitserve.jobs.bounds import too_large
from logitserve.jobs.scoring import Asked, respond_scored
from logitserve.protocol.scores import EmbeddingsBody, PoolingBody
from logitserve.state import StateDep

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", openapi_extra=documented(EmbeddingsBody))
async def create_embeddings(
    body: Annotated[EmbeddingsBody, Depends(JsonBody(EmbeddingsBody))], state: StateDep, request: Request
) -> Response:
    """A vector for each input."""
    hidden_size = state.model().info.hidden_size
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise too_large("dimensions", body.dimensions, hidden_size)
    new_score = partial(EmbeddingScore, body.dimensions, body.encoding_format, normalize=body.normalize)
    return await respond_scored(body, Asked(pooling=body.pooling), new_score, {}, state, request)


@router.post("/pooling", openapi_extra=documented(PoolingBody))
async def create_pooling(
    body: Annotated[PoolingBody, Depends(JsonBody(PoolingBody))], state: StateDep, request: Request
) -> Response:
    """A head's last values for each input, or the last token's hidden states where there is no head."""
    model = state.model()
    if body.head is None and not model.info.heads:
        asked = Asked(pooling="last")
        new_score = partial(PoolingScore, PooledScore, body.encoding_format)
    else:
        asked = Asked(head=HeadSpec(name=choose_head(body.head, model)))
        new_score = partial(PoolingScore, ValuesScore, body.encoding_format)
    answer_id = f"pool-{uuid.uuid4().hex}"
    LogFields.of(request.scope).answer_id = answer_id
    extras = {"id": answer_id, "created": int(time.time())}
    return await respond_scored(body, asked, new_score, extras, state, request)
