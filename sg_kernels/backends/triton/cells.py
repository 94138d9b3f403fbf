"""The stages that work on a sample's cells, 2 to 5, 7 and 8, named as in the reference.

A program holds all cells of a grid at once, in a block of CELLS >= gh * gw; ``valid`` marks the
real ones. Maps are read from their partial sums: ``values``, of the sizes in ``maps``.
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
def sum_values(
    values,
    maps,
    batch,
    sample,
    first,
    valid,
    extent,
    CHECKED: tl.constexpr,
    TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums the splits of each cell: its value at ``first``, or all those in an ``extent`` from it,
    times HEADROOM.

    UNROLL times TERMS values are read at once, TERMS of them by different threads. Values not
    CHECKED yet, of a ready map without splits, are checked first.
    """
    splits = maps.splits if CHECKED else 1
    window_cells = 1 if extent is None else maps.window.height * maps.window.width
    total = tl.zeros(first.shape, tl.float32)
    for start in range(0, splits * window_cells, TERMS * UNROLL):
        for part in tl.static_range(UNROLL):
            split = start + part * TERMS + tl.arange(0, TERMS)[:, None]
            place, inside = first[None, :], valid[None, :]
            if extent is not None:
                high, wide = extent
                inner = split % window_cells
                split = split // window_cells
                y, x = inner // maps.window.width, inner % maps.window.width
                place = place + y * maps.size.width + x
                inside = inside & (y < high[None, :]) & (x < wide[None, :])
            row = split.to(tl.int64) * batch + sample
            inside = inside & (split < splits)
            whole = values + row * (maps.size.height * maps.size.width)
            value = tl.load(whole + place, mask=inside, other=0.0)
            if not CHECKED:
                value = checked(value)
            if extent is not None:
                value = value * HEADROOM
            total += tl.sum(value, axis=0)
    return total


@triton.jit
def resample(
    values,
    maps,
    batch,
    sample,
    cell,
    valid,
    CHECKED: tl.constexpr,
    TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Stage 2: the grid's values in ``cell``, each the mean of at most a window."""
    size, grid = maps.size, maps.grid
    if (grid.height != size.height) | (grid.width != size.width):
        cy, cx = cell // grid.width, cell % grid.width
        top = window_begin(cy, size.height, grid.height)
        left = window_begin(cx, size.width, grid.width)
        high = window_end(cy, size.height, grid.height) - top
        wide = window_end(cx, size.width, grid.width) - left
        first, extent = top * size.width + left, (high, wide)
        total = sum_values(
            values, maps, batch, sample, first, valid, extent, CHECKED, TERMS, UNROLL
        )
        total = total / ((high * wide).to(tl.float32) * HEADROOM)
    else:
        total = sum_values(values, maps, batch, sample, cell, valid, None, CHECKED, TERMS, UNROLL)
    return total


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
    return tl.max(tl.where(valid, grid, -float("inf")), axis=0)


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
        varies = tl.min(tl.where(valid, grid, float("inf")), axis=0) < peak * FLAT
        scale = normalize_scale(grid, valid, cells, peak, NORMALIZE)
        # NaN for NaN, and for infinity, which is the peak; then so is the total.
        numerator = tl.exp((grid - peak) / scale / options.temperature)
        numerator = tl.where(numerator < TINY, TINY, numerator)
        total = tl.sum(tl.where(valid, numerator, 0.0), axis=0)
        threshold = tl.where(varies, options.threshold * total, float("inf"))
        return valid & (numerator > threshold)


@triton.jit
def draw_keep_prob(draw, seed, quantiles, options):
    """Stage 5, what a draw's rows share: p as a threshold of words, and whether it grafts at all.

    p is ``options.keep_prob`` where there are no ``quantiles``.
    """
    p_word, gate_word, _, _ = philox.words(0, 0, draw, philox.KEEP_PROB, seed)
    p = options.keep_prob if quantiles is None else philox.keep_threshold(p_word, quantiles)
    return p, gate_word.to(tl.int64) < options.prob


@triton.jit
def sample(keep, cell, row, draw, seed, p):
    """Stage 5: the salient cells that are kept."""
    return keep & (philox.word(cell, row, draw, philox.SAMPLING, seed).to(tl.int64) < p)


@triton.jit
def gate(kept, valid, grafts):
    """Stage 5: M. A draw that does not graft has all True."""
    return tl.where(grafts, kept, valid)


@triton.jit
def bits_of(mask):
    """A mask of at most 64 cells as the bits of one integer, which every thread holds."""
    if mask.shape[0] <= 64:
        bit = tl.full(mask.shape, 1, tl.int64) << tl.arange(0, mask.shape[0])
        return tl.sum(tl.where(mask, bit, 0), axis=0)


@triton.jit
def mask_at(mask, bits, cell):
    """The mask at each ``cell``: from its bits, or where those are too few from shared memory."""
    if mask.shape[0] <= 64:
        return (bits >> cell) & 1 != 0
    else:
        kept = tl.gather(mask.to(tl.int32), tl.ravel(cell), 0)
        return tl.reshape(kept, cell.shape) != 0


@triton.jit
def share(grid, kept, valid, NORM: tl.constexpr):
    """I(S, kept) = ||S kept|| / ||S||, before the root of "l2"."""
    weight = tl.where(valid, grid / peak_of(grid, valid), 0.0)  # squares cannot overflow
    if NORM != "l1":
        weight = weight * weight
    # Rounded as in IEEE 754, here and below: the share of a map that survives whole is 1.
    return tl.div_rn(tl.sum(tl.where(kept, weight, 0.0), axis=0), tl.sum(weight, axis=0))


@triton.jit
def label_ratio(own, other, mask, valid, cells, NORM: tl.constexpr):
    """Stage 7: lam, from the grids of the source and the destination."""
    lam = tl.div_rn(tl.sum(mask.to(tl.float32), axis=0), cells.to(tl.float32))
    if NORM != "area":
        kept = share(own, mask, valid, NORM)
        left = share(other, valid & ~mask, valid, NORM)
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
