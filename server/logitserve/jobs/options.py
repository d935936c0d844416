"""A request in the same words whatever endpoint it came by. A body ends here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from logitengine.link.messages import HeadSpec, HiddenStatesSpec, LogitsSpec, OutputSpec, SamplingParams

from logitserve.grammars.source import GrammarSource
from logitserve.jobs.calls import CallOptions
from logitserve.jobs.prompts import Conversation, PromptSource, Texts
from logitserve.protocol.chat import ChatBody, Message, TemplateFields, for_template, images_of
from logitserve.protocol.completions import CompletionBody
from logitserve.protocol.generation import GenerationBody, SamplingBody, StreamOptions
from logitserve.protocol.inputs import InputBody, InputOrMessagesBody
from logitserve.protocol.logits import LogitsBody
from logitserve.protocol.rows import Encoding, ReturnLogits
from logitserve.protocol.tokens import TokenizeBody
from logitserve.protocol.tools import ToolFields
from logitserve.text.chat_template import Turns

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing a float32 logit by them would overflow."""

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How a choice's tokens become text, and which strings end it.

    Attributes:
        has_parts: whether thinking and calls are told from the text, as chats have them.
    """

    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    has_parts: bool = False


@dataclass(frozen=True, slots=True)
class BestChoices:
    """How many of a prompt's choices are returned, and the ``logprobs`` that the request asked for."""

    n: int
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How the answer is written."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """Whether every chunk has the counts of tokens so far."""
    best: BestChoices | None = None
    """The choices that are returned; None: all."""
    return_token_ids: bool = False
    echo: bool = False
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are shown beside each prompt token; None: no prompt_logprobs."""
    logits_encoding: Encoding = "base64"
    hidden_states_encoding: Encoding = "base64"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Everything a request asks for.

    The request's limit, bias and seed are settled for each prompt and then part of its ``sampling``: ``max_tokens`` None is
    the default or what the context leaves, ``logit_bias`` has JSON's keys, and without a ``seed`` one is drawn.
    ``logprobs_param`` and ``rows_param`` are the fields that ask for these, and ``columns_prefix`` stands before the names of
    its members: all three are for error messages.
    """

    model: str | None
    prompts: PromptSource
    sampling: SamplingParams
    max_tokens: int | None
    default_max_tokens: int | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    outputs: OutputSpec
    cache_salt: str | None = None
    grammar: GrammarSource | None = None
    calls: CallOptions = field(default_factory=CallOptions)
    text: TextOptions = TextOptions()
    answer: AnswerOptions = AnswerOptions()
    logprobs_param: str = "logprobs"
    rows_param: str = "return_logits"
    columns_prefix: str = "return_logits."


def chat_options(body: ChatBody) -> JobOptions:
    options = _generation_options(
        body,
        prompts=_conversation(body, body.messages),
        max_tokens=body.token_limit,
        default_max_tokens=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_param="top_logprobs",
    )
    calls = call_options(body, parallel=body.parallel_tool_calls)
    return replace(options, calls=calls, text=replace(options.text, has_parts=True))


def completion_options(body: CompletionBody) -> JobOptions:
    return _generation_options(
        body,
        prompts=Texts(
            "prompt",
            body.prompt,
            add_special_tokens=body.add_special_tokens,
            truncate_to=body.truncate_prompt_tokens,
        ),
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        echo=body.echo,
        best_of=body.best_of,
    )


def logits_options(body: LogitsBody, *, as_arrow: bool) -> JobOptions:
    """Options of a logits request. An Arrow stream has the log-probability of each row's token, JSON has not."""
    logits = _logits_spec(body)
    hidden_states = HiddenStatesSpec(positions=body.positions, dtype=body.dtype)
    encoding = _encoding(body)
    return JobOptions(
        model=body.model,
        prompts=input_prompts(body),
        sampling=_sampling(body, top_k=0),
        max_tokens=body.max_tokens,
        logit_bias=body.logit_bias,
        seed=body.seed,
        outputs=OutputSpec(
            logits=logits,
            logprobs=0 if as_arrow and logits.wants_generated else None,
            prompt_logprobs=0 if as_arrow and logits.wants_prompt else None,
            hidden_states=hidden_states if body.hidden_states else None,
        ),
        cache_salt=body.cache_salt,
        grammar=body.grammar,
        text=TextOptions(stop=body.stop),
        answer=AnswerOptions(stream=as_arrow, logits_encoding=encoding, hidden_states_encoding=encoding),
        rows_param="input",
        columns_prefix="",
    )


def reading_options(body: InputBody | InputOrMessagesBody, outputs: OutputSpec) -> JobOptions:
    """Options of a request whose prompts are read and not continued."""
    return JobOptions(
        model=body.model,
        prompts=input_prompts(body),
        sampling=SamplingParams(max_tokens=0),
        max_tokens=0,
        outputs=outputs,
        cache_salt=body.cache_salt,
        rows_param="input",
    )


