"""Every item is encoded in time, once while its output is kept, and outputs stay within their bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.messages import Array, GenerationRequest, PromptItem, SamplingParams
from logitengine.schedule.encoder_queue import EncoderQueue
from logitengine.schedule.prompt import item_digest, root_digest
from logitengine.schedule.sequence import Sequence, SequenceState

NO_PIXELS = Array("float32", (0,), b"")
TOKEN_NBYTES = 10


def digest(name: int) -> bytes:
    """Return the digest by which the queue knows an image."""
    return item_digest(root_digest(), item(0, 1, name))


def item(start: int, stop: int, name: int) -> PromptItem:
    return PromptItem(start=start, stop=stop, digest=bytes([name]), pixels=NO_PIXELS)


def sequence(arrival: int, images: list[tuple[int, int]]) -> Sequence:
    """Return a running sequence of images, given as lengths and names, with a token before and after each."""
    items, end = [], 1
    for length, name in images:
        items.append(item(end, end + length, name))
        end += length + 1
    request = GenerationRequest(
        request_id=str(arrival),
        prompt_token_ids=[0] * end,
        items=items,
        sampling=SamplingParams(max_tokens=1),
    )
    made = Sequence.of(request, 0, arrival)
    made.state = SequenceState.RUNNING
    return made


def test_the_oldest_sequence_goes_first_and_a_begun_item_is_finished() -> None:
    queue = EncoderQueue(1000, TOKEN_NBYTES)
    young = sequence(1, [(4, 7)])
    first = queue.next_item([young])
    old = sequence(0, [(4, 8)])
    assert first is not None
    assert queue.next_item([old, young]) is first
    queue.complete(first)
    second = queue.next_item([old, young])
    assert second is not None
    assert second.digest == digest(8)


def test_an_item_whose_sequence_left_is_given_up() -> None:
    queue = EncoderQueue(1000, TOKEN_NBYTES)
    assert queue.next_item([sequence(0, [(4, 7)])]) is not None
    assert queue.next_item([]) is None


def test_equal_images_are_encoded_once() -> None:
    queue = EncoderQueue(1000, TOKEN_NBYTES)
    both = [sequence(0, [(4, 7)]), sequence(1, [(4, 7), (4, 7)])]
    first = queue.next_item(both)
    assert first is not None
    queue.complete(first)
    assert queue.next_item(both) is None
    assert [other.end_of_ready(99, queue.is_ready) for other in both] == [99, 99]


def test_outputs_that_nobody_waits_for_make_room() -> None:
    queue = EncoderQueue(80, TOKEN_NBYTES)
    for name in (1, 2, 3):
        one = sequence(name, [(4, name)])
        found = queue.next_item([one])
        assert found is not None
        queue.complete(found)
    assert queue.dropped == [digest(1)]


def test_outputs_that_are_waited_for_stay() -> None:
    queue = EncoderQueue(80, TOKEN_NBYTES)
    waiting = [sequence(0, [(4, 1)]), sequence(1, [(4, 2)]), sequence(2, [(4, 3)])]
    for _ in range(2):
        found = queue.next_item(waiting)
        assert found is not None
        queue.complete(found)
    assert queue.next_item(waiting) is None
    waiting[0].num_computed = 5
    found = queue.next_item(waiting)
    assert found is not None
    assert found.digest == digest(3)
    assert queue.dropped == [digest(1)]


def test_a_large_item_is_not_overtaken_for_ever_by_small_ones() -> None:
    queue = EncoderQueue(100, TOKEN_NBYTES)
    large, small = sequence(0, [(9, 99)]), sequence(1, [(2, 1)])
    for number in range(2, 20):
        found = queue.next_item([large, small])
        if found is not None and found.digest == digest(99):
            return
        if found is not None:
            queue.complete(found)
        small = sequence(number, [(2, number)])
    raise AssertionError("the oldest item was never encoded")


Images = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), max_size=4)


@given(st.lists(Images, min_size=1, max_size=5), st.integers(60, 200), st.data())
def test_every_sequence_is_computed_whatever_the_order(
    images: list[list[tuple[int, int]]], capacity: int, data: st.DataObject
) -> None:
    # An image's output depends on its length, so equal names have equal lengths here.
    lengths = {name: 1 + name % 6 for name in range(10)}
    running = [
        sequence(arrival, [(lengths[name], name) for _, name in own]) for arrival, own in enumerate(images)
    ]
    queue, kept = EncoderQueue(capacity, TOKEN_NBYTES), set[bytes]()
    for _ in range(500):
        running = [one for one in running if one.num_computed < one.num_prompt_tokens]
        if not running:
            return
        found = queue.next_item(running)
        for one in running:
            count = data.draw(st.integers(0, 4)) if one is not running[0] else 3
            stop = one.end_of_ready(min(one.num_computed + count, one.num_prompt_tokens), queue.is_ready)
            read = {part.digest for part in one.uncomputed_items if part.start < stop}
            assert read <= kept
            one.num_computed = stop
        kept -= set(queue.dropped)
        queue.dropped.clear()
        if found is not None:
            assert found.digest not in kept
            queue.complete(found)
            kept.add(found.digest)
            assert queue.nbytes <= capacity
    raise AssertionError("a sequence waits for ever")
