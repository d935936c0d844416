"""Conversion of text to token ids and back, by the served model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from logitserve.errors import BadRequestError
from logitserve.text.token_table import TokenTable

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelTokenizer:
    """The tokenizer and chat template of the model that is served. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        """Read the tokenizer's files. Raises OSError, ValueError or UnsupportedDecoderError."""
        tokenizer_json = (directory / "tokenizer.json").read_bytes()
        self.table = TokenTable(orjson.loads(tokenizer_json))
        self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        settings = _read_settings(directory)
        self._class_name: str = settings.get("tokenizer_class") or type(self._tokenizer).__name__
        self._special_tokens = _special_tokens(settings)
        self._template = _chat_template(directory, settings)

    @property
    def has_template(self) -> bool:
        """Return whether messages can be rendered."""
        return self._template is not None

    def description(self) -> dict[str, Any]:
        """Return the facts that a client needs to tokenize alike, by the names of tokenizer_config.json."""
        return {
            "tokenizer_class": self._class_name,
            "vocab_size": self._tokenizer.get_vocab_size(with_added_tokens=True),
            **{name: self._special_tokens.get(name) for name in SPECIAL_TOKENS},
            "chat_template": self._template,
        }

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, special ones included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary spells them."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the prompt that the model's chat template makes of ``messages``. Raises BadRequestError."""
        if self._template is None:
            raise BadRequestError(
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )[0]
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BadRequestError(
                f"The model's chat template refuses these messages: {str(error)[:200]}", param="messages"
            ) from error
        text: str = rendered[0]
        return text


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
