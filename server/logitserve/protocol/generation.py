"""The fields of sampling, and those that chat and completions share beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from logitserve.config import LARGEST_ID
from logitserve.errors import BadRequestError
from logitserve.grammars.source import GrammarSource
from logitserve.protocol.base import CacheSalt, RequestBody, StrictModel, without_nulls
from logitserve.protocol.limits import at_most, at_most_items, at_most_members, config_of, too_large
from logitserve.protocol.rows import ReturnHiddenStates, ReturnLogits, TokenId, all_or
from logitserve.protocol.structured import VLLMS_OLDER_FIELDS, ResponseFormat, StructuredOutputs

SMALLEST_SEED = -(2**63)
LARGEST_SEED = 2**64 - 1


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bounded_length(stop: list[str], info: ValidationInfo) -> list[str]:
    longest, limit = max(map(len, stop), default=0), config_of(info).max_stop_length
    if longest > limit:
        raise too_large("stop", longest, limit, "characters long")
    return stop


_Strings = Annotated[
    list[str],
    Field(fail_fast=True),
    AfterValidator(_bounded_length),
    at_most_items("max_stop", "strings"),
]
StopStrings = Annotated[_Strings, BeforeValidator(_one_or_many, json_schema_input_type=str | _Strings)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(StrictModel):
    """Options of a stream; ``include_obfuscation`` is accepted and pads nothing."""

    include_usage: bool = False
    """Adds a chunk with the counts of tokens at the end."""
    continuous_usage_stats: bool = False
    """Adds the counts so far to every chunk."""
    include_obfuscation: bool = False


class SamplingBody(RequestBody):
    """How tokens are drawn and when to stop: OpenAI's names, meanings and bounds, and what vLLM's users know.

    The sampler's ``top_k`` is missing: where columns of logits are chosen beside these fields, the name is theirs.
    """

    successors: ClassVar[Mapping[str, str]] = VLLMS_OLDER_FIELDS

    model: str | None = None
    """One of the names that /v1/models lists; the first by default."""
    max_tokens: int | None = Field(None, ge=0, le=LARGEST_ID)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    """Share of the probability that the likeliest tokens to draw from have; 0: the likeliest token."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Smallest probability of a token to draw, as a share of the likeliest token's."""
    stop: StopStrings = Field([])
    seed: int | None = Field(None, ge=SMALLEST_SEED, le=LARGEST_SEED)
    """Requests that are equal, their seed included, draw equal tokens."""
    logit_bias: Annotated[
        dict[str, Bias],
        BeforeValidator(without_nulls, json_schema_input_type=dict[str, Bias | None]),
        at_most_members("max_logit_bias", "entries"),
    ] = Field({})
    """Token ids, as strings, and what is added to their logits before the draw."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    """Divides positive logits of tokens of the prompt and the answer, and multiplies negative ones."""
    min_tokens: int = Field(0, ge=0, le=LARGEST_ID)
    """Tokens before which nothing ends the answer."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True), at_most_items("max_stop", "ids")] = Field(
        []
    )
    ignore_eos: bool = False
    """Goes on after the model's own end."""
    cache_salt: CacheSalt | None = None
    """Cached prefixes are shared by requests with the same salt only."""
    response_format: ResponseFormat | None = None
    """The form of the answer's text: any JSON object, or JSON of a schema."""
    structured_outputs: StructuredOutputs | None = None
    """What the answer's text must follow, in place of `response_format`."""

    @property
    def grammar(self) -> GrammarSource | None:
        """What the text must follow, if anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.source
        return None if self.response_format is None else self.response_format.source

    def check(self) -> None:
        """Check the fields against each other. Raises BadRequestError with the field to change."""
        if self.response_format is not None:
            self.response_format.check()
        if self.structured_outputs is not None:
            self.structured_outputs.check()
            if self.response_format is not None and self.response_format.type != "text":
                raise BadRequestError(
                    "'response_format' and 'structured_outputs' exclude each other.",
                    param="structured_outputs",
                )
        if any(not text for text in self.stop):
            raise BadRequestError("'stop' holds an empty string.", param="stop")


class GenerationBody(SamplingBody):
    """Fields that chat and completions add: choices, streaming, and what to report beside the text."""

    n: Annotated[int, at_most("max_n")] = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=-1, le=LARGEST_ID)
    """Likeliest tokens to draw from; 0 and -1: all."""
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    """Adds `token_ids` to choices, and `prompt_token_ids` to a chat's answer or to each prompt's first choice."""
    prompt_logprobs: Annotated[int | None, at_most("max_prompt_logprobs")] = Field(None, ge=0)
    """Likely tokens to show at every position of the prompt, beside its own."""
    return_logits: Annotated[ReturnLogits | None, all_or(ReturnLogits)] = None
    """Adds the tokens' logits; `true` for every generated token's whole row, raw, in base64."""
    return_hidden_states: Annotated[ReturnHiddenStates | None, all_or(ReturnHiddenStates)] = None
    """Adds the last layer's output after the final norm."""

    def check(self) -> None:
        super().check()
        if not self.stream and self.stream_options not in (None, StreamOptions()):
            raise BadRequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
        if self.return_logits is not None:
            self.return_logits.check_columns("return_logits.")
