"""/health, /ready and /version: for load balancers, supervisors and people."""

from __future__ import annotations

from fastapi import APIRouter

from logitserve import __version__
from logitserve.errors import not_ready
from logitserve.state import StateDep

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers. Says nothing about the engine."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: StateDep) -> dict[str, str]:
    """Requests are served; 503 with the reason while loading, draining, dead or stuck."""
    reason = state.not_ready_reason()
    if reason is not None:
        raise not_ready(reason)
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
