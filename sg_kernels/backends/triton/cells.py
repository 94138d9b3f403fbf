"""The stages that work on a sample's cells, 2 to 5, 7 and 8, named as in the reference.

A program holds all cells of a grid at once, in a block of CELLS >= gh * gw; ``valid`` marks the
real ones. Maps are read from their partial sums: ``values``, (SPLITS, batch, h, w).
"""

import triton
import triton.language as tl

from sg_kernels.backends import reference
from sg_kernels.backends.triton import philox

FLAT = tl.constexpr(reference.FLAT)
TINY = tl.constexpr(reference.TINY)
HEADROOM = tl.constexpr(reference.HEADROOM)


@triton.jit
def checked(value):
    """A ready map's value: what is not >= 0 counts as NaN, so its sample keeps nothing."""
    return tl.where(value >= 0, value, float("nan"))


@triton.jit
def window_begin(position, size, grid):
    return position * size // grid


@triton.jit
def window_end(position, size, grid):
    # A grid finer than the map takes one value, the nearest.
    end = ((position + 1) * size + grid - 1) // grid
    return tl.where(grid >= size, window_begin(position, size, grid) + 1, end)


@triton.jit
def sum_splits(
    values, map_cells, batch, sample, place, valid, SPLITS: tl.constexpr, UNROLL: tl.constexpr
):
    """The values of a map at each ``place``. UNROLL splits are read at once."""
    value = values + sample * map_cells + place
    total = tl.zeros(place.shape, tl.float32)
    for start in range(0, SPLITS, UNROLL):
        for part in tl.static_range(UNROLL):
            split = tl.cast(start + part, tl.int64) * batch * map_cells
            total += tl.load(value + split, mask=valid, other=0.0)
    return total


