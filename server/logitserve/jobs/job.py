"""From a validated body to engine requests: every bound is checked here, before anything is queued."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

from logitengine.link.messages import GenerationRequest, HiddenStatesSpec, LogitsSpec, SamplingParams

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.jobs.bounds import (
    answer_nbytes,
    check_answer_bytes,
    check_context,
    check_fields,
    check_logprobs,
    generative,
    parse_logit_bias,
)
from logitserve.jobs.prompts import PreparedPrompt, from_input, from_messages, from_texts, input_param
from logitserve.protocol.chat import ChatBody
from logitserve.protocol.completions import MOST_COMPLETION_LOGPROBS, CompletionBody
from logitserve.protocol.generation import GenerationBody
from logitserve.protocol.logits import LogitsBody
from logitserve.state import Model, ServerState

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing a float32 logit by them would overflow."""

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """One API request: a GenerationRequest for each prompt, and what the answer needs to know besides."""

    body: GenerationBody
    model_name: str
    prompts: list[PreparedPrompt]
    requests: list[GenerationRequest]
    largest_nbytes: int
    """Most bytes of rows that any one of the requests can make."""

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
    check_logprobs("top_logprobs", body.top_logprobs, state.config.max_logprobs, model)
    prompt = await from_messages(body.messages, state, add_generation_prompt=body.add_generation_prompt)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = _Asked("messages", body.token_limit, None, logprobs)
    return _job(body, name, [prompt], model, state.config, asked)


async def prepare_completion(body: CompletionBody, state: ServerState) -> Job:
    """Tokenize and check a completions request. Raises ApiError."""
    model = generative(state.model())
    name = model.check_name(body.model)
    check_fields(body, model, state.config)
    check_logprobs("logprobs", body.logprobs, MOST_COMPLETION_LOGPROBS, model)
    prompts = await from_texts(body.prompt, "prompt", state, add_special_tokens=body.add_special_tokens)
    asked = _Asked("prompt", body.max_tokens, DEFAULT_COMPLETION_TOKENS, body.logprobs, echo=body.echo)
    return _job(body, name, prompts, model, state.config, asked)


async def prepare_logits(body: LogitsBody, state: ServerState, *, scored: bool) -> Job:
    """Tokenize and check a logits request; ``scored``: with the log-probability of each row's token. Raises ApiError."""
    model = generative(state.model())
    name = model.check_name(body.model)
    generation = body.as_generation()
    check_fields(generation, model, state.config)
    prompts = await from_input(body, state)
    logprobs = 0 if scored and body.wants_generated else None
    prompt_logprobs = 0 if scored and body.wants_prompt else None
    asked = _Asked(input_param(body), body.max_tokens, None, logprobs, prompt_logprobs=prompt_logprobs)
    return _job(generation, name, prompts, model, state.config, asked)


@dataclass(frozen=True)
class _Asked:
    """What chat and completions name differently."""

    param: str
    max_tokens: int | None
    default_max_tokens: int | None
    logprobs: int | None
    echo: bool = False
    prompt_logprobs: int | None = None


def _job(
    body: GenerationBody,
    name: str,
    prompts: list[PreparedPrompt],
    model: Model,
    config: ServerConfig,
    asked: _Asked,
) -> Job:
    limits = [_max_tokens(body, len(prompt.token_ids), model, asked) for prompt in prompts]
    sizes = [
        answer_nbytes(body, len(prompt.token_ids), limit, model)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    check_answer_bytes(body, sum(sizes), config)
    bias = parse_logit_bias(body, model)
    prompt_logprobs = asked.prompt_logprobs if body.prompt_logprobs is None else body.prompt_logprobs
    if asked.echo and asked.logprobs is not None:
        prompt_logprobs = max(asked.logprobs, prompt_logprobs or 0)
    logits, hidden_states = _logits_spec(body), _hidden_states_spec(body)

    def request(prompt: PreparedPrompt, max_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            sampling=_sampling(body, max_tokens, bias),
            n=body.n,
            logprobs=asked.logprobs,
            prompt_logprobs=prompt_logprobs,
            logits=logits,
            hidden_states=hidden_states,
            cache_salt=body.cache_salt,
        )

    requests = [request(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    return Job(body, name, prompts, requests, max(sizes))


def _max_tokens(body: GenerationBody, num_prompt_tokens: int, model: Model, asked: _Asked) -> int:
    """The explicit limit if it fits, else the default or what is left of the context."""
    wanted = asked.max_tokens
    if wanted == 0 and not (asked.echo or body.wants_prompt):
        raise BadRequestError(
            "'max_tokens' may be 0 only with 'echo', or where rows or logprobs of the prompt are asked for.",
            param="max_tokens",
        )
    check_context(num_prompt_tokens, wanted, model, asked.param)
    if wanted is None:
        left = model.info.max_model_len - num_prompt_tokens
        wanted = left if asked.default_max_tokens is None else min(asked.default_max_tokens, left)
    if body.min_tokens > wanted:
        raise BadRequestError(
            f"'min_tokens' is {body.min_tokens}, more than the {wanted} tokens allowed.", param="min_tokens"
        )
    return wanted


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


def _hidden_states_spec(body: GenerationBody) -> HiddenStatesSpec | None:
    wanted = body.return_hidden_states
    return None if wanted is None else HiddenStatesSpec(positions=wanted.positions, dtype=wanted.dtype)


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
