"""The fields that chat and completions share: sampling, stopping, and what to report beside the text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from logitserve.errors import BadRequestError
from logitserve.protocol.base import RequestBody, StrictModel

SMALLEST_SEED = -(2**63)
LARGEST_SEED = 2**64 - 1
LARGEST_ID = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class ReturnLogits(StrictModel):
    """Which logits to return, and how they are written. ``top_k`` and ``token_ids`` exclude each other."""

    positions: Literal["generated", "prompt", "all"] = "generated"
    stage: Literal["raw", "processed"] = "raw"
    top_k: int | None = Field(None, ge=1)
    token_ids: list[TokenId] | None = Field(None, min_length=1)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    encoding: Literal["base64", "list"] | None = None

    @property
    def wire_encoding(self) -> Literal["base64", "list"]:
        """``encoding``, by default base64 for the whole vocabulary and list for chosen columns."""
        if self.encoding is not None:
            return self.encoding
        return "base64" if self.top_k is None and self.token_ids is None else "list"

    @property
    def wants_prompt(self) -> bool:
        return self.positions != "generated"


def _all_or_nothing(value: Any) -> Any:
    """``true`` asks for all defaults, ``false`` for nothing."""
    if value is True:
        return {}
    return None if value is False else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(StrictModel):
    """How a stream is told; ``include_obfuscation`` is accepted and pads nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(RequestBody):
    """Sampling with OpenAI's names, meanings and bounds, and the extensions that vLLM's users know."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=LARGEST_ID)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    stop: Annotated[list[str], BeforeValidator(_one_or_many)] = Field([])
    seed: int | None = Field(None, ge=SMALLEST_SEED, le=LARGEST_SEED)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int = Field(0, ge=-1, le=LARGEST_ID)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    min_tokens: int = Field(0, ge=0, le=LARGEST_ID)
    stop_token_ids: list[TokenId] = Field([])
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(None, ge=0)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    return_logits: Annotated[ReturnLogits | None, BeforeValidator(_all_or_nothing)] = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """What no single field shows. Raises BadRequestError with the field to change."""
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
        if any(not text for text in self.stop):
            raise BadRequestError("'stop' holds an empty string.", param="stop")
        logits = self.return_logits
        if logits is None:
            return
        if logits.top_k is not None and logits.token_ids is not None:
            raise BadRequestError(
                "'return_logits.top_k' and 'return_logits.token_ids' exclude each other.",
                param="return_logits.top_k",
            )
        if logits.stage == "processed" and logits.wants_prompt:
            raise BadRequestError(
                "'return_logits.stage' \"processed\" exists for generated rows only: the prompt was not sampled.",
                param="return_logits.stage",
            )
