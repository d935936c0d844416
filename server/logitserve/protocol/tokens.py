"""``POST /tokenize`` and ``POST /detokenize``, in the shapes that vLLM's users know."""

from __future__ import annotations

from pydantic import Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import RequestBody
from logitserve.protocol.chat import Messages, TemplateFields
from logitserve.protocol.rows import TokenIds
from logitserve.protocol.tools import ToolFields


class TokenizeBody(ToolFields, TemplateFields):
    """Text or messages to tokenize. Special tokens are added to text by default, to messages by their template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    def check(self) -> None:
        """Raise BadRequestError unless exactly one of ``prompt`` and ``messages`` is given."""
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("Exactly one of 'prompt' and 'messages' is needed.", param="prompt")
        self.check_template()
        self.check_tools()


class DetokenizeBody(RequestBody):
    """Token ids to turn into text, special tokens included."""

    model: str | None = None
    tokens: TokenIds

    def check(self) -> None:
        """Check nothing: single fields are all there is."""