@triton.jit
def resample(
    values,
    maps,
    batch,
    sample,
    cell,
    valid,
    SPLITS: tl.constexpr,
    CHECKED: tl.constexpr,
    TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Stage 2: the grid's values in ``cell``, each the mean of at most a window.

    UNROLL times TERMS values are read at once, TERMS of them by different threads. Values not
    CHECKED yet, of a ready map, are checked first.
    """
    size, grid, window = maps.size, maps.grid, maps.window
    cy, cx = cell // grid.width, cell % grid.width
    top = window_begin(cy, size.height, grid.height)
    left = window_begin(cx, size.width, grid.width)
    high = window_end(cy, size.height, grid.height) - top
    wide = window_end(cx, size.width, grid.width) - left
    first = top * size.width + left
    total = tl.zeros(cell.shape, tl.float32)
    window_cells = window.height * window.width
    for start in range(0, SPLITS * window_cells, TERMS * UNROLL):
        for part in tl.static_range(UNROLL):
            term = start + part * TERMS + tl.arange(0, TERMS)[:, None]
            split, inner = term // window_cells, term % window_cells
            y, x = inner // window.width, inner % window.width
            inside = (y < high[None, :]) & (x < wide[None, :])
            inside = inside & valid[None, :] & (split < SPLITS)
            row = split.to(tl.int64) * batch + sample
            whole = values + row * (size.height * size.width)
            place = first[None, :] + y * size.width + x
            value = tl.load(whole + place, mask=inside, other=0.0)
            if not CHECKED:
                value = checked(value)
            total += tl.sum(value * HEADROOM, axis=0)
    return total / ((high * wide).to(tl.float32) * HEADROOM)


@triton.jit
def grid_of(values, maps, batch, sample, cell, valid, CELLS: tl.constexpr):
    """Stage 2 in launch 2: the map's own values where the grid has its size."""
    SPLITS: tl.constexpr = CELLS.splits
    UNROLL: tl.constexpr = CELLS.unroll
    if CELLS.resampled:
        return resample(values, maps, batch, sample, cell, valid, SPLITS, True, CELLS.terms, UNROLL)
    else:
        map_cells = maps.size.height * maps.size.width
        return sum_splits(values, map_cells, batch, sample, cell, valid, SPLITS, UNROLL)


@triton.jit
def destination_of(index, row, own, batch):
    """The image that a row is grafted onto and True; or its own and False, where that is out of
    range.
    """
    other = tl.load(index + row)
    known = (other >= 0) & (other < batch)
    return tl.where(known, other, own), known


@triton.jit
def peak_of(grid, valid):
    """The largest value; NaN may count as such. The bits of floats >= 0 order them, and a warp
    compares integers in one step.
    """
    bits = tl.where(valid, grid, 0.0).to(tl.int32, bitcast=True)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def normalize_scale(grid, valid, cells, peak, NORMALIZE: tl.constexpr):
    """Stage 3: what the map is divided by before the softmax."""
    if NORMALIZE == "max":
        return peak
    elif NORMALIZE == "mean":
        total = tl.sum(tl.where(valid, grid, 0.0).to(tl.float64), axis=0)  # float32 may overflow
        return (total / cells.to(tl.float64)).to(tl.float32)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def kth_largest(key, k, CELLS: tl.constexpr):
    """The k-th largest of ``key``, below CELLS << 31: bit by bit, from the top."""
    kth = tl.full([], 0, tl.int64)
    bit = tl.full([], CELLS, tl.int64) << 30
    while bit > 0:
        enough = tl.sum((key >= (kth | bit)).to(tl.int32), axis=0) >= k
        kth = tl.where(enough, kth | bit, kth)
        bit = bit >> 1
    return kth


@triton.jit
def select(grid, cell, valid, cells, options, STAGES: tl.constexpr, CELLS: tl.constexpr):
    """Stage 4: the salient cells. A map that holds NaN or infinity has none."""
    NORMALIZE: tl.constexpr = STAGES.normalize
    if STAGES.topk:
        finite = tl.max((valid & ~(tl.abs(grid) < float("inf"))).to(tl.int32), axis=0) == 0
        # The bits of floats >= 0 order them; of equal ones the lowest cell comes first.
        value = tl.where(grid > 0, grid, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        key = tl.where(valid, value * CELLS + (CELLS - 1 - cell), -1)
        return key >= tl.where(finite, kth_largest(key, options.k, CELLS), philox.LARGEST)
    else:
        peak = peak_of(grid, valid)
        least = tl.where(valid, grid, float("inf")).to(tl.int32, bitcast=True)
        varies = tl.min(least, axis=0).to(tl.float32, bitcast=True) < peak * FLAT
        scale = normalize_scale(grid, valid, cells, peak, NORMALIZE)
        # NaN for NaN, and for infinity, which is the peak; then so is the total.
        numerator = tl.exp((grid - peak) / scale / options.temperature)
        numerator = tl.where(numerator < TINY, TINY, numerator)
        total = tl.sum(tl.where(valid, numerator, 0.0), axis=0)
        threshold = tl.where(varies, options.threshold * total, float("inf"))
        return valid & (numerator > threshold)


@triton.jit
def draw_keep_prob(draw, seed, quantiles, pairing):
    """Stage 5, what a draw's rows share: p as a threshold of words, or -1 where it does not graft.

    p is ``pairing.keep_prob`` where there are no ``quantiles``.
    """
    p_word, gate_word, _, _ = philox.words(0, 0, draw, philox.KEEP_PROB, seed)
    p = pairing.keep_prob if quantiles is None else philox.keep_threshold(p_word, quantiles)
    return tl.where(gate_word.to(tl.int64) < pairing.prob, p, -1)


@triton.jit
def sample(keep, cell, row, draw, seed, p):
    """Stage 5: the salient cells that are kept."""
    if cell.shape[0] <= 64:
        word = philox.words_in_order(cell.shape[0] // 4, row, draw, philox.SAMPLING, seed)
    else:  # several warps, whose exchange takes barriers
        word = philox.word(cell, row, draw, philox.SAMPLING, seed)
    return keep & (word.to(tl.int64) < p)


@triton.jit
def gate(kept, valid, p):
    """Stage 5: M. A draw that does not graft has all True."""
    return tl.where(p >= 0, kept, valid)


@triton.jit
def bits_of(mask):
    """A mask of at most 64 cells as the bits of one integer, which every thread holds."""
    if mask.shape[0] <= 64:
        cell = tl.arange(0, mask.shape[0])
        bit = tl.where(mask, tl.full(mask.shape, 1, tl.int32) << (cell % 32), 0)
        low, high = tl.sum(tl.where(cell < 32, bit, 0)), tl.sum(tl.where(cell < 32, 0, bit))
        return low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def mask_at(mask, bits, cell):
    """The mask at each ``cell``: from its bits, or where those are too few from shared memory."""
    if mask.shape[0] <= 64:
        return (bits >> cell) & 1 != 0
    else:
        kept = tl.gather(mask.to(tl.int32), tl.ravel(cell), 0)
        return tl.reshape(kept, cell.shape) != 0


@triton.jit
def norms(grid, kept, valid, NORM: tl.constexpr):
    """||S kept|| and ||S||, before the root of "l2"."""
    weight = tl.where(valid, grid / peak_of(grid, valid), 0.0)  # squares cannot overflow
    if NORM != "l1":
        weight = weight * weight
    return tl.sum(tl.where(kept, weight, 0.0), axis=0), tl.sum(weight, axis=0)


@triton.jit
def label_ratio(own, other, mask, valid, cells, NORM: tl.constexpr):
    """Stage 7: lam, from the grids of the source and the destination."""
    # All sums before the divisions, which branch: so they are worked out side by side.
    if NORM != "area":
        own_kept, own_norm = norms(own, mask, valid, NORM)
        other_left, other_norm = norms(other, valid & ~mask, valid, NORM)
    count = tl.sum(mask.to(tl.int32), axis=0)
    # Rounded as in IEEE 754, here and below: the share of a map that survives whole is 1.
    lam = tl.div_rn(count.to(tl.float32), cells.to(tl.float32))
    if NORM != "area":
        kept, left = tl.div_rn(own_kept, own_norm), tl.div_rn(other_left, other_norm)
        if NORM == "l2":
            kept, left = tl.sqrt(kept), tl.sqrt(left)
        ratio = tl.div_rn(kept, kept + left)
        lam = tl.where(tl.abs(ratio) < float("inf"), ratio, lam)
    return lam


@triton.jit
def classes_of(targets, own, other, known, num_classes, TARGETS: tl.constexpr):
    """What mix_targets takes for two images: their class ids, or if targets are rows the images
    themselves; and whether both are in range.
    """
    if TARGETS == "ids":
        own, other = tl.load(targets + own), tl.load(targets + other)
        known = known & (own >= 0) & (own < num_classes) & (other >= 0) & (other < num_classes)
        own, other = own.to(tl.int32), other.to(tl.int32)  # lam is NaN for those out of range
    return own, other, known


@triton.jit
def mix_targets(
    targets, mixed, row, own, other, lam, column, num_classes, smoothing, TARGETS: tl.constexpr
):
    """Stage 8: the columns ``column`` of a row of mixed targets; NaN where lam is."""
    inside = column < num_classes
    if TARGETS == "ids":
        own_target = (own == column).to(tl.float32)
        other_target = (other == column).to(tl.float32)
    else:
        own_target = tl.load(targets + own * num_classes + column, mask=inside)
        other_target = tl.load(targets + other * num_classes + column, mask=inside)
    value = lam * own_target + (1 - lam) * other_target
    value = (1 - smoothing) * value + smoothing / num_classes.to(tl.float32)
    tl.store(mixed + row * num_classes + column, value, mask=inside)
