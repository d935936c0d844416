"""/metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from logitserve.state import StateDep
from logitserve.telemetry.exposition import MEDIA_TYPE, metrics_page

router = APIRouter(tags=["health"])


@router.get("/metrics")
async def metrics(state: StateDep) -> Response:
    """What the server and its engine do, in Prometheus's text format. Answered while loading and draining too."""
    return Response(metrics_page(state), headers={"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"})
