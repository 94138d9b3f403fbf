"""The random draws of :mod:`sg_kernels.rng`, on the device: its counters, streams and integers."""

import triton
import triton.language as tl

from sg_kernels import rng

SAMPLING = tl.constexpr(int(rng.Stream.SAMPLING))
KEEP_PROB = tl.constexpr(int(rng.Stream.KEEP_PROB))
PAIRING = tl.constexpr(int(rng.Stream.PAIRING))
CALL = tl.constexpr(int(rng.Stream.CALL))
QUANTILE_SHIFT = tl.constexpr(rng.QUANTILE_SHIFT)
FRACTION = tl.constexpr((1 << rng.QUANTILE_SHIFT) - 1)
LARGEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def words(block, row, draw, stream, seed):
    """The four words of a block: uint32, in the shape of ``block``."""
    block, row = tl.cast(block, tl.uint32), tl.cast(row, tl.uint32)
    draw, stream = tl.cast(draw, tl.uint32), tl.cast(stream, tl.uint32)
    return tl.philox(seed, block, row, draw, stream)


@triton.jit
def word(position, row, draw, stream, seed):
    """Word number ``position`` of a row and draw of a stream."""
    # Each position computes its whole block: four times the arithmetic, no exchange of threads.
    w0, w1, w2, w3 = words(position // 4, row, draw, stream, seed)
    lane = position % 4
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def words_in_order(BLOCKS: tl.constexpr, row, draw, stream, seed):
    """The first words of a row and draw of a stream. Threads compute whole blocks, and exchange."""
    w0, w1, w2, w3 = words(tl.arange(0, BLOCKS), row, draw, stream, seed)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCKS * 4])


@triton.jit
def call_seed(seed, step, rank):
    low, high, _, _ = words(step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF, rank, CALL, seed)
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def keep_threshold(word, quantiles):
    """The inverse CDF at ``word``."""
    word = word.to(tl.int64)
    low = tl.load(quantiles + (word >> QUANTILE_SHIFT))
    high = tl.load(quantiles + (word >> QUANTILE_SHIFT) + 1)
    return low + ((high - low) * (word & FRACTION) >> QUANTILE_SHIFT)


@triton.jit
def ticket(sample, draw, seed):
    """What orders the samples of a draw: the random word, then the sample itself; 63 bits."""
    return (word(sample, 0, draw, PAIRING, seed).to(tl.int64) << 31) | sample


@triton.jit
def pairing(sample, batch, draw, seed, NO_FIXED_POINTS: tl.constexpr, TICKETS: tl.constexpr):
    """index of each ``sample``: the rank of its ticket, or the holder of the next higher one."""
    own = ticket(sample, draw, seed)
    rank = tl.zeros_like(own)
    nearest = tl.zeros_like(own) + LARGEST
    for start in range(0, batch, TICKETS):
        others = (start + tl.arange(0, TICKETS)).to(tl.int64)
        exists = (others < batch)[None, :]
        other = ticket(others, draw, seed)[None, :]
        if NO_FIXED_POINTS:
            distance = (other - own[:, None]) & LARGEST
            distance = tl.where(exists & (distance > 0), distance, LARGEST)
            nearest = tl.minimum(nearest, tl.min(distance, axis=1))
        else:
            rank += tl.sum((exists & (other < own[:, None])).to(tl.int64), axis=1)
    if NO_FIXED_POINTS:
        return (own + nearest) & 0x7FFFFFFF
    else:
        return rank
