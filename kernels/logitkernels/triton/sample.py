"""Draw of one token for each row of logits: edits, the mask, temperature, top-k, top-p, min-p and the draw."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.sampling import NOT_FINITE, NOTHING_ALLOWED
from logitkernels.triton.gather_logits import exp_below
from logitkernels.triton.launch import launch
from logitkernels.triton.sample_cut import FLOOR, cut_kernel, load_orders, row_peak, tile_masses
from logitkernels.triton.sampling_rows import SamplingTensors
from logitkernels.triton.top_k_logits import check_rows, is_nan, order_key, order_of

TILE = 4096
"""Entries of a row that are read at once."""

CANDIDATES = 2048
"""Entries around the cut that are searched without reading the row again."""

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NOTHING_ALLOWED = tl.constexpr(NOTHING_ALLOWED)


@triton.jit
def _edited(
    x: tl.tensor,
    bias: tl.tensor,
    seen: tl.tensor,
    count: tl.tensor,
    banned: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
) -> tl.tensor:
    x += bias
    x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = tl.where(count > 0, x - (presence + frequency * count.to(tl.float32)), x)
    return tl.where(banned, -float("inf"), x)


@triton.jit
def _edit_tile(
    logits_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    edit_ids_ptr: tl.tensor,
    edit_bias_ptr: tl.tensor,
    edit_counts_ptr: tl.tensor,
    edit_flags_ptr: tl.tensor,
    first_edit: tl.tensor,
    end_edit: tl.tensor,
    token: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    first: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> tl.tensor:
    """Return the row's tile that starts at ``first``, with the row's edits and its pending ``token`` (-1: none)."""
    end = tl.minimum(first + TILE, vocab)
    if (token >= first) & (token < end):
        once = tl.full((), 1, tl.int32)
        x = _edited(
            tl.load(logits_ptr + token), 0.0, once != 0, once, once == 0, repetition, presence, frequency
        )
        tl.store(scores_ptr + token, x)
    # An edit of the pending token overwrites the value stored above.
    tl.debug_barrier()
    for start in range(first_edit, end_edit, EDITS):
        edits = start + tl.arange(0, EDITS)
        is_edit = edits < end_edit
        ids = tl.load(edit_ids_ptr + edits, mask=is_edit, other=-1)
        here = (ids >= first) & (ids < end)
        x = tl.load(logits_ptr + ids, mask=here, other=0.0)
        bias = tl.load(edit_bias_ptr + edits, mask=here, other=0.0)
        count = tl.load(edit_counts_ptr + edits, mask=here, other=0)
        flags = tl.load(edit_flags_ptr + edits, mask=here, other=0)
        is_token = ids == token
        x = _edited(
            x,
            bias,
            ((flags & 1) != 0) | is_token,
            count + is_token.to(tl.int32),
            (flags & 2) != 0,
            repetition,
            presence,
            frequency,
        )
        tl.store(scores_ptr + ids, x, mask=here)
    tl.debug_barrier()
    columns = first + tl.arange(0, TILE)
    return tl.load(scores_ptr + columns, mask=columns < vocab, other=-float("inf"))


@triton.jit
def _score_kernel(
    logits_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    last_tokens_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    pending_ptr: tl.tensor,
    shows_ptr: tl.tensor,
    edit_start_ptr: tl.tensor,
    edit_ids_ptr: tl.tensor,
    edit_bias_ptr: tl.tensor,
    edit_counts_ptr: tl.tensor,
    edit_flags_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_best_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    stored_ptr: tl.tensor,
    logits_stride: tl.tensor,
    scores_stride: tl.tensor,
    allowed_stride: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> None:
    """Compute a tile after edits, mask and temperature: its largest score, the lowest id of that, and a sum.

    The sum is that of exp(score - largest). If the tile holds a NaN, its largest score is NaN. The scores are
    stored where the row has edits or is read again; a row with a mask at a temperature above 0 is read again.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits_ptr += row * logits_stride
    scores_ptr += row * scores_stride
    temperature = tl.load(temperature_ptr + row)
    first_edit, end_edit = tl.load(edit_start_ptr + row), tl.load(edit_start_ptr + row + 1)
    pending = tl.load(pending_ptr + row)
    token = tl.load(last_tokens_ptr + pending, mask=pending >= 0, other=-1).to(tl.int32)
    has_edits = (end_edit > first_edit) | (token >= 0)
    is_filtered = (
        (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1.0) | (tl.load(min_p_ptr + row) > 0.0)
    )
    is_read = (temperature > 0) & (is_filtered | (tl.load(shows_ptr + row) != 0) | (allowed_ptr is not None))

    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    x = tl.load(logits_ptr + columns, mask=inside, other=-float("inf"))
    nans = tl.sum(is_nan(x).to(tl.int32))
    if has_edits:
        tl.store(scores_ptr + columns, x, mask=inside)
        x = _edit_tile(
            logits_ptr,
            scores_ptr,
            edit_ids_ptr,
            edit_bias_ptr,
            edit_counts_ptr,
            edit_flags_ptr,
            first_edit,
            end_edit,
            token,
            tl.load(repetition_ptr + row),
            tl.load(presence_ptr + row),
            tl.load(frequency_ptr + row),
            tile * TILE,
            vocab,
            TILE,
            EDITS,
        )
        tl.debug_barrier()
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + row * allowed_stride + columns // 32, mask=inside, other=0)
        x = tl.where(((words >> (columns % 32)) & 1) != 0, x, -float("inf"))
    if has_edits:
        nans += tl.sum(is_nan(x).to(tl.int32))
    if temperature > 0:
        x = tl.div_rn(x, temperature)
    if has_edits | is_read:
        tl.store(scores_ptr + columns, x, mask=inside)
    partial = row * tl.num_programs(1) + tile
    largest = tl.max(x)
    tl.store(tile_max_ptr + partial, tl.where(nans > 0, float("nan"), largest))
    tl.store(tile_best_ptr + partial, tl.min(tl.where(x == largest, columns, 0x7FFFFFFF)))
    if temperature > 0:
        tl.store(tile_sum_ptr + partial, tl.sum(tl.where(inside, exp_below(x, largest), 0.0)))
    if tile == 0:
        tl.store(stored_ptr + row, (has_edits | is_read).to(tl.int32))


