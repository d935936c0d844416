"""No sequence of operations loses blocks or shares them by mistake."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from logitengine.link.messages import Array, GenerationRequest, PromptItem, SamplingParams
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.prompt import Prompt, root_digest
from logitengine.schedule.sequence import Sequence

BLOCK_SIZE = 4


def make_sequence(tokens: list[int], salt: str | None = None, arrival: int = 0) -> Sequence:
    request = GenerationRequest(
        request_id=f"r{arrival}",
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=1),
        cache_salt=salt,
    )
    return Sequence.of(request, 0, arrival)


def compute(manager: BlockManager, sequence: Sequence) -> None:
    assert manager.grow(sequence, sequence.num_tokens)
    sequence.num_computed = sequence.num_tokens
    manager.publish(sequence)


def test_an_equal_prefix_shares_its_full_blocks() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=True)
    first = make_sequence(list(range(10)))
    compute(manager, first)
    second = make_sequence(list(range(10)))
    assert manager.share_prefix(second, limit=9) == 8
    assert second.block_table == first.block_table[:2]
    assert manager.num_used == 3


def test_a_prefix_is_found_after_its_sequence_has_gone() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=True)
    first = make_sequence(list(range(8)))
    compute(manager, first)
    manager.release(first)
    assert manager.num_used == 0
    assert manager.share_prefix(make_sequence(list(range(9))), limit=8) == 8


def test_another_salt_never_shares() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_sequence(list(range(8)), salt="a"))
    assert manager.share_prefix(make_sequence(list(range(8)), salt="b"), limit=7) == 0
    assert manager.share_prefix(make_sequence(list(range(8))), limit=7) == 0


def item(start: int, stop: int, digest: bytes) -> PromptItem:
    return PromptItem(start=start, stop=stop, digest=digest, pixels=Array("float32", (0,), b""))


def with_items(tokens: list[int], *items: PromptItem) -> Sequence:
    sequence = make_sequence(tokens)
    sequence.prompt = Prompt(tokens, items, sequence.prompt.root)
    return sequence


def test_equal_placeholders_with_different_items_never_share() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=True)
    tokens = [1, 2, 0, 0, 0, 0, 3, 4, 5]
    compute(manager, with_items(tokens, item(2, 6, b"a cat")))
    limit = len(tokens) - 1
    assert manager.share_prefix(with_items(tokens, item(2, 6, b"a cat")), limit) == 8
    assert manager.share_prefix(with_items(tokens, item(2, 6, b"a dog")), limit) == 0
    assert manager.share_prefix(make_sequence(tokens), limit) == 0
    second = with_items([1, 2, 9, 9, 0, 0, 3, 4, 5], item(4, 6, b"a cat"))
    compute(manager, second)
    other = with_items([1, 2, 9, 9, 0, 0, 3, 4, 5], item(4, 6, b"a dog"))
    assert manager.share_prefix(other, limit) == 4, "the first block holds no part of the item"
    shifted = with_items(tokens, item(3, 6, b"a cat"))
    assert manager.share_prefix(shifted, limit) == 0, "another part of the item in the same place"


@given(st.lists(st.sampled_from(["salt", "adapter", "weights"]), unique=True))
def test_whatever_makes_equal_tokens_differ_changes_the_root(changed: list[str]) -> None:
    plain = root_digest()
    root = root_digest(
        cache_salt="s" if "salt" in changed else None,
        adapter="s" if "adapter" in changed else "",
        weights_version=1 if "weights" in changed else 0,
    )
    assert (root == plain) == (not changed)


def test_a_different_beginning_hides_an_equal_block() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    assert manager.share_prefix(make_sequence([9, 2, 3, 4, 5, 6, 7, 8, 0]), limit=8) == 0


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = BlockManager(16, BLOCK_SIZE, prefix_caching=False)
    compute(manager, make_sequence(list(range(8))))
    assert manager.share_prefix(make_sequence(list(range(8))), limit=7) == 0


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=40), st.lists(st.integers(0, 1), min_size=2, max_size=40)
)
def test_sharing_finds_exactly_the_common_full_blocks(first: list[int], second: list[int]) -> None:
    manager = BlockManager(64, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_sequence(first))
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    common = min(len(first), len(second)) if common is None else common
    limit = len(second) - 1
    assert manager.share_prefix(make_sequence(second), limit) == min(common, limit) // BLOCK_SIZE * BLOCK_SIZE


class BlockMachine(RuleBasedStateMachine):
    """Random lives of sequences over few blocks, beside a model of each block's contents."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, BLOCK_SIZE, prefix_caching=True)
        self.live: list[Sequence] = []
        self.written: dict[int, list[int]] = {}
        self.arrivals = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from([None, "s"]))
    def start(self, tokens: list[int], salt: str | None) -> None:
        sequence = make_sequence(tokens, salt, self.arrivals)
        self.arrivals += 1
        shared = self.manager.share_prefix(sequence, len(tokens) - 1)
        for position, block in enumerate(sequence.block_table):
            assert self.written[block] == tokens[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]
        if not self.manager.grow(sequence, len(tokens)):
            self.manager.release(sequence)
            return
        own = sequence.block_table[shared // BLOCK_SIZE :]
        assert not any(block in other.block_table for other in self.live for block in own)
        for position in range(shared // BLOCK_SIZE, len(sequence.block_table)):
            block_tokens = tokens[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]
            self.written[sequence.block_table[position]] = block_tokens
        sequence.num_computed = len(tokens)
        self.manager.publish(sequence)
        self.live.append(sequence)

    @rule(which=st.integers(0, 100))
    def stop(self, which: int) -> None:
        if self.live:
            self.manager.release(self.live.pop(which % len(self.live)))

    @invariant()
    def every_block_is_free_or_in_a_table(self) -> None:
        assert self.manager.num_used == len({block for s in self.live for block in s.block_table})


BlockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = BlockMachine.TestCase
