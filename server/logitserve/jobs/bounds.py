"""What this server and this model allow of a request, checked before anything is queued."""

from __future__ import annotations

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.rows import ReturnLogits, RowOptions
from logitserve.state import Model

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ID_BYTES = 4


def generative(model: Model) -> Model:
    if not model.info.can_generate:
        raise BadRequestError(
            f"The model ({model.info.architecture}) is a classifier: it has no logits over a vocabulary, and no text.",
            param="model",
            code="cannot_generate",
        )
    return model


def too_large(param: str, value: int, limit: int, unit: str = "") -> BadRequestError:
    held = f"{value} {unit}".strip()
    return BadRequestError(f"'{param}' is {held}; this server allows at most {limit}.", param=param)


def check_length(num_characters: int, model: Model, param: str) -> None:
    if num_characters > model.longest_prompt:
        raise BadRequestError(
            f"'{param}' has {num_characters} characters; nothing over {model.longest_prompt} can fit the context.",
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
    check_logprobs("prompt_logprobs", body.prompt_logprobs, config.max_prompt_logprobs, model)
    if body.return_logits is not None:
        _check_columns(body.return_logits, model)


def check_logprobs(param: str, wanted: int | None, limit: int, model: Model) -> None:
    """Refuse more of the likeliest tokens than this server allows, whatever flag raised that, or the vocabulary has."""
    if wanted is None:
        return
    if wanted > limit:
        raise too_large(param, wanted, limit)
    if wanted > model.info.vocab_size:
        raise BadRequestError(
            f"'{param}' is {wanted}; the model's vocabulary has {model.info.vocab_size} tokens.", param=param
        )


def _check_columns(logits: ReturnLogits, model: Model) -> None:
    if logits.top_k is not None and logits.top_k > model.info.vocab_size:
        raise too_large(logits.field("top_k"), logits.top_k, model.info.vocab_size)
    if logits.token_ids is not None:
        if len(logits.token_ids) > model.info.vocab_size:
            raise too_large(logits.field("token_ids"), len(logits.token_ids), model.info.vocab_size, "ids")
        check_ids(logits.token_ids, model, logits.field("token_ids"))


def parse_logit_bias(body: GenerationBody, model: Model) -> dict[int, float]:
    """JSON's keys are strings; these must spell token ids."""
    bias = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise BadRequestError("'logit_bias' has a key that is no token id.", param="logit_bias")
        bias[int(key)] = value
    check_ids(list(bias), model, "logit_bias")
    return bias


def check_context(num_prompt_tokens: int, max_tokens: int | None, model: Model, param: str) -> None:
    """Refuse a prompt without tokens, and one that leaves no room for ``max_tokens`` (None: for a single one)."""
    if num_prompt_tokens == 0:
        raise BadRequestError(f"'{param}' is empty: it has no tokens.", param=param)
    context = model.info.max_model_len
    left = context - num_prompt_tokens
    if left < (1 if max_tokens is None else max_tokens):
        asked = (
            f" and 'max_tokens' is {max_tokens}: {num_prompt_tokens + max_tokens} in all"
            if max_tokens
            else ""
        )
        raise BadRequestError(
            f"'{param}' has {num_prompt_tokens} tokens{asked}; the model's context is {context} tokens, "
            "the answer included.",
            param="max_tokens" if max_tokens and left > 0 else param,
            code="context_length_exceeded",
        )


def answer_nbytes(body: GenerationBody, num_prompt_tokens: int, max_tokens: int, model: Model) -> int:
    """Most bytes of rows that one prompt's answer can have: its own rows once, generated ones for each choice."""
    nbytes = 0
    logits, hidden_states = body.return_logits, body.return_hidden_states
    if logits is not None:
        item = ITEM_BYTES[logits.dtype]
        columns = logits.top_k or (len(logits.token_ids) if logits.token_ids else None)
        row_bytes = model.info.vocab_size * item if columns is None else columns * (item + ID_BYTES)
        nbytes += _num_rows(logits, body.n, num_prompt_tokens, max_tokens) * row_bytes
    if hidden_states is not None:
        row_bytes = model.info.hidden_size * ITEM_BYTES[hidden_states.dtype]
        nbytes += _num_rows(hidden_states, body.n, num_prompt_tokens, max_tokens) * row_bytes
    return nbytes


def _num_rows(wanted: RowOptions, n: int, num_prompt_tokens: int, max_tokens: int) -> int:
    return (num_prompt_tokens if wanted.wants_prompt else 0) + (
        n * max_tokens if wanted.wants_generated else 0
    )


def check_answer_bytes(body: GenerationBody, nbytes: int, config: ServerConfig) -> None:
    """Refuse a request whose rows would exceed the budget."""
    if nbytes <= config.max_answer_bytes:
        return
    logits = body.return_logits
    param = "return_hidden_states" if logits is None else logits.path or "input"
    raise BadRequestError(
        f"'{param}' asks for up to {nbytes} bytes of rows in all; this server allows {config.max_answer_bytes}. "
        "Lower max_tokens, ask for fewer positions, or choose top_k, token_ids or a smaller dtype.",
        param=param,
        code="answer_too_large",
    )
