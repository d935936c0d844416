"""Text, token ids or messages as prompts: tokenized off the event loop, within every bound that the model sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logitserve.jobs.bounds import check_ids, check_length, too_large
from logitserve.protocol.chat import Message
from logitserve.protocol.inputs import InputBody, InputOrMessagesBody, Prompt
from logitserve.state import Model, ServerState


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt's tokens, and its text where it came as text."""

    token_ids: list[int]
    text: str | None


async def from_texts(
    prompts: Sequence[Prompt], param: str, state: ServerState, *, add_special_tokens: bool
) -> list[PreparedPrompt]:
    """Each text or list of token ids as a prompt. Raises ApiError, naming ``param``."""
    model = state.model()
    if len(prompts) > state.config.max_batch_prompts:
        raise too_large(param, len(prompts), state.config.max_batch_prompts, "prompts")
    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(len(prompt), model, param)
        else:
            check_ids(prompt, model, param)

    def tokenize() -> list[PreparedPrompt]:
        return [_prepare(prompt, model, add_special_tokens=add_special_tokens) for prompt in prompts]

    return _checked(await state.tokenizer_workers.run(tokenize, param=param), model, param)


def _checked(prompts: list[PreparedPrompt], model: Model, param: str) -> list[PreparedPrompt]:
    """The prompts, whose tokens the model all has: a tokenizer may know more, from other models of its family."""
    for prompt in prompts:
        check_ids(prompt.token_ids, model, param)
    return prompts


def _prepare(prompt: Prompt, model: Model, *, add_special_tokens: bool) -> PreparedPrompt:
    if isinstance(prompt, str):
        return PreparedPrompt(model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt)
    return PreparedPrompt(prompt, None)


async def from_messages(
    messages: Sequence[Message], state: ServerState, *, add_generation_prompt: bool
) -> PreparedPrompt:
    """A conversation under the model's chat template. Raises ApiError."""
    model = state.model()
    fields = [message.for_template() for message in messages]
    check_length(sum(len(message["content"]) for message in fields), model, "messages")

    def tokenize() -> PreparedPrompt:
        text = model.tokenizer.render(fields, add_generation_prompt=add_generation_prompt)
        check_length(len(text), model, "messages")
        return PreparedPrompt(model.tokenizer.encode(text, add_special_tokens=False), text)

    (prompt,) = _checked([await state.tokenizer_workers.run(tokenize, param="messages")], model, "messages")
    return prompt


async def from_input(body: InputBody | InputOrMessagesBody, state: ServerState) -> list[PreparedPrompt]:
    """What the body gives to read: its inputs, or its messages as the only one. Raises ApiError."""
    if isinstance(body, InputOrMessagesBody) and body.messages is not None:
        return [await from_messages(body.messages, state, add_generation_prompt=body.add_generation_prompt)]
    return await from_texts(body.input or [], "input", state, add_special_tokens=body.add_special_tokens)


def input_param(body: InputBody | InputOrMessagesBody) -> str:
    """The field that the prompts came from."""
    return "input" if body.input is not None else "messages"
