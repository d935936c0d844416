"""Parts of a message's content: text, and the images of users."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from logitengine.images.messages import Detail
from pydantic import BeforeValidator, Discriminator, Field, Tag

from logitserve.errors import CHOICE
from logitserve.protocol.base import StrictModel

TEXT, IMAGE = f"{CHOICE}text", f"{CHOICE}image_url"
"""Tags of the kinds of parts, which are no part of a field's path."""

CACHE_HINT = {"cache_control": "Anthropic's hint for its cache of prefixes"}


class TextPart(StrictModel):
    """A text."""

    ignored: ClassVar[frozenset[str]] = frozenset(CACHE_HINT)
    reasons: ClassVar[dict[str, str]] = CACHE_HINT
    takes_any_null: ClassVar[bool] = True

    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    """Where an image is."""

    url: str = Field(min_length=1)
    """The image itself, as `data:image/png;base64,…`, or an address on a host that the server may fetch from."""
    detail: Detail = "auto"
    """How many tiles the image may have, for models that read tiles: auto leaves it to the checkpoint, low is one."""


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(StrictModel):
    """An image. Some clients send its address without an object around it."""

    ignored: ClassVar[frozenset[str]] = frozenset(CACHE_HINT)
    reasons: ClassVar[dict[str, str]] = CACHE_HINT
    takes_any_null: ClassVar[bool] = True

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object, json_schema_input_type=str | ImageUrl)]


def _kind(part: Any) -> str | None:
    """Return the tag of the class that a part is, or of the one whose errors fit it; None for an unknown type."""
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {None: TEXT, "text": TEXT, "image_url": IMAGE}.get(kind if isinstance(kind, str) else None)


Part = Annotated[
    Annotated[TextPart, Tag(TEXT)] | Annotated[ImagePart, Tag(IMAGE)],
    Discriminator(
        _kind,
        custom_error_type="unknown_part",
        custom_error_message="parts of the types text and image_url are served, and no others",
    ),
]


def as_parts(content: Any) -> Any:
    """Return a text as the list of its only part, and all else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
