"""What this server and this model allow of a request, checked before anything is queued."""

from __future__ import annotations

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.protocol.generation import GenerationBody
from logitserve.state import Model
from logitserve.texts import Texts

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ID_BYTES = 4


def generative(model: Model) -> Model:
    if not model.info.can_generate:
        raise BadRequestError(
            f"{model.info.architecture} is a classifier: it generates no text.",
            param="model",
            code="cannot_generate",
        )
    return model


def too_large(param: str, value: int, limit: int, unit: str = "") -> BadRequestError:
    held = f"{value} {unit}".strip()
    return BadRequestError(f"'{param}' is {held}; this server allows at most {limit}.", param=param)


def check_length(num_characters: int, texts: Texts, param: str) -> None:
    if num_characters > texts.longest_prompt:
        raise BadRequestError(
            f"'{param}' has {num_characters} characters; nothing over {texts.longest_prompt} can fit the context.",
            param=param,
            code="context_length_exceeded",
        )


def check_ids(token_ids: list[int], model: Model, param: str) -> None:
    if token_ids and max(token_ids) >= model.info.vocab_size:
        raise BadRequestError(
            f"'{param}' holds token id {max(token_ids)}, outside the vocabulary of {model.info.vocab_size}.",
            param=param,
        )


def check_fields(body: GenerationBody, model: Model, config: ServerConfig) -> None:
    """The bounds that this server and this model set. Raises BadRequestError."""
    if body.n > config.max_n:
        raise too_large("n", body.n, config.max_n)
    if len(body.stop) > config.max_stop:
        raise too_large("stop", len(body.stop), config.max_stop, "strings")
    longest = max(map(len, body.stop), default=0)
    if longest > config.max_stop_length:
        raise too_large("stop", longest, config.max_stop_length, "characters long")
    if len(body.stop_token_ids) > config.max_stop:
        raise too_large("stop_token_ids", len(body.stop_token_ids), config.max_stop, "ids")
    check_ids(body.stop_token_ids, model, "stop_token_ids")
    if len(body.logit_bias) > config.max_logit_bias:
        raise too_large("logit_bias", len(body.logit_bias), config.max_logit_bias, "entries")
    if body.prompt_logprobs is not None and body.prompt_logprobs > config.max_prompt_logprobs:
        raise too_large("prompt_logprobs", body.prompt_logprobs, config.max_prompt_logprobs)
    logits = body.return_logits
    if logits is not None and logits.top_k is not None and logits.top_k > model.info.vocab_size:
        raise too_large("return_logits.top_k", logits.top_k, model.info.vocab_size)
    if logits is not None and logits.token_ids is not None:
        if len(logits.token_ids) > model.info.vocab_size:
            raise too_large("return_logits.token_ids", len(logits.token_ids), model.info.vocab_size, "ids")
        check_ids(logits.token_ids, model, "return_logits.token_ids")


def parse_logit_bias(body: GenerationBody, model: Model) -> dict[int, float]:
    """JSON's keys are strings; these must spell token ids."""
    bias = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise BadRequestError("'logit_bias' has a key that is no token id.", param="logit_bias")
        bias[int(key)] = value
    check_ids(list(bias), model, "logit_bias")
    return bias


def check_answer_bytes(
    body: GenerationBody, prompt_lengths: list[int], limits: list[int], model: Model, config: ServerConfig
) -> None:
    """Refuse more logits than the budget: ``rows * row bytes``, the generated rows once for each choice."""
    logits = body.return_logits
    if logits is None:
        return
    item = ITEM_BYTES[logits.dtype]
    columns = logits.top_k or (len(logits.token_ids) if logits.token_ids else None)
    row_bytes = model.info.vocab_size * item if columns is None else columns * (item + ID_BYTES)
    rows = sum(prompt_lengths) if logits.wants_prompt else 0
    rows += body.n * sum(limits) if logits.positions != "prompt" else 0
    if rows * row_bytes > config.max_answer_bytes:
        raise BadRequestError(
            f"'return_logits' asks for up to {rows} rows of {row_bytes} bytes, {rows * row_bytes} in all; this server "
            f"allows {config.max_answer_bytes}. Lower max_tokens, or choose top_k, token_ids or a smaller dtype.",
            param="return_logits",
            code="answer_too_large",
        )
