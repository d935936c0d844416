"""Search for the last entry of each row that its filters keep.

A row's filters keep a prefix of its entries in descending order (ties by lower id). So top-k, top-p and min-p
come down to one *cut*: the `order_of` of the last entry kept. The search for it does not sort. It divides the
range in which the cut must lie at PIVOTS orders, sums over the row the count and mass of the entries above
each, and continues in the part that holds the cut. Once few enough entries lie in the range, they are
gathered and searched without reading the row again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logitkernels.triton.gather_logits import exp_below
from logitkernels.triton.top_k_logits import LOWEST, PIVOTS, is_nan, order_key, order_of, spread

LADDER_STEP = tl.constexpr(4.0)  # nats; most cuts lie within PIVOTS of them under the largest score
FLOOR = tl.constexpr(-0x7F800001 << 32)  # order below that of every entry: -inf, of the highest id
NO_COUNT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def row_peak(
    tile_max_ptr: tl.tensor, tile_best_ptr: tl.tensor, num_tiles: tl.tensor, TILES: tl.constexpr
) -> tl.tensor:
    """Return the tiles' largest scores, the row's largest, its lowest id, and whether the row holds a NaN.

    The pointers are to the row's tiles.
    """
    tiles = tl.arange(0, TILES)
    maxima = tl.load(tile_max_ptr + tiles, mask=tiles < num_tiles, other=-float("inf"))
    has_nan = tl.sum(is_nan(maxima).to(tl.int32)) > 0
    largest = tl.max(maxima)
    first = tl.min(tl.where(maxima == largest, tiles, num_tiles - 1))
    return maxima, largest, tl.load(tile_best_ptr + first), has_nan


@triton.jit
def tile_masses(maxima: tl.tensor, sums: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Return each tile's sum of exp(score - largest), and the factor from its own sum to that, both float64."""
    scales = tl.exp((maxima - largest).to(tl.float64))
    return sums.to(tl.float64) * scales, scales


