"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from logitserve.http.body import JsonBody, documented
from logitserve.jobs.bounds import check_ids, check_length, too_large
from logitserve.protocol.tokens import DetokenizeBody, TokenizeBody
from logitserve.state import Model, ModelDep, StateDep

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", openapi_extra=documented(TokenizeBody))
async def tokenize(
    body: Annotated[TokenizeBody, Depends(JsonBody(TokenizeBody))], state: StateDep, model: ModelDep
) -> dict[str, Any]:
    """The tokens of a prompt, or of messages under the chat template."""
    model.check_name(body.model)
    param = "prompt" if body.prompt is not None else "messages"

    def work() -> list[int]:
        return _tokens(body, model, param)

    ids = await state.tokenizer_workers.run(work, param=param)
    return {
        "count": len(ids),
        "max_model_len": model.info.max_model_len,
        "tokens": ids,
        "token_strs": model.tokenizer.token_strings(ids) if body.return_token_strs else None,
    }


@router.post("/detokenize", openapi_extra=documented(DetokenizeBody))
async def detokenize(
    body: Annotated[DetokenizeBody, Depends(JsonBody(DetokenizeBody))], state: StateDep, model: ModelDep
) -> dict[str, str]:
    """The text of tokens, special ones included."""
    model.check_name(body.model)
    if len(body.tokens) > model.info.max_model_len:
        raise too_large("tokens", len(body.tokens), model.info.max_model_len, "ids")
    check_ids(body.tokens, model, "tokens")
    return {
        "prompt": await state.tokenizer_workers.run(
            lambda: model.tokenizer.decode(body.tokens), param="tokens"
        )
    }


def _tokens(body: TokenizeBody, model: Model, param: str) -> list[int]:
    if body.prompt is not None:
        check_length(len(body.prompt), model, param)
        return model.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    messages = [message.for_template() for message in body.messages or []]
    check_length(sum(len(message["content"]) for message in messages), model, param)
    text = model.tokenizer.render(messages, add_generation_prompt=body.add_generation_prompt)
    return model.tokenizer.encode(text, add_special_tokens=body.add_special_tokens is True)
