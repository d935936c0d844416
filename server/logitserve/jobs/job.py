"""Making of a Job from options: prompts are tokenized, every bound is checked, and nothing is queued."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from logitengine.link.messages import GenerationRequest
from msgspec.structs import replace

from logitserve.access.caller import Caller
from logitserve.images.memory import HeldImages
from logitserve.jobs.calls import CallOptions, answer_source, settle_tools
from logitserve.jobs.grammar import check_grammar
from logitserve.jobs.limits import RowBytes, check_options, settle_bounds
from logitserve.jobs.options import AnswerOptions, JobOptions, TextOptions
from logitserve.jobs.prompts import TokenizedPrompt, tokenize
from logitserve.state import Model, ServerState
from logitserve.text.families.family import Family


@dataclass(frozen=True, slots=True)
class Job:
    """The engine's work for one API request, and the facts that its answer needs.

    Attributes:
        prompts, requests: one of each for every prompt. All requests ask for the same outputs of the same ``n`` choices.
        family: how thinking and calls are told from the text; None where all is text.
        rows_param, grammar_param: the fields of the request that ask for rows and hold a grammar, for error messages.
    """

    model: Model
    model_name: str
    prompts: Sequence[TokenizedPrompt]
    requests: Sequence[GenerationRequest]
    text: TextOptions
    calls: CallOptions
    family: Family | None
    answer: AnswerOptions
    row_bytes: RowBytes
    rows_param: str
    grammar_param: str | None

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
        """Return whether rows come back, and with them the ids of the tokens that they belong to."""
        return self.requests[0].logits is not None or self.requests[0].hidden_states is not None


async def make_job(
    options: JobOptions, state: ServerState, caller: Caller, held: HeldImages | None = None
) -> Job:
    """Check and tokenize. The prompts' cached prefixes are the caller's own. Raises ApiError.

    ``held`` counts the bytes of images, where the prompts may have any.
    """
    model = state.model()
    name = model.check_name(options.model)
    check_options(options, model)
    source, family = settle_tools(options.prompts, options.calls, model)
    # A grammar that cannot be honoured is named before that of the whole answer is made.
    form = options.grammar
    grammar = None if form is None else await check_grammar(form, state)
    wanted = options.max_tokens
    reserved = (options.default_max_tokens or 1) if wanted is None else wanted
    prompts = await tokenize(source, state, reserved_tokens=reserved, held=held)
    if options.text.has_parts:
        form = answer_source(options.grammar, options.calls, family, prompts[0], model)
        if form is not None and form is not options.grammar:
            grammar = await check_grammar(form, state)
    bounds = settle_bounds(options, [prompt.token_ids for prompt in prompts], model, state.config)
    cache_salt = caller.cache_salt(options.cache_salt)
    requests = [
        _request(options, prompt, max_tokens, bounds.logit_bias, cache_salt, grammar)
        for prompt, max_tokens in zip(prompts, bounds.max_tokens, strict=True)
    ]
    return Job(
        model=model,
        model_name=name,
        prompts=prompts,
        requests=requests,
        text=options.text,
        calls=options.calls,
        family=family if options.text.has_parts else None,
        answer=options.answer,
        row_bytes=bounds.row_bytes,
        rows_param=options.rows_param,
        grammar_param=None if form is None else form.param,
    )


def _request(
    options: JobOptions,
    prompt: TokenizedPrompt,
    max_tokens: int,
    bias: dict[int, float],
    cache_salt: str | None,
    grammar: str | None,
) -> GenerationRequest:
    """Return the engine's request.

    Without a seed each prompt of a batch draws its own: equal prompts then differ.
    """
    seed = secrets.randbits(64) if options.seed is None else options.seed % 2**64
    outputs = options.outputs
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=prompt.token_ids,
        items=prompt.items,
        sampling=replace(options.sampling, max_tokens=max_tokens, logit_bias=bias, seed=seed),
        n=options.n,
        cache_salt=cache_salt,
        grammar=grammar if max_tokens else None,
        logprobs=outputs.logprobs,
        prompt_logprobs=outputs.prompt_logprobs,
        logits=outputs.logits,
        hidden_states=outputs.hidden_states,
        pooling=outputs.pooling,
        head=outputs.head,
    )
