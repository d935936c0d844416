"""The image encoder's work over the steps, and the outputs that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from logitengine.link.messages import PromptItem
from logitengine.model.image_text.encoder import Encoding, ImageEncoder
from logitengine.run.batch import ItemRows


class EncoderOutputs:
    """Outputs by the digests of their items, [rows, 1 + depth, H] each, and the encoding under way.

    Args:
        at_once: whether a step encodes a whole item; otherwise it encodes one layer of it.
    """

    def __init__(self, encoder: ImageEncoder, *, at_once: bool) -> None:
        self._encoder = encoder
        self._at_once = at_once
        self._kept: dict[bytes, Tensor] = {}
        self._under_way: tuple[bytes, Encoding] | None = None

    def drop(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._kept.pop(digest, None)

    def advance(self, item: PromptItem | None) -> bool:
        """Go on with the item, and give up another one that was begun. Return whether the item is encoded.

        Raises what the encoder raises. The item can be begun again then.
        """
        if self._under_way is not None and (item is None or self._under_way[0] != item.digest):
            self._under_way[1].abandon()
            self._under_way = None
        if item is None:
            return False
        if self._under_way is None:
            self._under_way = item.digest, self._encoder.begin(item)
        encoding = self._under_way[1]
        try:
            output = encoding.advance()
            while output is None and self._at_once:
                output = encoding.advance()
        finally:
            if encoding.has_ended:
                self._under_way = None
        if output is None:
            return False
        self._kept[item.digest] = output
        return True

    def rows(self, item_rows: Sequence[ItemRows]) -> list[tuple[slice, Tensor]]:
        """Return the outputs for a batch's rows."""
        return [
            (
                slice(rows.start, rows.stop),
                self._kept[rows.digest][rows.first : rows.first + rows.stop - rows.start],
            )
            for rows in item_rows
        ]
