"""/v1/models: what is served, and what its logits can be trusted for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from logitserve.state import Model, ModelDep

router = APIRouter(tags=["models"])


def describe(model: Model, name: str) -> dict[str, Any]:
    """OpenAI's model object with the fields that a reader of logits needs."""
    info = model.info
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "logitserve",
        "max_model_len": info.max_model_len,
        "vocab_size": info.vocab_size,
        "hidden_size": info.hidden_size,
        "can_generate": info.can_generate,
        "images": info.encoder is not None,
        "heads": info.heads,
        "architecture": info.architecture,
        "dtype": info.dtype,
        "weights": info.weights,
        "device": info.device,
        "kernels": info.kernels,
        "batch_invariant": info.batch_invariant,
        "system_fingerprint": info.fingerprint,
    }


@router.get("/v1/models")
async def list_models(model: ModelDep) -> dict[str, Any]:
    """The model under each of its names."""
    return {"object": "list", "data": [describe(model, name) for name in model.names]}


@router.get("/v1/models/{name:path}")
async def get_one_model(name: str, model: ModelDep) -> dict[str, Any]:
    """The model by one name, which may hold slashes."""
    return describe(model, model.check_name(name))
