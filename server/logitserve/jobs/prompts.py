"""Prompts from text, token ids or messages: tokenized off the event loop, within the model's bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from logitengine.images.messages import PreparedImage
from logitengine.link.messages import PromptItem

from logitserve.errors import BadRequestError
from logitserve.images.expansion import expand
from logitserve.images.memory import HeldImages
from logitserve.images.preparation import prepare_images
from logitserve.protocol.chat import SentImage
from logitserve.protocol.limits import too_large
from logitserve.state import Model, ServerState
from logitserve.text.chat_template import Turns

CHARACTERS_PER_TOKEN = 4
"""Usual length of a token, by which text that waits to be tokenized is counted."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and lists of token ids that came in the field ``param``, a prompt each.

    ``truncate_to`` is the number of last tokens that are kept of each; -1: as many as there is room for; None: all.
    """

    param: str
    prompts: Sequence[str | list[int]]
    add_special_tokens: bool = True
    truncate_to: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that the model's chat template makes one prompt of. ``truncate_to`` is that of Texts."""

    param: ClassVar[str] = "messages"

    turns: Turns
    add_special_tokens: bool = False
    truncate_to: int | None = None
    images: Sequence[SentImage] = ()


PromptSource = Texts | Conversation


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt's tokens, and its text where it came as text and is whole. ``items`` are its images."""

    token_ids: list[int]
    text: str | None
    items: list[PromptItem] = field(default_factory=list)


async def tokenize(
    source: PromptSource, state: ServerState, *, reserved_tokens: int = 0, held: HeldImages | None = None
) -> list[TokenizedPrompt]:
    """Return the prompts of ``source``, whatever ids the tokenizer gives.

    A prompt that may be cut leaves room for ``reserved_tokens`` in the context. ``held`` counts the bytes of images, where
    the source may have any. Raises ApiError, naming the source's field.
    """
    model = state.model()
    limit = _limit(source.truncate_to, reserved_tokens, model)
    if isinstance(source, Texts):
        texts = [prompt for prompt in source.prompts if isinstance(prompt, str)]
        _check_length(max(map(len, texts), default=0), model, source.param)
        num_ids = sum(len(prompt) for prompt in source.prompts if not isinstance(prompt, str))
        num_tokens = num_ids + sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        with state.queue.enter(num_tokens):
            work = partial(_from_texts, source, limit, model)
            return await state.tokenizer_workers.run(work, param=source.param)
    # All of it is searched for control tokens, whatever the template reads.
    num_characters = _num_characters(source.turns.messages)
    _check_length(num_characters, model, source.param)
    num_tool_characters = _num_characters(source.turns.tools)
    _check_length(num_tool_characters, model, "tools")
    num_characters += num_tool_characters
    _check_length(_num_characters(source.turns.variables), model, "chat_template_kwargs")
    _check_images(source, model)
    with state.queue.enter(num_characters // CHARACTERS_PER_TOKEN):
        images = await _prepared(source, state, held)
        work = partial(_from_messages, source, images, limit, model, state.config.control_tokens_in_messages)
        return await state.tokenizer_workers.run(work, param=source.param)


def _check_images(source: Conversation, model: Model) -> None:
    """Refuse images that the model cannot read, or that a cut could part. Raises BadRequestError."""
    if not source.images:
        return
    if model.image_mark is None:
        raise BadRequestError(
            f"'messages' holds an image, and this model ({model.names[0]}) reads text only.",
            param=source.param,
            code="images_not_supported",
        )
    if not model.image_mark.in_template:
        raise BadRequestError(
            f"'messages' holds an image, and the chat template of this model ({model.names[0]}) has no place for one.",
            param=source.param,
            code="images_not_supported",
        )
    if source.truncate_to is not None:
        raise BadRequestError(
            "'truncate_prompt_tokens' cannot be kept where 'messages' holds images.",
            param="truncate_prompt_tokens",
        )


async def _prepared(source: Conversation, state: ServerState, held: HeldImages | None) -> list[PreparedImage]:
    if not source.images:
        return []
    assert state.images is not None  # noqa: S101 - a model with a mark has a preparer
    assert held is not None  # noqa: S101 - endpoints that take messages count what they hold
    return await prepare_images(source.images, state.image_sources, state.images, held)


def _limit(truncate_to: int | None, reserved_tokens: int, model: Model) -> int | None:
    """Return the most tokens to keep of a prompt; None where none may be cut. Raises BadRequestError."""
    context = model.info.max_model_len
    if truncate_to is not None and truncate_to > context:
        raise too_large("truncate_prompt_tokens", truncate_to, context, "tokens (--max-model-len)")
    return max(1, context - reserved_tokens) if truncate_to == -1 else truncate_to


def _from_texts(source: Texts, limit: int | None, model: Model) -> list[TokenizedPrompt]:
    return [_from_text(prompt, source, limit, model) for prompt in source.prompts]


def _from_text(prompt: str | list[int], source: Texts, limit: int | None, model: Model) -> TokenizedPrompt:
    if not isinstance(prompt, str):
        return TokenizedPrompt(prompt if limit is None else prompt[-limit:], None)
    add = source.add_special_tokens
    if limit is None:
        return TokenizedPrompt(model.tokenizer.encode(prompt, add_special_tokens=add), prompt)
    token_ids = model.tokenizer.encode(prompt, add_special_tokens=add, limit=limit)
    return TokenizedPrompt(token_ids, prompt if len(token_ids) < limit else None)


def _from_messages(
    source: Conversation,
    images: Sequence[PreparedImage],
    limit: int | None,
    model: Model,
    control_tokens_in_messages: bool,  # noqa: FBT001 - partial() hands it over
) -> list[TokenizedPrompt]:
    tokenizer, mark, add = model.tokenizer, model.image_mark, source.add_special_tokens
    chat = tokenizer.render(
        source.turns,
        control_tokens_in_messages=control_tokens_in_messages,
        as_parts=mark is not None and mark.in_template,
    )
    _check_length(len(chat.text), model, source.param)
    items: list[PromptItem] = []
    if mark is None:
        token_ids = tokenizer.encode_chat(chat, add_special_tokens=add)
    else:
        token_ids, items = expand(chat, images, mark, tokenizer, add_special_tokens=add)
    if limit is None or len(token_ids) <= limit:
        return [TokenizedPrompt(token_ids, chat.text, items)]
    return [TokenizedPrompt(token_ids[-limit:], None)]


def _num_characters(value: Any) -> int:
    """Return the length of all texts in ``value``, names of members included, however deep they are nested."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
    return total


def _check_length(num_characters: int, model: Model, param: str) -> None:
    """Refuse text that no tokens of the model can make short enough. Raises BadRequestError.

    This holds for text that may be cut too: to tokenize it takes seconds in which the interpreter does nothing else.
    """
    if num_characters > model.longest_prompt:
        raise context_exceeded(
            model,
            param,
            f"'{param}' has {num_characters} characters, and nothing over {model.longest_prompt} fits",
        )


def context_exceeded(model: Model, param: str, what: str) -> BadRequestError:
    """Return the refusal of a prompt that does not fit, in OpenAI's words, by which clients recognise it.

    ``what`` is too long; ``param`` is the field to change.
    """
    return BadRequestError(
        f"This model's maximum context length is {model.info.max_model_len} tokens. However, {what}. Please shorten "
        "the input or the completion; the server's limit is --max-model-len.",
        param=param,
        code="context_length_exceeded",
    )
