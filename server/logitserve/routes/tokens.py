"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from logitserve.http.body import JsonBody
from logitserve.jobs.calls import settle_tools
from logitserve.jobs.limits import check_ids
from logitserve.jobs.options import call_options, tokenize_prompts
from logitserve.jobs.prompts import tokenize as tokenize_source
from logitserve.protocol.limits import too_large
from logitserve.protocol.tokens import DetokenizeBody, TokenizeBody
from logitserve.state import HeldImagesDep, ModelDep, StateDep

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(
    body: Annotated[TokenizeBody, Depends(JsonBody(TokenizeBody))],
    state: StateDep,
    model: ModelDep,
    held: HeldImagesDep,
) -> dict[str, Any]:
    """The tokens of a prompt, or of messages under the chat template."""
    model.check_name(body.model)
    source, _ = settle_tools(tokenize_prompts(body), call_options(body), model)
    (prompt,) = await tokenize_source(source, state, held=held)
    ids = prompt.token_ids
    return {
        "count": len(ids),
        "max_model_len": model.info.max_model_len,
        "tokens": ids,
        "token_strs": model.tokenizer.token_strings(ids) if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(
    body: Annotated[DetokenizeBody, Depends(JsonBody(DetokenizeBody))], state: StateDep, model: ModelDep
) -> dict[str, str]:
    """The text of tokens, special ones included."""
    model.check_name(body.model)
    if len(body.tokens) > model.info.max_model_len:
        raise too_large("tokens", len(body.tokens), model.info.max_model_len, "ids")
    check_ids(body.tokens, model, "tokens")
    with state.queue.enter(len(body.tokens)):
        text = await state.tokenizer_workers.run(lambda: model.tokenizer.decode(body.tokens), param="tokens")
    return {"prompt": text}


@router.get("/tokenizer_info")
async def get_tokenizer_info(model: ModelDep) -> dict[str, Any]:
    """Special tokens and chat template, for clients that tokenize as the server does: lm-eval's RemoteTokenizer asks."""
    return {**model.tokenizer.description(), "model_max_length": model.info.max_model_len}
