"""Prompts from text, token ids or messages: tokenized off the event loop, within the model's bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from logitserve.errors import BadRequestError
from logitserve.state import Model, ServerState

CHARACTERS_PER_TOKEN = 4
"""Usual length of a token, by which text that waits to be tokenized is counted."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and lists of token ids that came in the field ``param``, a prompt each."""

    param: str
    prompts: Sequence[str | list[int]]
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the model's chat template makes one prompt of."""

    param: ClassVar[str] = "messages"

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    add_special_tokens: bool = False


PromptSource = Texts | Conversation


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt's tokens, and its text where it came as text."""

    token_ids: list[int]
    text: str | None


async def tokenize(source: PromptSource, state: ServerState) -> list[TokenizedPrompt]:
    """Return the prompts of ``source``, whatever ids the tokenizer gives.

    Raises ApiError, naming the source's field.
    """
    model = state.model()
    if isinstance(source, Texts):
        texts = [prompt for prompt in source.prompts if isinstance(prompt, str)]
        _check_length(max(map(len, texts), default=0), model, source.param)
        num_ids = sum(len(prompt) for prompt in source.prompts if not isinstance(prompt, str))
        num_tokens = num_ids + sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        work = partial(_from_texts, source, model)
    else:
        num_characters = sum(len(message["content"]) for message in source.messages)
        _check_length(num_characters, model, source.param)
        num_tokens = num_characters // CHARACTERS_PER_TOKEN
        work = partial(_from_messages, source, model)
    with state.queue.enter(num_tokens):
        return await state.tokenizer_workers.run(work, param=source.param)


def _from_texts(source: Texts, model: Model) -> list[TokenizedPrompt]:
    encode = model.tokenizer.encode
    return [
        TokenizedPrompt(encode(prompt, add_special_tokens=source.add_special_tokens), prompt)
        if isinstance(prompt, str)
        else TokenizedPrompt(prompt, None)
        for prompt in source.prompts
    ]


def _from_messages(source: Conversation, model: Model) -> list[TokenizedPrompt]:
    text = model.tokenizer.render(source.messages, add_generation_prompt=source.add_generation_prompt)
    _check_length(len(text), model, source.param)
    return [TokenizedPrompt(model.tokenizer.encode(text, add_special_tokens=source.add_special_tokens), text)]


def _check_length(num_characters: int, model: Model, param: str) -> None:
    """Refuse text that no tokens of the model can make short enough. Raises BadRequestError."""
    if num_characters > model.longest_prompt:
        raise BadRequestError(
            f"'{param}' has {num_characters} characters; nothing over {model.longest_prompt} can fit the context.",
            param=param,
            code="context_length_exceeded",
        )
