"""Answers about the server, its model and its tokens."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from logitserve.http.openapi.answers.base import answer


@answer
class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]


@answer
class Readiness(TypedDict):
    """Requests are served."""

    status: Literal["ready"]


@answer
class Version(TypedDict):
    """The server's version."""

    version: str


@answer
class Model(TypedDict):
    """OpenAI's model object, and what a reader of logits needs to know."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens that a prompt and its answer may have together."""
    vocab_size: int
    """Columns of a whole row of logits."""
    hidden_size: int
    can_generate: bool
    """False for a classifier, which has no logits over a vocabulary."""
    images: bool
    """Whether messages may hold images."""
    heads: dict[str, int]
    """Value heads and classifiers by name, with the number of values that each gives per token."""
    architecture: str
    dtype: str
    weights: str
    """How linear layers store their weights, such as `stored (Q4_K, Q6_K)` or `dense`."""
    device: str
    kernels: str
    batch_invariant: bool
    """Whether the bits of a request's rows never depend on the requests beside it."""
    system_fingerprint: str
    """Digest of all that decides the bits of a row."""


@answer
class ModelList(TypedDict):
    """The model under each of its names."""

    object: Literal["list"]
    data: list[Model]


@answer
class Tokens(TypedDict):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The tokens as the vocabulary spells them, for return_token_strs."""


@answer
class Text(TypedDict):
    """The text of tokens, special ones included."""

    prompt: str


@answer
class TokenizerInfo(TypedDict):
    """Facts of the tokenizer, by the names of Hugging Face's tokenizer_config.json."""

    tokenizer_class: str
    vocab_size: int
    """Ids that the tokenizer knows, added tokens included; a row of logits may have more columns."""
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    sep_token: str | None
    cls_token: str | None
    mask_token: str | None
    chat_template: str | None
    """A Jinja template, for models of conversations."""
