"""Bounds that the model sets on a request, and the bytes of its answer: checked before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logitengine.link.messages import LogitsSpec, OutputSpec
from logitengine.link.row_bytes import RowSize, row_sizes
from msgspec.structs import replace

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.jobs.options import JobOptions
from logitserve.jobs.prompts import context_exceeded
from logitserve.protocol.limits import too_large
from logitserve.state import Model


def require_generative(model: Model) -> None:
    if not model.info.can_generate:
        raise BadRequestError(
            f"The model ({model.info.architecture}) is a classifier: it has no logits over a vocabulary, and no text.",
            param="model",
            code="cannot_generate",
        )


def check_options(options: JobOptions, model: Model) -> None:
    """Refuse what this model cannot do, whatever the prompt. Raises BadRequestError."""
    outputs = options.outputs
    if outputs.pooling is None and outputs.head is None:
        require_generative(model)
    check_ids(options.sampling.stop_token_ids, model, "stop_token_ids")
    _check_logprobs(options.logprobs_param, outputs.logprobs, model)
    _check_logprobs("prompt_logprobs", outputs.prompt_logprobs, model)
    if outputs.logits is not None:
        _check_columns(outputs.logits, options.columns_prefix, model)


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Most bytes of rows: that one ``position`` adds to a choice's outputs, and that any one ``request`` of a job makes."""

    position: int
    request: int


@dataclass(frozen=True, slots=True)
class SettledBounds:
    """What only the prompts decide: each one's ``max_tokens``, the bias by token id, and the bytes of rows."""

    max_tokens: Sequence[int]
    logit_bias: dict[int, float]
    row_bytes: RowBytes


def settle_bounds(
    options: JobOptions, prompts: Sequence[Sequence[int]], model: Model, config: ServerConfig
) -> SettledBounds:
    """Check what the prompts' token ids decide. Raises BadRequestError."""
    for token_ids in prompts:
        # A tokenizer may know more tokens than the model, from other models of its family.
        check_ids(token_ids, model, options.prompts.param)
    limits = [_settle_max_tokens(options, len(token_ids), model) for token_ids in prompts]
    sizes = [
        _rows_nbytes(options.outputs, options.n, len(token_ids), limit, model)
        for token_ids, limit in zip(prompts, limits, strict=True)
    ]
    _check_answer_bytes(options, prompts, limits, model, config)
    bias = _parse_logit_bias(options.logit_bias, model)
    return SettledBounds(limits, bias, RowBytes(_position_nbytes(options.outputs, model), max(sizes)))


def check_ids(token_ids: Sequence[int], model: Model, param: str) -> None:
    if token_ids and max(token_ids) >= model.info.vocab_size:
        raise BadRequestError(
            f"'{param}' holds token id {max(token_ids)}, outside the vocabulary of {model.info.vocab_size}.",
            param=param,
        )


def _check_logprobs(param: str, wanted: int | None, model: Model) -> None:
    if wanted is not None and wanted > model.info.vocab_size:
        raise BadRequestError(
            f"'{param}' is {wanted}; the model's vocabulary has {model.info.vocab_size} tokens.", param=param
        )


def _check_columns(logits: LogitsSpec, prefix: str, model: Model) -> None:
    vocab_size = model.info.vocab_size
    if logits.top_k is not None and logits.top_k > vocab_size:
        raise too_large(f"{prefix}top_k", logits.top_k, vocab_size)
    if logits.token_ids is not None:
        if len(logits.token_ids) > vocab_size:
            raise too_large(f"{prefix}token_ids", len(logits.token_ids), vocab_size, "ids")
        check_ids(logits.token_ids, model, f"{prefix}token_ids")


def _check_answer_bytes(
    options: JobOptions,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    model: Model,
    config: ServerConfig,
) -> None:
    """Refuse an answer that may have too many rows: a whole one is held as it is written. Raises BadRequestError."""
    rows = replace(options.outputs, logprobs=None, prompt_logprobs=None, head=None)
    nbytes = sum(
        _rows_nbytes(rows, options.n, len(token_ids), limit, model)
        for token_ids, limit in zip(prompts, limits, strict=True)
    )
    if options.answer.stream:
        if nbytes > config.max_stream_bytes:
            raise BadRequestError(
                f"'{options.rows_param}' asks for up to {nbytes} bytes of rows in all; this server streams "
                f"{config.max_stream_bytes} in one answer (--max-stream-bytes).",
                param=options.rows_param,
                code="answer_too_large",
            )
        return
    # Base64 is this much longer than the bytes; lists are longer still.
    written = nbytes * 4 // 3
    if written > config.max_answer_bytes:
        raise answer_too_large(
            options.rows_param, f"rows of up to {written} bytes as they are written", config
        )