def head_outputs(name: str, *, every_position: bool = False) -> OutputSpec:
    return OutputSpec(head=HeadSpec(name=name, every_position=every_position))


def input_prompts(body: InputBody | InputOrMessagesBody) -> PromptSource:
    """The body's inputs, or its messages as the only prompt."""
    if isinstance(body, InputOrMessagesBody) and body.messages is not None:
        return _conversation(body, body.messages, truncate_to=body.truncate_prompt_tokens)
    return Texts(
        "input",
        body.input or [],
        add_special_tokens=body.add_special_tokens,
        truncate_to=body.truncate_prompt_tokens,
    )


def tokenize_prompts(body: TokenizeBody) -> PromptSource:
    """The body's text or messages. A template writes special tokens itself, so they are added to text alone by default."""
    if body.prompt is not None:
        return Texts("prompt", [body.prompt], add_special_tokens=body.add_special_tokens is not False)
    return _conversation(body, body.messages or [], add_special_tokens=body.add_special_tokens is True)


def call_options(body: ToolFields, *, parallel: bool = True) -> CallOptions:
    """Return what the body lets the model call."""
    return CallOptions(
        tools=[definition.tool for definition in body.tools],
        must_call=body.tool_mode == "required",
        may_call=body.tool_mode != "none",
        named=body.named_tool,
        parallel=parallel,
    )


def _conversation(
    body: TemplateFields,
    messages: Sequence[Message],
    *,
    add_special_tokens: bool = False,
    truncate_to: int | None = None,
) -> Conversation:
    turns = Turns(
        for_template(messages),
        add_generation_prompt=body.opens_turn,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        tools=[tool.for_template() for tool in body.tools] if isinstance(body, ToolFields) else [],
        reasoning_effort=body.reasoning_effort if isinstance(body, ToolFields) else None,
    )
    return Conversation(turns, add_special_tokens, truncate_to, images_of(messages))


def _generation_options(
    body: GenerationBody,
    *,
    prompts: PromptSource,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    logprobs_param: str = "logprobs",
    echo: bool = False,
    best_of: int | None = None,
) -> JobOptions:
    logits, hidden_states = body.return_logits, body.return_hidden_states
    stream_options = body.stream_options or StreamOptions()
    best = None
    if best_of is not None and best_of > body.n:
        best = BestChoices(body.n, logprobs)
    prompt_logprobs = body.prompt_logprobs
    if echo and logprobs is not None:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    spec = None
    if hidden_states is not None:
        spec = HiddenStatesSpec(positions=hidden_states.positions, dtype=hidden_states.dtype)
    return JobOptions(
        model=body.model,
        prompts=prompts,
        sampling=_sampling(body, top_k=max(body.top_k, 0)),
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        logit_bias=body.logit_bias,
        seed=body.seed,
        n=body.n if best_of is None else best_of,
        outputs=OutputSpec(
            logits=None if logits is None else _logits_spec(logits),
            logprobs=0 if best is not None and logprobs is None else logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden_states=spec,
        ),
        cache_salt=body.cache_salt,
        grammar=body.grammar,
        text=TextOptions(stop=body.stop, skip_special_tokens=body.skip_special_tokens),
        answer=AnswerOptions(
            stream=body.stream,
            include_usage=stream_options.include_usage,
            continuous_usage=stream_options.continuous_usage_stats,
            best=best,
            return_token_ids=body.return_token_ids,
            echo=echo,
            prompt_logprobs=body.prompt_logprobs,
            logits_encoding="base64" if logits is None else _encoding(logits),
            hidden_states_encoding="base64" if hidden_states is None else hidden_states.encoding or "base64",
        ),
        logprobs_param=logprobs_param,
        rows_param=_rows_param(body, logprobs_param),
    )


def _rows_param(body: GenerationBody, logprobs_param: str) -> str:
    """The field that makes the answer long."""
    if body.return_logits is not None:
        return "return_logits"
    return logprobs_param if body.return_hidden_states is None else "return_hidden_states"


def _encoding(logits: ReturnLogits) -> Encoding:
    return logits.encoding or logits.default_encoding


def _logits_spec(logits: ReturnLogits) -> LogitsSpec:
    return LogitsSpec(
        positions=logits.positions,
        stage=logits.stage,
        top_k=logits.top_k,
        token_ids=None if logits.token_ids is None else tuple(logits.token_ids),
        dtype=logits.dtype,
    )


def _sampling(body: SamplingBody, *, top_k: int) -> SamplingParams:
    """How tokens are drawn. No probability at all leaves the likeliest token, as temperature 0 does."""
    return SamplingParams(
        max_tokens=0,
        min_tokens=body.min_tokens,
        temperature=0.0 if body.temperature < GREEDY_BELOW or body.top_p == 0 else body.temperature,
        top_k=top_k,
        top_p=body.top_p or 1.0,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
    )