@triton.jit
def load_orders(scores_ptr: tl.tensor, tile: tl.tensor, vocab: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Load a tile's scores and orders; LOWEST beyond the vocabulary."""
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    x = tl.load(scores_ptr + columns, mask=inside, other=-float("inf"))
    return x, tl.where(inside, order_of(x, columns), LOWEST)


@triton.jit
def _score_of(orders: tl.tensor) -> tl.tensor:
    key = (orders >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(orders: tl.tensor, masses: tl.tensor, pivots: tl.tensor) -> tl.tensor:
    """Count the entries at or above each pivot, and sum their mass (float64)."""
    above = orders[None, :] >= pivots[:, None]
    mass = tl.sum(tl.where(above, masses[None, :], 0.0), axis=1)
    return tl.sum(above.to(tl.int32), axis=1), mass.to(tl.float64)


@triton.jit
def _part_with_cut(
    pivots: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    high: tl.tensor,
    num_high: tl.tensor,
    mass_high: tl.tensor,
    max_count: tl.tensor,
    max_mass: tl.tensor,
) -> tl.tensor:
    """Return the part low..high that holds the cut: at and above low there is enough, at and above high there is not.

    Also returns the number of entries at or above low and high, and the mass at or above high.
    """
    slots = tl.arange(0, PIVOTS)
    enough = (counts >= max_count) | (masses >= max_mass)
    slot = tl.maximum(tl.sum(enough.to(tl.int32)) - 1, 0)
    if slot < PIVOTS - 1:
        is_next = slots == slot + 1
        high = tl.sum(tl.where(is_next, pivots, 0))
        num_high = tl.sum(tl.where(is_next, counts, 0))
        mass_high = tl.sum(tl.where(is_next, masses, 0.0))
    low = tl.sum(tl.where(slots == slot, pivots, 0))
    num_low = tl.sum(tl.where(slots == slot, counts, 0))
    return low, high, num_low, num_high, mass_high


@triton.jit
def _gather_candidates(
    scores_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """Return the orders from low to below high, at most CANDIDATES of them, followed by LOWEST."""
    tl.debug_barrier()
    found = 0
    for tile in range(num_tiles):
        if order_key(tl.load(tile_max_ptr + tile)) >= (low >> 32):
            _, orders = load_orders(scores_ptr, tile, vocab, TILE)
            inside = ((orders >= low) & (orders < high)).to(tl.int32)
            tl.store(candidates_ptr + found + tl.cumsum(inside) - 1, orders, mask=inside != 0)
            found += tl.sum(inside)
    tl.debug_barrier()
    slots = tl.arange(0, CANDIDATES)
    return tl.load(candidates_ptr + slots, mask=slots < found, other=LOWEST)


@triton.jit
def _find_cut(
    scores_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    largest: tl.tensor,
    best: tl.tensor,
    low: tl.tensor,
    num_low: tl.tensor,
    max_count: tl.tensor,
    max_mass: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """Return the order of the last entry preceded by fewer than max_count entries and less than max_mass.

    ``low`` is an order that the cut is not below, with ``num_low`` entries at or above it. ``best`` is the
    order of the first entry. Also returns the number of entries kept, and their mass.
    """
    high = best + 1
    num_high = 0
    mass_high = tl.full((), 0.0, tl.float64)
    ladder = order_key(largest - LADDER_STEP * (PIVOTS - tl.arange(0, PIVOTS)))
    pivots = tl.where(tl.arange(0, PIVOTS) == 0, low, tl.maximum(ladder.to(tl.int64) << 32, low))
    while num_low - num_high > CANDIDATES:
        counts = tl.zeros([PIVOTS], tl.int32)
        masses = tl.zeros([PIVOTS], tl.float64)
        for tile in range(num_tiles):
            x, orders = load_orders(scores_ptr, tile, vocab, TILE)
            tile_counts, tile_masses = _above(orders, exp_below(x, largest), pivots)
            counts += tile_counts
            masses += tile_masses
        low, high, num_low, num_high, mass_high = _part_with_cut(
            pivots, counts, masses, high, num_high, mass_high, max_count, max_mass
        )
        pivots = spread(low, high)
    orders = _gather_candidates(
        scores_ptr, tile_max_ptr, candidates_ptr, low, high, vocab, num_tiles, TILE, CANDIDATES
    )
    masses = tl.where(orders > LOWEST, exp_below(_score_of(orders), largest), 0.0).to(tl.float64)
    num_above, mass_above = num_high, mass_high
    while high > low + 1:
        pivots = spread(low, high)
        pivot_counts, pivot_masses = _above(orders, masses, pivots)
        low, high, num_low, num_high, mass_high = _part_with_cut(
            pivots,
            pivot_counts + num_above,
            pivot_masses + mass_above,
            high,
            num_high,
            mass_high,
            max_count,
            max_mass,
        )
    cut = tl.minimum(low, best)
    kept = orders >= cut
    num_kept = num_above + tl.sum(kept.to(tl.int32))
    return cut, num_kept, mass_above + tl.sum(tl.where(kept, masses, 0.0))


@triton.jit
def _cut_of_filters(
    scores_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    largest: tl.tensor,
    best: tl.tensor,
    mass: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """Return the order of the last entry that the filters keep.

    The filters are top-k, then top-p over the entries left, then min-p. ``mass`` is that of the row.
    """
    cut = tl.full((), FLOOR, tl.int64)
    num_kept = vocab
    # Without disable_licm, values hoisted out of the searches would not fit into the registers.
    for stage in tl.range(2, disable_licm=True):
        is_top_k = stage == 0
        if (is_top_k & (top_k > 0) & (top_k < vocab)) | ((stage == 1) & (top_p < 1.0)):
            cut, num_kept, mass = _find_cut(
                scores_ptr,
                tile_max_ptr,
                candidates_ptr,
                largest,
                best,
                cut,
                num_kept,
                tl.where(is_top_k, top_k, NO_COUNT),
                tl.where(is_top_k, float("inf"), top_p.to(tl.float64) * mass),
                vocab,
                num_tiles,
                TILE,
                CANDIDATES,
            )
    if min_p > 0:
        smallest = (largest.to(tl.float64) + tl.log(min_p.to(tl.float64))).to(tl.float32)
        cut = tl.maximum(cut, order_key(smallest).to(tl.int64) << 32)
    return tl.minimum(cut, best)


@triton.jit(do_not_specialize=["num_tiles"])
def cut_kernel(
    scores_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_best_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    scores_stride: tl.tensor,
    vocab: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    """Write the cut of each row, FLOOR for a row without filters."""
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    tl.store(cut_ptr + row, FLOOR)
    if (tl.load(temperature_ptr + row) > 0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        scores_ptr += row * scores_stride
        tile_max_ptr += row * num_tiles
        tile_best_ptr += row * num_tiles
        tile_sum_ptr += row * num_tiles
        maxima, largest, best, has_nan = row_peak(tile_max_ptr, tile_best_ptr, num_tiles, TILES)
        if (tl.abs(largest) < float("inf")) & (has_nan == 0):
            tiles = tl.arange(0, TILES)
            sums = tl.load(tile_sum_ptr + tiles, mask=tiles < num_tiles, other=0.0)
            masses, _ = tile_masses(maxima, sums, largest)
            cut = _cut_of_filters(
                scores_ptr,
                tile_max_ptr,
                candidates_ptr + row * CANDIDATES,
                largest,
                order_of(largest, best),
                tl.sum(masses),
                top_k,
                top_p,
                min_p,
                vocab,
                num_tiles,
                TILE,
                CANDIDATES,
            )
            tl.store(cut_ptr + row, cut)
