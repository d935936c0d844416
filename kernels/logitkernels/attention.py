"""What attention over the paged KV cache is told about a batch and about a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the queries of a flattened batch sit in their sequences and in the paged KV cache.

    Sequence s owns the queries ``query_start[s]:query_start[s + 1]``. They are the last ones of its ``seq_lens[s]``
    tokens, so query i of the sequence has position ``seq_lens[s] - query_len[s] + i`` and attends to every position up
    to its own.

    A batch that is padded to a captured size (CUDA graphs) ends in sequences of length 0 with one query each: their slots
    are -1, nothing is stored for them, and their attention is zero.

    Attributes:
        query_start: int32 [S + 1], cumulative query lengths.
        seq_lens: int32 [S], tokens in the cache once this step's keys and values are stored.
        block_tables: int32 [S, max_blocks], the physical block of every block of the sequence; entries past its length
            are unspecified but valid indices.
        slot_mapping: int64 [T], ``block * block_size + offset`` where each token's key and value are stored.
        max_query_len: the longest query of the batch.
        max_seq_len: the longest sequence of the batch.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends.

    Attributes:
        scale: what multiplies the product of a query and a key, which makes a score.
        sliding_window: how many of the last positions are seen, the query's own included; None: all.
        softcap: c, where ``c * tanh(s / c)`` replaces a score s.
        sinks: [Hq], one score per head that is added to the softmax denominator only.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
