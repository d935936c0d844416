"""The server's options, each written once: a field is a command-line flag and a LOGITSERVE_ variable."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from logitengine.logs import LogFormat
from logitengine.option_types import Bytes, Seconds, Word
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from logitserve.access.keys import check_key, check_key_file, split_keys
from logitserve.access.origins import check_hosts, check_origins
from logitserve.access.proxies import check_root_path, check_trusted_proxies
from logitserve.images.hosts import check_image_hosts
from logitserve.telemetry.otlp import check_endpoint

ENV_PREFIX = "LOGITSERVE_"

LARGEST_ID = 2**31 - 1
"""The largest token id, and the largest number of tokens that a field may name."""


def split_commas(value: Any) -> Any:
    """Return ``a,b`` from a variable, or ``["a", "b,c"]`` from repeated flags, as one list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        return value
    return [part.strip() for item in values for part in item.split(",") if part.strip()]


def _family(name: str) -> str:
    # It imports transformers, which takes seconds: options are refused sooner.
    from logitserve.text.families.choose import load_family

    load_family(name)  # raises ValueError
    return name


def _open_socket(fd: int) -> int:
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        msg = "is no socket that this process was started with"
        raise ValueError(msg)
    return fd


class Listening(BaseModel):
    """Where the server listens."""

    host: Annotated[str, Word("HOST")] = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Word("PORT")] = Field(
        8000, ge=0, le=65535, description="port to listen on; 0: any free one"
    )
    fd: Annotated[int, AfterValidator(_open_socket), Word("FD")] | None = Field(
        None, description="file descriptor of a bound socket to listen on, in place of host and port"
    )
    listen_when_ready: bool = Field(
        False,
        description="refuse connections until the model is loaded, so that a balancer without checks of its own takes another server",
    )
    max_connections: int = Field(
        4096, ge=1, description="most connections; more get 503, or the place of the oldest that said nothing"
    )
    root_path: Annotated[str, AfterValidator(check_root_path), Word("PATH")] = Field(
        "", description="path under which a proxy offers this server, whether or not it takes it off"
    )
    forwarded_allow_ips: Annotated[
        list[str],
        NoDecode,
        BeforeValidator(split_commas),
        AfterValidator(check_trusted_proxies),
        Word("ADDRESSES"),
    ] = Field(
        [],
        description="addresses and networks of proxies, comma-separated, whose X-Forwarded-For is believed; '*': all",
    )

    @model_validator(mode="after")
    def _own_socket(self) -> Self:
        if self.listen_when_ready and self.fd is not None:
            msg = "--listen-when-ready and --fd exclude each other: whoever made that socket listens already"
            raise ValueError(msg)
        return self


class Access(BaseModel):
    """Who may call, and by which names."""

    served_model_name: Annotated[list[str], NoDecode, BeforeValidator(split_commas), Word("NAMES")] = Field(
        [],
        description="names that requests may call the model by, comma-separated; default: the checkpoint's own",
    )
    api_key: Annotated[
        list[Annotated[SecretStr, AfterValidator(check_key)]],
        NoDecode,
        BeforeValidator(split_keys),
        Word("KEYS"),
    ] = Field(
        [],
        description="keys, comma-separated, one of which every request but /health and /ready must then bear",
    )
    api_key_file: Annotated[Path, AfterValidator(check_key_file)] | None = Field(
        None, description="file of such keys, one a line, in place of --api-key; read again on SIGHUP"
    )
    cors_origin: Annotated[
        list[str], NoDecode, BeforeValidator(split_commas), AfterValidator(check_origins), Word("ORIGINS")
    ] = Field(
        [],
        description="origins of web pages that may call, comma-separated, as https://app.example; "
        "app://*: a scheme's all; *: all",
    )
    allowed_host: Annotated[
        list[str], NoDecode, BeforeValidator(split_commas), AfterValidator(check_hosts), Word("HOSTS")
    ] = Field(
        [],
        description="names of this server beside localhost and its addresses, comma-separated; *: any",
    )

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if self.api_key and self.api_key_file is not None:
            msg = "--api-key and --api-key-file, or their variables, exclude each other"
            raise ValueError(msg)
        return self


class RequestBounds(BaseModel):
    """What one request may ask for."""

    max_body_bytes: Bytes = Field(8 << 20, ge=1, description="largest request body")
    max_total_body_bytes: Bytes = Field(
        512 << 20, ge=1, description="most bytes of all request bodies that are being read"
    )
    max_body_values: int = Field(
        1 << 20,
        ge=1,
        description="most values in a request body; every ',' counts as one, '[' and '{' as eight, those in strings too",
    )
    max_header_bytes: Bytes = Field(32 << 10, ge=1024, description="largest request head")
    max_headers: int = Field(100, ge=1, description="most headers of a request")
    max_n: int = Field(32, ge=1, description="largest n")
    max_batch_prompts: int = Field(256, ge=1, description="most prompts or inputs in one request")
    max_messages: int = Field(
        4096, ge=1, description="most messages of a conversation, and most parts and calls of a message"
    )
    max_tools: int = Field(128, ge=1, description="most tools that a chat may list")
    max_logprobs: int = Field(20, ge=0, description="largest top_logprobs of a chat request")
    max_completion_logprobs: int = Field(5, ge=0, description="largest logprobs of a completions request")
    max_prompt_logprobs: int = Field(20, ge=0, description="largest prompt_logprobs")
    max_stop: int = Field(16, ge=1, description="most stop strings, and most stop token ids")
    max_stop_length: int = Field(256, ge=1, description="longest stop string, in characters")
    max_logit_bias: int = Field(1024, ge=1, description="most entries of logit_bias")
    max_grammar_bytes: Bytes = Field(
        256 << 10, ge=1, description="largest JSON schema, list of choices, regex or grammar of an answer"
    )


