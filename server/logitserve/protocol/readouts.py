"""Bodies of the endpoints that reduce a prompt to a few numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from logitserve.config import LARGEST_ID
from logitserve.protocol.inputs import InputBody, InputOrMessagesBody


class PerplexityBody(InputBody):
    """``POST /v1/perplexity``."""


class RewardsBody(InputOrMessagesBody):
    """``POST /v1/rewards``. A conversation is judged as it stands: no turn is opened after it."""

    head: str | None = Field(None, min_length=1)
    """A name that /v1/models lists; may be left out where there is only one."""
    return_values: bool = False
    """Adds the head's value at every token."""


class EmbeddingsBody(InputBody):
    """``POST /v1/embeddings``. ``dimensions`` cuts the pooled vector before it is normalised."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=LARGEST_ID)
    """Cuts the vector to its first numbers."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    normalize: bool = True
    """Brings the vector to length 1."""


class PoolingBody(InputOrMessagesBody):
    """``POST /pooling``."""

    head: str | None = Field(None, min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
