"""From a validated body to engine requests: every bound is checked here, before anything is queued."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

from logitengine.messages import GenerationRequest, LogitsSpec, SamplingParams

from logitserve.bounds import (
    check_answer_bytes,
    check_fields,
    check_ids,
    check_length,
    generative,
    parse_logit_bias,
    too_large,
)
from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.protocol.chat import ChatBody
from logitserve.protocol.completions import CompletionBody, Prompt
from logitserve.protocol.generation import GenerationBody
from logitserve.state import Model, ServerState
from logitserve.texts import Texts

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing a float32 logit by them would overflow."""

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt's tokens, and its text where it came as text."""

    token_ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Job:
    """One API request: a GenerationRequest for each prompt, and what the answer needs to know besides."""

    body: GenerationBody
    model_name: str
    prompts: list[PreparedPrompt]
    requests: list[GenerationRequest]

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.body.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


async def prepare_chat(body: ChatBody, state: ServerState) -> Job:
    """Render, tokenize and check a chat request. Raises ApiError."""
    model = generative(state.model())
    name = model.check_name(body.model)
    check_fields(body, model, state.config)
    messages = [message.for_template() for message in body.messages]
    check_length(sum(len(message["content"]) for message in messages), model.texts, "messages")

    def tokenize() -> PreparedPrompt:
        text = model.texts.render(messages, add_generation_prompt=body.add_generation_prompt)
        check_length(len(text), model.texts, "messages")
        return PreparedPrompt(model.texts.encode(text, add_special_tokens=False), text)

    prompt = await state.text_worker.run(tokenize, param="messages")
    if body.top_logprobs is not None and body.top_logprobs > state.config.max_logprobs:
        raise too_large("top_logprobs", body.top_logprobs, state.config.max_logprobs)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _job(
        body, name, [prompt], model, state.config, _Asked("messages", body.token_limit, None, logprobs)
    )


async def prepare_completion(body: CompletionBody, state: ServerState) -> Job:
    """Tokenize and check a completions request. Raises ApiError."""
    model = generative(state.model())
    name = model.check_name(body.model)
    check_fields(body, model, state.config)
    if len(body.prompt) > state.config.max_batch_prompts:
        raise too_large("prompt", len(body.prompt), state.config.max_batch_prompts, "prompts")
    for prompt in body.prompt:
        if isinstance(prompt, str):
            check_length(len(prompt), model.texts, "prompt")
        else:
            check_ids(prompt, model, "prompt")

    def tokenize() -> list[PreparedPrompt]:
        return [
            _prepare(prompt, model.texts, add_special_tokens=body.add_special_tokens)
            for prompt in body.prompt
        ]

    prompts = await state.text_worker.run(tokenize, param="prompt")
    asked = _Asked("prompt", body.max_tokens, DEFAULT_COMPLETION_TOKENS, body.logprobs, echo=body.echo)
    return _job(body, name, prompts, model, state.config, asked)


def _prepare(prompt: Prompt, texts: Texts, *, add_special_tokens: bool) -> PreparedPrompt:
    if isinstance(prompt, str):
        return PreparedPrompt(texts.encode(prompt, add_special_tokens=add_special_tokens), prompt)
    return PreparedPrompt(prompt, None)


@dataclass(frozen=True)
class _Asked:
    """What chat and completions name differently."""

    param: str
    max_tokens: int | None
    default_max_tokens: int | None
    logprobs: int | None
    echo: bool = False


def _job(
    body: GenerationBody,
    name: str,
    prompts: list[PreparedPrompt],
    model: Model,
    config: ServerConfig,
    asked: _Asked,
) -> Job:
    limits = [_max_tokens(body, len(prompt.token_ids), model, asked) for prompt in prompts]
    check_answer_bytes(body, [len(prompt.token_ids) for prompt in prompts], limits, model, config)
    bias = parse_logit_bias(body, model)
    prompt_logprobs = body.prompt_logprobs
    if asked.echo and asked.logprobs is not None:
        prompt_logprobs = max(asked.logprobs, prompt_logprobs or 0)
    spec = _logits_spec(body)

    def request(prompt: PreparedPrompt, max_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            sampling=_sampling(body, max_tokens, bias),
            n=body.n,
            logprobs=asked.logprobs,
            prompt_logprobs=prompt_logprobs,
            logits=spec,
            cache_salt=body.cache_salt,
        )

    requests = [request(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    return Job(body, name, prompts, requests)


def _max_tokens(body: GenerationBody, num_prompt_tokens: int, model: Model, asked: _Asked) -> int:
    """The explicit limit if it fits, else the default or what is left of the context."""
    context = model.info.max_model_len
    if num_prompt_tokens == 0:
        raise BadRequestError(f"'{asked.param}' is empty: it has no tokens.", param=asked.param)
    left = context - num_prompt_tokens
    wanted = asked.max_tokens
    if wanted == 0 and not (asked.echo or _wants_prompt(body)):
        raise BadRequestError(
            "'max_tokens' may be 0 only with 'echo', 'prompt_logprobs' or 'return_logits' of the prompt.",
            param="max_tokens",
        )
    if left < (1 if wanted is None else wanted):
        raise BadRequestError(
            f"'{asked.param}' has {num_prompt_tokens} tokens"
            + (f" and 'max_tokens' is {wanted}: {num_prompt_tokens + wanted} in all" if wanted else "")
            + f"; the model's context is {context} tokens, the answer included.",
            param="max_tokens" if wanted and left > 0 else asked.param,
            code="context_length_exceeded",
        )
    if wanted is None:
        wanted = left if asked.default_max_tokens is None else min(asked.default_max_tokens, left)
    if body.min_tokens > wanted:
        raise BadRequestError(
            f"'min_tokens' is {body.min_tokens}, more than the {wanted} tokens allowed.", param="min_tokens"
        )
    return wanted


def _wants_prompt(body: GenerationBody) -> bool:
    logits = body.return_logits
    return body.prompt_logprobs is not None or (logits is not None and logits.wants_prompt)


def _logits_spec(body: GenerationBody) -> LogitsSpec | None:
    logits = body.return_logits
    if logits is None:
        return None
    return LogitsSpec(
        positions=logits.positions,
        stage=logits.stage,
        top_k=logits.top_k,
        token_ids=tuple(logits.token_ids) if logits.token_ids is not None else None,
        dtype=logits.dtype,
    )


def _sampling(body: GenerationBody, max_tokens: int, logit_bias: dict[int, float]) -> SamplingParams:
    """Without a seed each prompt of a batch draws its own: equal prompts then differ."""
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature if body.temperature >= GREEDY_BELOW else 0.0,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=logit_bias,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
    )