class Conversations(BaseModel):
    """How conversations become prompts."""

    control_tokens_in_messages: bool = Field(
        False,
        description="take control tokens that messages spell, such as <|im_end|>, for control tokens; else they are text",
    )
    tool_template: Annotated[str, AfterValidator(_family), Word("NAME|FILE")] | None = Field(
        None,
        description="how the model writes calls of tools and its thinking: hermes, mistral and others, or a file; default: "
        "by its chat template",
    )
    image_hosts: Annotated[
        list[str],
        NoDecode,
        BeforeValidator(split_commas),
        AfterValidator(check_image_hosts),
        Word("HOSTS"),
    ] = Field(
        [],
        description="hosts, comma-separated, as images.example or images.example:8443, that images are fetched from where "
        "a request gives an address; default: none, and images come in requests as data: URLs",
    )


class ImageBounds(BaseModel):
    """What the images of requests may take up."""

    max_images: int = Field(16, ge=1, description="most images of a conversation")
    max_image_bytes: Bytes = Field(20 << 20, ge=1, description="largest file of an image")
    max_image_pixels: int = Field(
        64 << 20, ge=1, description="most pixels of an image, in its file's own size"
    )
    image_memory: Bytes = Field(
        1 << 30,
        ge=1 << 20,
        description="most bytes of images in all, as the model reads them, that unfinished requests may hold",
    )


class AnswerBounds(BaseModel):
    """What answers may hold."""

    max_held_bytes: Bytes = Field(
        1 << 30,
        ge=1 << 20,
        description="most bytes of rows and written answers held in all, half of them for streams",
    )
    max_answer_bytes: Bytes = Field(
        1 << 30, ge=1, description="most bytes that one answer may hold that is sent whole and not streamed"
    )
    max_stream_bytes: Bytes = Field(
        2 << 30, ge=1, description="most bytes of rows that one streamed answer may ask for"
    )


class QueueBounds(BaseModel):
    """How many requests may wait."""

    max_queued_requests: int = Field(
        1024, ge=1, description="requests that wait to be tokenized or to begin before others get 429"
    )
    max_queued_tokens: int = Field(
        1 << 20, ge=1, description="tokens of the prompts that wait before other requests get 429"
    )


class Times(BaseModel):
    """How long things may take."""

    keep_alive: Annotated[int, Word("SECONDS")] = Field(
        75, ge=1, description="seconds that an idle connection is kept for another request"
    )
    head_timeout: Seconds = Field(
        30.0, gt=0, description="seconds for a request's head, and for the first byte of a connection"
    )
    body_timeout: Seconds = Field(
        30.0, gt=0, description="seconds that must each time bring 64 KiB of a body, or its end"
    )
    ping_interval: Seconds = Field(
        15.0,
        ge=0,
        description="seconds of silence after which a stream begins, and sends a comment; 0: it stays silent",
    )
    queue_timeout: Seconds = Field(
        300.0, ge=0, description="seconds that a request may wait for the engine to begin it; 0: no limit"
    )
    held_timeout: Seconds = Field(
        300.0,
        ge=0,
        description="seconds that a whole answer may wait for others to give back what they hold; 0: no limit",
    )
    request_timeout: Seconds = Field(
        0.0,
        ge=0,
        description="seconds that a request may take, less the time in which its client does not read; 0: no limit",
    )
    write_timeout: Seconds = Field(
        60.0, gt=0, description="seconds after which a client that takes nothing of its answer is dropped"
    )
    tokenize_timeout: Seconds = Field(
        10.0,
        gt=0,
        description="seconds to render and tokenize one request's prompts, and to wait for a thread that does so",
    )
    grammar_timeout: Seconds = Field(
        5.0,
        gt=0,
        description="seconds to compile one request's schema or grammar",
    )
    image_timeout: Seconds = Field(
        30.0, gt=0, description="seconds to decode an image and prepare it for the model"
    )
    image_fetch_timeout: Seconds = Field(10.0, gt=0, description="seconds to fetch an image of --image-hosts")
    drain_delay: Seconds = Field(
        0.0,
        ge=0,
        description="seconds from SIGTERM to the end of listening, for balancers to see that /ready is 503",
    )
    drain_timeout: Seconds = Field(
        30.0, ge=0, description="seconds that running requests get to end once nobody listens any more"
    )


class Logging(BaseModel):
    """What is logged."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe line logged"
    )
    log_format: LogFormat = Field(
        "auto", description="lines for people, or a JSON object a line; auto: text on a terminal, else json"
    )


class Tracing(BaseModel):
    """Where traces go."""

    otlp_endpoint: Annotated[str, AfterValidator(check_endpoint), Word("URL")] | None = Field(
        None,
        description="collector that gets a span of each request by OTLP over HTTP, as http://127.0.0.1:4318; "
        "needs logitserve[otel]",
    )


class ServerConfig(
    Listening,
    Access,
    RequestBounds,
    Conversations,
    ImageBounds,
    AnswerBounds,
    QueueBounds,
    Times,
    Logging,
    Tracing,
):
    """The server's options: every bound on what clients may ask for or use up is one of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
