"""Order in which the image encoder reads the items of prompts, and which of its outputs are kept.

Pure logic: it knows the sizes of outputs and no tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from logitengine.link.messages import PromptItem
from logitengine.schedule.sequence import Sequence


class EncoderQueue:
    """Chooses the item to encode next, within ``capacity`` bytes of kept outputs.

    Outputs are known by their items' digests: equal images are encoded once. Those that running sequences will read next
    are kept; the others go when there is no room, the least recently used first.

    Args:
        token_nbytes: bytes of an output per placeholder token.

    Attributes:
        dropped: digests of outputs that are no longer kept; whoever holds the outputs clears this list.
    """

    def __init__(self, capacity: int, token_nbytes: int) -> None:
        self._capacity = capacity
        self._token_nbytes = token_nbytes
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._current: PromptItem | None = None
        self.dropped: list[bytes] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that are kept."""
        return sum(self._kept.values())

    def output_nbytes(self, item: PromptItem) -> int:
        return (item.stop - item.start) * self._token_nbytes

    def is_ready(self, item: PromptItem) -> bool:
        """Whether the output of the item is kept."""
        return item.digest in self._kept

    def next_item(self, running: Iterable[Sequence]) -> PromptItem | None:
        """Return the item that the encoder works on in this step: the oldest sequence's next one, begun ones first.

        ``running`` are the running sequences, by arrival. None if nothing is to be encoded, or if there is no room until
        some of the kept outputs have been read.
        """
        ready: dict[bytes, None] = {}
        missing: dict[bytes, PromptItem] = {}
        for sequence in running:
            for item in sequence.uncomputed_items:
                if not self.is_ready(item):
                    missing.setdefault(item.digest, item)
                    break  # outputs of later items are not read before this one's
                ready[item.digest] = None
        for digest in ready:
            self._kept.move_to_end(digest)
        current = self._current
        if current is None or current.digest not in missing:
            # Younger ones do not go first where the oldest does not fit: they would take the room again and again.
            current = next(iter(missing.values()), None)
            if current is not None and not self._make_room(current, ready):
                current = None
        self._current = current
        return current

    def complete(self, item: PromptItem) -> None:
        """Record that the item is encoded."""
        self._kept[item.digest] = self.output_nbytes(item)
        self._current = None

    def _make_room(self, item: PromptItem, ready: dict[bytes, None]) -> bool:
        """Drop outputs that nobody waits for until the item's fits. Returns False if it cannot; nothing is dropped then."""
        excess = self.nbytes + self.output_nbytes(item) - self._capacity
        victims: list[bytes] = []
        for digest, nbytes in self._kept.items():
            if excess <= 0:
                break
            if digest not in ready:
                victims.append(digest)
                excess -= nbytes
        if excess > 0 and ready:
            return False
        for digest in victims:
            del self._kept[digest]
        self.dropped += victims
        return True