@triton.jit
def _keep_tiles(
    scores_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    cut: tl.tensor,
    shows: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Replace each tile's sum by the sum over what the cut keeps; set the rest to -inf where the row is shown."""
    for tile in range(num_tiles):
        tile_max = tl.load(tile_max_ptr + tile)
        kept_sum = tl.full((), 0.0, tl.float32)
        if shows | (order_key(tile_max) >= (cut >> 32)):
            x, orders = load_orders(scores_ptr, tile, vocab, TILE)
            kept_sum = tl.sum(tl.where(orders >= cut, exp_below(x, tile_max), 0.0))
            if shows:
                columns = tile * TILE + tl.arange(0, TILE)
                tl.store(scores_ptr + columns, -float("inf"), mask=(columns < vocab) & (orders < cut))
        tl.store(tile_sum_ptr + tile, kept_sum)


@triton.jit
def _first_past(masses: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Return the first index whose cumulative mass is above the target, and the mass before it.

    The index always has a mass above zero. If rounding leaves no sum above the target, it is the last such
    index.
    """
    indices = tl.arange(0, SIZE)
    reached = tl.cumsum(masses)
    first = tl.min(tl.where((reached > target) & (masses > 0), indices, SIZE))
    index = tl.where(first < SIZE, first, tl.max(tl.where(masses > 0, indices, 0)))
    return index, tl.sum(tl.where(indices == index, reached - masses, 0.0))


@triton.jit
def _uniform(seed: tl.tensor, stream: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Return float64 in [0, 1), equal to `logitkernels.philox.philox_uniform`."""
    high, low, _, _ = tl.philox_impl(
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        stream.to(tl.uint32),
        tl.full((), 0, tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
        10,
    )
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _draw(
    scores_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stored: tl.tensor,
    temperature: tl.tensor,
    uniform: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    cut: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
) -> tl.tensor:
    """Invert the cumulative distribution of the kept entries, in order of id, at ``uniform``.

    The cumulative sum over the tiles gives the tile; the one over the tile's entries gives the token.
    """
    masses, scales = tile_masses(maxima, sums, largest)
    target = uniform * tl.sum(masses)
    tile, before = _first_past(masses, target, TILES)
    is_tile = tl.arange(0, TILES) == tile
    scale = tl.sum(tl.where(is_tile, scales, 0.0))
    tile_max = tl.max(tl.where(is_tile, maxima, -float("inf")))
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    if stored:
        x = tl.load(scores_ptr + columns, mask=inside, other=-float("inf"))
    else:
        x = tl.div_rn(tl.load(logits_ptr + columns, mask=inside, other=-float("inf")), temperature)
    kept = inside & (order_of(x, columns) >= cut)
    entries = tl.where(kept, exp_below(x, tile_max), 0.0).to(tl.float64)
    index, _ = _first_past(entries, (target - before) / scale, TILE)
    return tile * TILE + index


@triton.jit
def _show_point(
    scores_ptr: tl.tensor, best: tl.tensor, vocab: tl.tensor, num_tiles: tl.tensor, TILE: tl.constexpr
) -> None:
    for tile in range(num_tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        tl.store(scores_ptr + columns, tl.where(columns == best, 0.0, -float("inf")), mask=columns < vocab)


@triton.jit
def _is_drawable(
    logits_ptr: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Whether the raw logits of a row without a NaN are a distribution at its temperature."""
    largest = tl.full((), -float("inf"), tl.float32)
    for tile in range(num_tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits_ptr + columns, mask=columns < vocab, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(x))
    return (largest > -float("inf")) & ((largest < float("inf")) | (temperature == 0))


@triton.jit(do_not_specialize=["num_tiles"])
def _draw_kernel(
    logits_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    stream_ptr: tl.tensor,
    position_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    shows_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_best_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    stored_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    logits_stride: tl.tensor,
    scores_stride: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    scores_ptr += row * scores_stride
    maxima, largest, token, has_nan = row_peak(
        tile_max_ptr + row * num_tiles, tile_best_ptr + row * num_tiles, num_tiles, TILES
    )
    temperature = tl.load(temperature_ptr + row)
    if has_nan | ((temperature > 0) & (largest == float("inf"))):
        token = tl.full((), _NOT_FINITE, tl.int32)
    elif largest == -float("inf"):
        # The row's request ends here, so reading the row once more costs little.
        is_drawable = _is_drawable(logits_ptr, temperature, vocab, num_tiles, TILE)
        token = tl.where(is_drawable, _NOTHING_ALLOWED, _NOT_FINITE)
    elif temperature > 0:
        cut = tl.load(cut_ptr + row)
        if cut > FLOOR:
            shows = tl.load(shows_ptr + row) != 0
            _keep_tiles(
                scores_ptr,
                tile_max_ptr + row * num_tiles,
                tile_sum_ptr + row * num_tiles,
                cut,
                shows,
                vocab,
                num_tiles,
                TILE,
            )
            tl.debug_barrier()
        tiles = tl.arange(0, TILES)
        token = _draw(
            scores_ptr,
            logits_ptr,
            tl.load(stored_ptr + row) != 0,
            temperature,
            _uniform(tl.load(seed_ptr + row), tl.load(stream_ptr + row), tl.load(position_ptr + row)),
            maxima,
            tl.load(tile_sum_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0.0),
            largest,
            cut,
            vocab,
            TILE,
            TILES,
        )
    elif tl.load(shows_ptr + row) != 0:
        _show_point(scores_ptr, token, vocab, num_tiles, TILE)
    tl.store(tokens_ptr + row, token)


def sample(
    logits: Tensor,
    tensors: SamplingTensors,
    last_tokens: Tensor,
    scores: Tensor,
    allowed: Tensor | None = None,
    *,
    tile: int = TILE,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Draw for each row of ``logits`` (float32 [R, V], left unchanged): int32 [R], below 0 where nothing is drawn.

    Follows `logitkernels.reference_sampling.sample_rows`. ``tensors`` describes the R rows. ``last_tokens``
    int32 holds the tokens that ``tensors.pending`` refers to, below 0 for a row that had none. ``allowed``
    int32 [R, ceil(V / 32)] holds the rows' masks. ``scores`` float32 [R, V] is scratch: on return it holds
    the processed logits of the rows that show them and have a token; its other rows are unspecified.

    Greedy and plain temperature rows read V floats (and a tile more). Rows with edits also write and read
    them once. Rows with filters read them about four times more, from the L2 cache where the row fits. Masks
    add V / 8 bytes, and a write of the scores above temperature 0.

    Raises ValueError for logits or scores that are not float32 [R, V] with adjacent entries of a row.
    """
    check_rows(logits)
    check_rows(scores)
    if scores.shape != logits.shape:
        raise ValueError(
            f"scores are {tuple(scores.shape)}, logits {tuple(logits.shape)}; they must be the same"
        )
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, tile)
    tile_max = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    tile_sum = torch.empty_like(tile_max)
    tile_best = torch.empty_like(tile_max, dtype=torch.int32)
    stored = torch.empty(rows, dtype=torch.int32, device=logits.device)
    tokens = torch.empty_like(stored)
    found = torch.empty(rows, candidates, dtype=torch.int64, device=logits.device)
    cuts = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        _score_kernel,
        (rows, tiles),
        logits,
        scores,
        last_tokens,
        tensors.temperature,
        tensors.top_k,
        tensors.top_p,
        tensors.min_p,
        tensors.repetition_penalty,
        tensors.presence_penalty,
        tensors.frequency_penalty,
        tensors.pending,
        tensors.shows_processed,
        tensors.edit_start,
        tensors.edit_ids,
        tensors.edit_bias,
        tensors.edit_counts,
        tensors.edit_flags,
        allowed,
        tile_max,
        tile_best,
        tile_sum,
        stored,
        logits.stride(0),
        scores.stride(0),
        0 if allowed is None else allowed.stride(0),
        vocab,
        TILE=tile,
        EDITS=256,
        num_warps=4,
    )
    launch(
        cut_kernel,
        (rows,),
        scores,
        tensors.temperature,
        tensors.top_k,
        tensors.top_p,
        tensors.min_p,
        tile_max,
        tile_best,
        tile_sum,
        found,
        cuts,
        scores.stride(0),
        vocab,
        tiles,
        TILE=tile,
        TILES=triton.next_power_of_2(tiles),
        CANDIDATES=candidates,
        num_warps=16,
    )
    launch(
        _draw_kernel,
        (rows,),
        logits,
        scores,
        tensors.seed,
        tensors.stream,
        tensors.position,
        tensors.temperature,
        tensors.shows_processed,
        tile_max,
        tile_best,
        tile_sum,
        stored,
        cuts,
        tokens,
        logits.stride(0),
        scores.stride(0),
        vocab,
        tiles,
        TILE=tile,
        TILES=triton.next_power_of_2(tiles),
        num_warps=8,
    )
    return tokens
