"""``input``, or ``messages`` in its place: the fields of endpoints that read a prompt and do not continue it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.protocol.base import IGNORED_FIELDS, CacheSalt, RequestBody
from logitserve.protocol.chat import Messages, TemplateFields
from logitserve.protocol.limits import at_most_items, at_most_of, config_of, too_large
from logitserve.protocol.rows import MOST_TOKEN_IDS, TokenId

Prompt = str | list[int]


def is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_TOKEN_IDS
        and all(type(item) is int and 0 <= item <= LARGEST_ID for item in value)
    )


def _as_prompts(value: Any, info: ValidationInfo) -> list[Prompt]:
    """Return a string, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if isinstance(value[0], int) and is_token_ids(value):
            return [value]
        limit = config_of(info).max_batch_prompts
        if len(value) > limit and isinstance(value[0], str | list):
            raise too_large(str(info.field_name), len(value), limit, "prompts")
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and is_token_ids(item) for item in value):
            return list(value)
    msg = "must be a string, a list of token ids, or a list of strings or of lists of token ids, not empty"
    raise ValueError(msg)


_Ids = Annotated[list[TokenId], at_most_of(MOST_TOKEN_IDS, "ids")]
_Batch = at_most_items("max_batch_prompts", "prompts")
_OneOrMany = (
    str
    | Annotated[_Ids, Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1), _Batch]
    | Annotated[list[_Ids], Field(min_length=1), _Batch]
)
Prompts = Annotated[list[Prompt], PlainValidator(_as_prompts, json_schema_input_type=_OneOrMany)]


def _not_zero(value: int | None) -> int | None:
    if value == 0:
        msg = "must be -1 or at least 1"
        raise ValueError(msg)
    return value


TruncatePromptTokens = Annotated[
    Annotated[int, Field(ge=-1, le=LARGEST_ID)] | None, AfterValidator(_not_zero)
]


class InputBody(RequestBody):
    """A model and what it reads. Special tokens are added to text as they are to a completions prompt."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)

    model: str | None = None
    input: Prompts
    """A text or its token ids, or a list of texts or of lists of ids."""
    add_special_tokens: bool = True
    truncate_prompt_tokens: TruncatePromptTokens = None
    """Keeps the last tokens of each input; -1: as many as the context holds."""
    cache_salt: CacheSalt | None = None

    def check(self) -> None:
        """Check the fields against each other. Raises BadRequestError with the field to change."""


class InputOrMessagesBody(TemplateFields):
    """The same, or a conversation under the chat template."""

    ignored: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)

    model: str | None = None
    input: Prompts | None = None
    """A text or its token ids, or a list of texts or of lists of ids. Either this or `messages` is needed."""
    messages: Messages | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    truncate_prompt_tokens: TruncatePromptTokens = None
    """Keeps the last tokens of each prompt; -1: as many as the context holds."""
    add_generation_prompt: bool = False
    cache_salt: CacheSalt | None = None

    def check(self) -> None:
        """Raise BadRequestError unless exactly one of ``input`` and ``messages`` is given."""
        if (self.input is None) == (self.messages is None):
            raise BadRequestError("Exactly one of 'input' and 'messages' is needed.", param="input")
        self.check_template()
