"""Conversion of text to token ids and back, by the served model's tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from logitserve.errors import BadRequestError
from logitserve.text.chat_template import ChatTemplate, Turns, with_contents
from logitserve.text.control_tokens import ControlTokens, Span
from logitserve.text.token_table import TokenTable

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as a prompt. ``spans`` are its control tokens; None where it is encoded like any text."""

    text: str
    spans: list[Span] | None = None


class ModelTokenizer:
    """The tokenizer and chat template of the model that is served. Safe to use from several threads."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        """Read the tokenizer's files. Raises OSError, ValueError or UnsupportedDecoderError.

        ``chat_template`` takes the place of the directory's own.
        """
        tokenizer_json = (directory / "tokenizer.json").read_bytes()
        spec = orjson.loads(tokenizer_json)
        self.table = TokenTable(spec)
        self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        settings = _read_settings(directory)
        self._class_name: str = settings.get("tokenizer_class") or type(self._tokenizer).__name__
        self._special_tokens = _special_tokens(settings)
        source = chat_template or _chat_template(directory, settings)
        self._template = None if source is None else ChatTemplate(source, self._special_tokens)
        self.response_template: dict[str, Any] | None = settings.get("response_template")
        self._added_pattern = _one_of(entry["content"] for entry in spec.get("added_tokens", []))
        self._control_tokens = ControlTokens(self._tokenizer, spec, source or "")

    @property
    def has_template(self) -> bool:
        """Return whether messages can be rendered."""
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The chat template's source."""
        return None if self._template is None else self._template.source

    @property
    def knows_tools(self) -> bool:
        """Return whether the chat template reads the tools that a request lists."""
        return self._template is not None and self._template.knows_tools

    def writes(self, text: str) -> bool:
        """Return whether the chat template holds the text."""
        return self._template is not None and text in self._template.source

    def control_token_id(self, text: str) -> int | None:
        """Return the id of the control token that a text is; None where it is none."""
        token_id: int | None = self._tokenizer.token_to_id(text) if self._control_tokens.knows(text) else None
        return token_id

    def writes_images(self, mark: str) -> bool:
        """Return whether the chat template writes ``mark`` once for an image among the parts of a user's content."""
        return self._template is not None and self._template.writes_images(mark)

    def pieces(self, text: str) -> list[tuple[str, int | None]]:
        """Return the text in pieces: each an added token with its id, or text between these with None."""
        if self._added_pattern is None:
            return [(text, None)] if text else []
        pieces = self._added_pattern.split(text)
        return [
            (piece, self._tokenizer.token_to_id(piece) if i % 2 else None)
            for i, piece in enumerate(pieces)
            if piece
        ]

    def description(self) -> dict[str, Any]:
        """Return the facts that a client needs to tokenize alike, by the names of tokenizer_config.json."""
        return {
            "tokenizer_class": self._class_name,
            "vocab_size": self._tokenizer.get_vocab_size(with_added_tokens=True),
            **{name: self._special_tokens.get(name) for name in SPECIAL_TOKENS},
            "chat_template": self.chat_template,
        }

    def encode(self, text: str, *, add_special_tokens: bool, limit: int | None = None) -> list[int]:
        """Return the text's tokens, at most the last ``limit`` of them beside those that the tokenizer adds."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if limit is None or len(ids) <= limit:
            return ids
        is_added = encoding.special_tokens_mask
        num_before = next((i for i, added in enumerate(is_added) if not added), 0)
        num_after = next((i for i, added in enumerate(reversed(is_added)) if not added), 0)
        first = len(ids) - (limit - num_before)
        if first >= len(ids) - num_after:
            return ids[-limit:]  # not even room for one token of the text
        return ids[:num_before] + ids[first:]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, special ones included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary spells them."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def render(
        self, turns: Turns, *, control_tokens_in_messages: bool = False, as_parts: bool = False
    ) -> RenderedChat:
        """Return the prompt that the model's chat template makes of a conversation.

        With ``as_parts`` the template gets every content as a list of parts, otherwise as a text. Control tokens that texts spell are text, those of the assistant's own turns excepted, unless
        ``control_tokens_in_messages``. Raises BadRequestError.
        """
        if self._template is None:
            raise BadRequestError(
                "This model has no chat template for 'messages'; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        template, turns = self._template, with_contents(turns, as_parts=as_parts)
        texts = [[_texts(message) for message in turns.messages], *turns.variables.values(), turns.tools]
        try:
            if control_tokens_in_messages:
                return RenderedChat(template.render(turns))
            return RenderedChat(
                *self._control_tokens.render(texts, lambda change: template.render(_changed(turns, change)))
            )
        except RecursionError:
            param = "tools" if turns.tools else "chat_template_kwargs"
            raise BadRequestError(
                f"'{param}' holds values that are nested too deeply.", param=param
            ) from None

    def encode_chat(self, chat: RenderedChat, *, add_special_tokens: bool = False) -> list[int]:
        """Return a rendered conversation's tokens."""
        if chat.spans is None:
            return self.encode(chat.text, add_special_tokens=add_special_tokens)
        return self._control_tokens.encode(chat.text, chat.spans, add_special_tokens=add_special_tokens)

    def replace_marks(self, chat: RenderedChat, mark: str, texts: Sequence[str]) -> RenderedChat | None:
        """Return a conversation whose i-th control token ``mark`` is replaced by the i-th text; None if the numbers differ.

        Control tokens that ``texts`` spell are tokens.
        """
        replaced = self._control_tokens.replace(chat.text, chat.spans, mark, texts)
        return None if replaced is None else RenderedChat(*replaced)


def _changed(turns: Turns, change: Callable[[Any], Any]) -> Turns:
    messages = [{**message, **change(_texts(message))} for message in turns.messages]
    # A single word chooses among what the template knows.
    variables = {
        name: value if isinstance(value, str) and value.isalnum() else change(value)
        for name, value in turns.variables.items()
    }
    return replace(turns, messages=messages, variables=variables, tools=change(turns.tools))


def _texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message's members that the client wrote: none of an assistant's, and never the role."""
    if message["role"] == "assistant":
        return {}
    return {name: value for name, value in message.items() if name != "role"}


def _one_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds the longest of these texts at each place; None where there are none."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    settings: dict[str, Any] = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens that chat templates name. Older files write them as objects."""
    tokens: dict[str, Any] = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """Return chat_template.jinja, else the template in tokenizer_config.json.

    Several have names; "default" is taken.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
