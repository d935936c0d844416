"""Prompts with images: each mark becomes the image's layout, and each item its placeholder tokens."""

from __future__ import annotations

from collections.abc import Sequence

from logitengine.images.messages import PreparedImage
from logitengine.link.messages import PromptItem

from logitserve.errors import BadRequestError
from logitserve.images.marks import ImageMark
from logitserve.text.tokenizer import ModelTokenizer, RenderedChat


def expand(
    chat: RenderedChat,
    images: Sequence[PreparedImage],
    mark: ImageMark,
    tokenizer: ModelTokenizer,
    *,
    add_special_tokens: bool = False,
) -> tuple[list[int], list[PromptItem]]:
    """Return a conversation's tokens and the items among them.

    Raises BadRequestError where the marks or placeholders of the prompt are not those of the images.
    """
    layouts = [_written(image, mark) for image in images]
    marked = tokenizer.replace_marks(chat, mark.text, layouts)
    if marked is None:
        raise _spelt(mark.text, len(images))
    written = tokenizer.encode_chat(marked, add_special_tokens=add_special_tokens)
    order = [image.items[part] for image in images for part in image.layout if isinstance(part, int)]
    places = [place for place, token_id in enumerate(written) if token_id == mark.placeholder_id]
    if len(places) != len(order):
        raise _spelt(mark.placeholder, len(images))
    token_ids: list[int] = []
    items = []
    position = 0
    for place, item in zip(places, order, strict=True):
        token_ids += written[position:place]
        start = len(token_ids)
        token_ids += [mark.placeholder_id] * item.num_tokens
        items.append(
            PromptItem(
                start=start,
                stop=len(token_ids),
                digest=item.digest,
                pixels=item.pixels,
                grid=item.grid,
            )
        )
        position = place + 1
    return token_ids + written[position:], items


def _written(image: PreparedImage, mark: ImageMark) -> str:
    """Return an image's layout with one placeholder for each item."""
    return "".join(mark.placeholder if isinstance(part, int) else part for part in image.layout)


def _spelt(token: str, num_images: int) -> BadRequestError:
    return BadRequestError(
        f"'messages' has {num_images} images, and '{token}', the token that stands for one, is not as often in the prompt: a "
        "text of an assistant spells it, any text does under --control-tokens-in-messages, or the chat template leaves "
        "out an image.",
        param="messages",
        code="image_token_in_text",
    )
