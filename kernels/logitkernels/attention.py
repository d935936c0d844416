"""Arguments of attention over the paged KV cache: one for the batch, one for the layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Positions of a flattened batch's queries in their sequences and in the paged KV cache.

    Sequence s owns the queries ``query_start[s]:query_start[s + 1]``. They belong to the last of its
    ``seq_lens[s]`` tokens: query i has position ``seq_lens[s] - query_len[s] + i`` and attends to every
    position up to its own, or before ``key_ends`` where they are given.

    A batch padded to a captured size (CUDA graphs) ends in sequences of length 0 with one query each. Their
    slots are -1, nothing is stored for them, and their attention is zero.

    Attributes:
        query_start: int32 [S + 1], cumulative query lengths.
        seq_lens: int32 [S], tokens in the cache after this step's keys and values are stored.
        block_tables: int32 [S, max_blocks], the physical block of every block of the sequence. Entries past
            the sequence's length are unspecified but valid indices.
        slot_mapping: int64 [T], ``block * block_size + offset`` where each token's key and value are stored.
        max_query_len: the longest query of the batch.
        max_seq_len: the longest sequence of the batch.
        key_ends: int32 [T], the position before which each query's keys end: after its own, and in a block of tokens
            that see each other (an image of Gemma 3) after the block's last. Within a sequence they never decrease.
            None: after its own for every query.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int
    key_ends: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of one layer's attention.

    Attributes:
        scale: factor of the product of a query and a key; the scaled product is a score.
        sliding_window: number of last positions that a query sees, its own included; None means all.
        softcap: c, where ``c * tanh(s / c)`` replaces a score s.
        sinks: [Hq], one score per head that is added to the softmax denominator only.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