def _parse_logit_bias(logit_bias: dict[str, float], model: Model) -> dict[int, float]:
    """The bias by token id. JSON's keys are strings, which must spell ids. Raises BadRequestError."""
    bias = {}
    for key, value in logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise BadRequestError("'logit_bias' has a key that is no token id.", param="logit_bias")
        bias[int(key)] = value
    check_ids(list(bias), model, "logit_bias")
    return bias


def _settle_max_tokens(options: JobOptions, num_prompt_tokens: int, model: Model) -> int:
    """The explicit limit if it fits, else the default or what is left of the context. Raises BadRequestError."""
    wanted = options.max_tokens
    if wanted == 0 and not (options.answer.echo or _reads_prompt(options.outputs)):
        raise BadRequestError(
            "'max_tokens' may be 0 only with 'echo', or where rows or logprobs of the prompt are asked for.",
            param="max_tokens",
        )
    _check_context(num_prompt_tokens, wanted, model, options.prompts.param)
    if wanted is None:
        left = model.info.max_model_len - num_prompt_tokens
        default = options.default_max_tokens
        wanted = left if default is None else min(default, left)
    min_tokens = options.sampling.min_tokens
    if min_tokens > wanted:
        raise BadRequestError(
            f"'min_tokens' is {min_tokens}, more than the {wanted} tokens allowed.", param="min_tokens"
        )
    return wanted


def _reads_prompt(outputs: OutputSpec) -> bool:
    """Whether anything is asked about the prompt itself."""
    rows = (outputs.logits, outputs.hidden_states)
    return (
        outputs.prompt_logprobs is not None
        or outputs.pooling is not None
        or outputs.head is not None
        or any(spec is not None and spec.wants_prompt for spec in rows)
    )


def _check_context(num_prompt_tokens: int, max_tokens: int | None, model: Model, param: str) -> None:
    """Refuse a prompt without tokens, and one that leaves no room for ``max_tokens`` (None: for a single one)."""
    if num_prompt_tokens == 0:
        raise BadRequestError(f"'{param}' is empty: it has no tokens.", param=param)
    context = model.info.max_model_len
    left = context - num_prompt_tokens
    if left >= (1 if max_tokens is None else max_tokens):
        return
    if max_tokens and left > 0:
        total = num_prompt_tokens + max_tokens
        what = (
            f"you requested {total} tokens ({num_prompt_tokens} in '{param}', {max_tokens} in 'max_tokens')"
        )
        raise context_exceeded(model, "max_tokens", what)
    raise context_exceeded(model, param, f"'{param}' resulted in {num_prompt_tokens} tokens")


def _position_nbytes(outputs: OutputSpec, model: Model) -> int:
    """Most bytes that one position adds to the outputs of one choice."""
    return sum(size.nbytes for size in _row_sizes(outputs, model))


def _row_sizes(outputs: OutputSpec, model: Model) -> Iterator[RowSize]:
    info = model.info
    return row_sizes(outputs, info.vocab_size, info.hidden_size, info.heads)


def _rows_nbytes(outputs: OutputSpec, n: int, num_prompt_tokens: int, max_tokens: int, model: Model) -> int:
    """Most bytes of rows that one prompt's answer can have: its own rows once, generated ones for each choice."""
    return sum(
        size.nbytes * (size.of_prompt * num_prompt_tokens + size.of_generated * n * max_tokens)
        for size in _row_sizes(outputs, model)
    )


def answer_too_large(param: str, amount: str, config: ServerConfig) -> BadRequestError:
    return BadRequestError(
        f"'{param}' asks for {amount} in all; this server holds {config.max_answer_bytes} for one answer "
        "(--max-answer-bytes). Stream it, lower max_tokens, ask for fewer positions, or choose top_k, token_ids or a "
        "smaller dtype.",
        param=param,
        code="answer_too_large",
    )
