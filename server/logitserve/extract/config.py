"""The options of an extraction, each written once: a field is a command-line flag and a LOGITSERVE_ variable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from logitengine.option_types import Seconds, Word
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from logitserve.config import LARGEST_ID, split_commas

if TYPE_CHECKING:
    # Every command reads this module, and the client is slow to load.
    from logitclient.options import LogitsOptions

CONTENT = (
    "positions",
    "stage",
    "top_k",
    "token_ids",
    "logits_dtype",
    "max_tokens",
    "temperature",
    "seed",
    "hidden_states",
    "add_special_tokens",
    "add_generation_prompt",
    "prompts_per_part",
)
"""Options that decide the content of parts: they must be the same for all parts of a set."""


def _server_address(value: Any) -> Any:
    """Return the address without the /v1 that OpenAI's clients are given at its end."""
    if not isinstance(value, str):
        return value
    if not value.startswith(("http://", "https://")):
        msg = "must begin with http:// or https://"
        raise ValueError(msg)
    return value.rstrip("/").removesuffix("/v1")


class Source(BaseModel):
    """Which server is asked."""

    url: Annotated[str | None, BeforeValidator(_server_address), Word("URL")] = Field(
        None, description="a running server; default: one is started for the model, and stopped at the end"
    )
    api_key: Annotated[SecretStr, Word("KEY")] | None = Field(None, description="the key for --url")


class Content(BaseModel):
    """What is written of each prompt."""

    positions: Literal["prompt", "generated", "all"] = Field("prompt", description="which rows")
    stage: Literal["raw", "processed"] = Field(
        "raw", description="the head's logits, or what the sampler drew from"
    )
    top_k: int | None = Field(
        None, ge=1, description="columns: the highest k of each row; default: the vocabulary"
    )
    token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=LARGEST_ID)]], NoDecode, BeforeValidator(split_commas), Word("IDS")
    ] = Field([], description="columns: these ids, comma-separated; default: the vocabulary")
    logits_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="of the logits and hidden states that are written"
    )
    hidden_states: bool = Field(False, description="write the hidden states of the same rows too")


class Reading(BaseModel):
    """How prompts are read, and what is generated."""

    add_special_tokens: bool = Field(True, description="give text prompts the tokenizer's special tokens")
    add_generation_prompt: bool = Field(True, description="open the assistant's turn after messages")
    max_tokens: int = Field(
        0, ge=0, le=LARGEST_ID, description="tokens to generate, for positions generated and all"
    )
    temperature: float = Field(1.0, ge=0, le=2, description="of sampling; 0: greedy")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of sampling; prompt i draws with seed + i, so that runs repeat"
    )


class Running(BaseModel):
    """How the work is done."""

    prompts_per_part: int = Field(
        16, ge=1, description="consecutive prompts that are kept together: what a kill can lose"
    )
    concurrency: int = Field(4, ge=1, le=256, description="requests under way at once")
    retry_seconds: Seconds = Field(
        600.0, ge=0, description="how long a busy, restarting or failing server is asked again"
    )
    skip_refused: bool = Field(
        False, description="record prompts that the server refuses in OUT.refused.jsonl and go on"
    )


class ExtractConfig(Source, Content, Reading, Running):
    """The options of ``logitserve extract``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_k is not None and self.token_ids:
            msg = "--top-k and --token-ids exclude each other"
            raise ValueError(msg)
        if self.stage == "processed" and self.positions != "generated":
            msg = "--stage processed needs --positions generated: the prompt was not sampled"
            raise ValueError(msg)
        if (self.positions == "prompt") != (self.max_tokens == 0):
            msg = (
                f"--max-tokens {self.max_tokens} and --positions {self.positions} disagree: "
                "generated rows need --max-tokens, and prompt rows alone take none"
            )
            raise ValueError(msg)
        return self

    def content(self) -> dict[str, Any]:
        """Return the options in CONTENT, as JSON has them."""
        return self.model_dump(mode="json", include=set(CONTENT))

    def request(self, prompt_index: int) -> LogitsOptions:
        """Return the options of one prompt's request. Only the seed differs between prompts."""
        options: LogitsOptions = {
            "positions": self.positions,
            "stage": self.stage,
            "dtype": self.logits_dtype,
            "hidden_states": self.hidden_states,
            "add_special_tokens": self.add_special_tokens,
            "add_generation_prompt": self.add_generation_prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed + prompt_index,
        }
        if self.top_k is not None:
            options["top_k"] = self.top_k
        if self.token_ids:
            options["token_ids"] = self.token_ids
        return options
