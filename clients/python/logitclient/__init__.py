"""A client for logitserve: text with the logits it was drawn from, as numpy arrays."""

from logitclient.async_client import AsyncClient, AsyncStream
from logitclient.client import Client, Stream
from logitclient.decoding import decode_logits
from logitclient.errors import (
    APIError,
    AuthenticationError,
    BadRequestError,
    DecodeError,
    LogitClientError,
    MissingDependencyError,
    NotFoundError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    ServiceUnavailableError,
    StreamError,
    TransportError,
)
from logitclient.options import HiddenStatesSpec, LogitsSpec
from logitclient.results import (
    Choice,
    Chunk,
    Completion,
    Embedding,
    HiddenStates,
    Logits,
    LogitsBatch,
    Model,
    Perplexity,
    Pooling,
    Results,
    Reward,
    SequenceLogits,
    TokenLogprob,
    Tokens,
    Usage,
)
from logitclient.rows import Rows

__version__ = "0.1.0"

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "DecodeError",
    "Embedding",
    "HiddenStates",
    "HiddenStatesSpec",
    "LogitClientError",
    "Logits",
    "LogitsBatch",
    "LogitsSpec",
    "MissingDependencyError",
    "Model",
    "NotFoundError",
    "PayloadTooLargeError",
    "Perplexity",
    "Pooling",
    "RateLimitError",
    "RequestTimeoutError",
    "Results",
    "Reward",
    "Rows",
    "SequenceLogits",
    "ServerError",
    "ServiceUnavailableError",
    "Stream",
    "StreamError",
    "TokenLogprob",
    "Tokens",
    "TransportError",
    "Usage",
    "decode_logits",
]
