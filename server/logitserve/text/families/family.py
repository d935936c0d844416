"""How a family of models writes its thinking and its calls, as its file declares it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from logitserve.text.parser import TextParser
    from logitserve.text.tools import Tool


class _Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what a family's file declares: a name that is not known is an error."""


class ReasoningSyntax(_Declaration):
    """Strings around the thinking, as the model or its chat template writes them."""

    open: str
    close: str


class CallSyntax(_Declaration):
    """How one answer's calls are written, with the white space that the model itself writes.

        begin open … close between open … close end

    A reader is more lenient than that about white space.

    Attributes:
        form: what stands between ``open`` and ``close``. "object": ``{"name": NAME, "arguments": {…}}``. "list": objects
            of that kind, with commas; ``open`` and ``close`` stand once around all of them. "named": NAME middle ``{…}``.
            "xml": ``<function=NAME>`` and ``<parameter=KEY>`` elements. "gemma": ``call:NAME{KEY:VALUE,…}``.
        quote: what stands around strings instead of quotation marks ("gemma").
        listed_names: whether only calls of tools that the request lists are calls, as JSON may be an answer too.
        ends_with_answer: whether the end of the answer closes a call, as the closing string is a stop token.
    """

    form: Literal["object", "list", "named", "xml", "gemma"]
    open: str
    close: str
    begin: str = ""
    end: str = ""
    between: str = ""
    middle: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    quote: str = ""
    listed_names: bool = False
    ends_with_answer: bool = False


class Detection(_Declaration):
    """Signs of a family: all strings of one of the lists stand in the chat template."""

    templates: list[list[str]] = []
    architectures: list[str] = []


class Family(_Declaration):
    """A family of models.

    Attributes:
        call_id: the ids of its calls: "openai" is ``call_`` and 24 characters, "mistral" 9 letters and digits.
        turn: strings with which chat templates open the assistant's turn.
    """

    name: str
    detect: Detection = Detection()
    turn: list[str] = []
    reasoning: ReasoningSyntax | None = None
    calls: CallSyntax | None = None
    call_id: Literal["openai", "mistral"] = "openai"

    def parser(
        self,
        prompt: str,
        *,
        tools: Sequence[Tool],
        parses_calls: bool,
        hidden: frozenset[str] = frozenset(),
    ) -> TextParser:
        """Return a parser of one choice's text.

        Args:
            prompt: the prompt's text, since a template may open the thinking; "" where it is unknown.
            hidden: special tokens that the parser sees and that content does not show.
        """
        raise NotImplementedError
