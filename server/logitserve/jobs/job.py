"""From options to a Job: prompts tokenized, every bound checked, nothing queued yet."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from logitengine.link.messages import GenerationRequest
from msgspec.structs import replace

from logitserve.jobs.limits import (
    RowBytes,
    check_answer_nbytes,
    check_ids,
    check_options,
    parse_logit_bias,
    position_nbytes,
    rows_nbytes,
    settle_max_tokens,
)
from logitserve.jobs.options import AnswerOptions, JobOptions, TextOptions
from logitserve.jobs.prompts import TokenizedPrompt, tokenize
from logitserve.state import Model, ServerState


@dataclass(frozen=True, slots=True)
class Job:
    """What one API request has the engine do, and what its answer needs to know.

    Attributes:
        prompts, requests: one of each for every prompt. All requests ask for the same outputs of the same ``n`` choices.
        rows_param: the field of the request that asks for rows, for error messages.
    """

    model: Model
    model_name: str
    prompts: Sequence[TokenizedPrompt]
    requests: Sequence[GenerationRequest]
    text: TextOptions
    answer: AnswerOptions
    row_bytes: RowBytes
    rows_param: str

    @property
    def n(self) -> int:
        return self.requests[0].n

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def returns_rows(self) -> bool:
        """Whether rows come back, and with them the ids of the tokens that they belong to."""
        return self.requests[0].logits is not None or self.requests[0].hidden_states is not None


async def make_job(options: JobOptions, state: ServerState) -> Job:
    """Check and tokenize. Raises ApiError."""
    model = state.model()
    name = model.check_name(options.model)
    check_options(options, model)
    prompts = await tokenize(options.prompts, state)
    for prompt in prompts:
        # A tokenizer may know more tokens than the model, from other models of its family.
        check_ids(prompt.token_ids, model, options.prompts.param)
    limits = [settle_max_tokens(options, len(prompt.token_ids), model) for prompt in prompts]
    sizes = [
        rows_nbytes(options, len(prompt.token_ids), limit, model)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    if not options.answer.stream:
        check_answer_nbytes(options, sum(sizes), state.config)
    bias = parse_logit_bias(options.logit_bias, model)
    requests = [_request(options, prompt, limit, bias) for prompt, limit in zip(prompts, limits, strict=True)]
    return Job(
        model=model,
        model_name=name,
        prompts=prompts,
        requests=requests,
        text=options.text,
        answer=options.answer,
        row_bytes=RowBytes(position_nbytes(options.outputs, model), max(sizes)),
        rows_param=options.rows_param,
    )


def _request(
    options: JobOptions, prompt: TokenizedPrompt, max_tokens: int, bias: dict[int, float]
) -> GenerationRequest:
    """The engine's request. Without a seed each prompt of a batch draws its own: equal prompts then differ."""
    seed = secrets.randbits(64) if options.seed is None else options.seed % 2**64
    outputs = options.outputs
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=prompt.token_ids,
        sampling=replace(options.sampling, max_tokens=max_tokens, logit_bias=bias, seed=seed),
        n=options.n,
        cache_salt=options.cache_salt,
        logprobs=outputs.logprobs,
        prompt_logprobs=outputs.prompt_logprobs,
        logits=outputs.logits,
        hidden_states=outputs.hidden_states,
        pooling=outputs.pooling,
        head=outputs.head,
    )
