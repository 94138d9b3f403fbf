"""Every random draw of the method: Philox4x32-10, its counters, and what is made of its words.

One 64-bit seed is the key; the counter says which draw is meant, so a draw depends on nothing else:

    c0  block: word ``i`` of a stream is word ``i % 4`` of block ``i // 4``
    c1  row: the sample b in the batch, 0 where the whole batch shares the draw
    c2  draw: the augmentation a, 0 .. augmentations - 1
    c3  stream: one of :class:`Stream`

Words are uint32, held in int64 tensors here, and compared as integers: no backend rounds a draw.
csrc/philox.h keeps to the same layout.
"""

from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Word = Any
"""A uint32 as a Python int, or many in an int64 tensor."""

MASK32 = 0xFFFFFFFF
ONE = 1 << 32
"""Probability 1 as an integer threshold: every uint32 word lies below it."""

QUANTILE_BINS = 1024
QUANTILE_SHIFT = 32 - (QUANTILE_BINS - 1).bit_length()
"""The bits of a word that say where in its bin it lies."""
QUANTILE_BITS = 24
"""Bits of the nodes of the table: coarse enough to hide differences between libms."""


class Stream(IntEnum):
    """What a counter's last word stands for."""

    SAMPLING = 0  # per row: word c decides cell c
    KEEP_PROB = 1  # word 0 draws p, word 1 decides whether the call grafts at all
    PAIRING = 2  # word b is the ticket of sample b
    GRID_SIZE = 3  # word 0 picks one of the sizes
    CALL = 4  # block and row hold the step, draw the rank: words 0 and 1 seed that call


def philox(c0: Word, c1: Word, c2: Word, c3: Word, seed: Word) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 (Salmon et al., SC 2011) on Python ints or broadcastable int64 tensors.

    The counter words are uint32 values; ``seed`` gives the key, low word first. Returns four uint32
    words.
    """
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _multiply(word: Word, factor: int) -> tuple[Word, Word]:
    """The high and the low uint32 of a product.

    By halves, as a compiler may do anything with an int64 that overflows.
    """
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & MASK32


def words(seed: Tensor, stream: Stream, count: int, rows: int = 1, draws: int = 1) -> Tensor:
    """The first ``count`` words of every row and draw of a stream: int64 (draws, rows, count)."""
    block = torch.arange(-(-count // 4), device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    draw = torch.arange(draws, device=seed.device)[:, None, None]
    return torch.stack(philox(block, row, draw, stream, seed), dim=-1).flatten(2)[..., :count]


def call_seed(seed: Word, step: Word, rank: int) -> Word:
    """The seed of call number ``step`` on process ``rank``, from the seed that all share."""
    low, high, _, _ = philox(step & MASK32, (step >> 32) & MASK32, rank, Stream.CALL, seed)
    return low | high << 32


def pairing(seed: Tensor, batch: int, draws: int, no_fixed_points: bool) -> Tensor:
    """A random permutation of the batch per draw: int64 (draws, batch).

    Each sample holds a 32-bit ticket and index[b] is the rank of b's (ties: lower sample first), so
    all permutations are equally likely. With ``no_fixed_points`` index[b] is the holder of the next
    higher ticket, the last wrapping to the first: all cyclic permutations are, and no sample meets
    itself.
    """
    tickets = words(seed, Stream.PAIRING, batch, draws=draws)[:, 0]
    order = tickets.argsort(dim=1, stable=True)
    if no_fixed_points:
        return torch.empty_like(order).scatter_(1, order, order.roll(-1, dims=1))
    return order.argsort(dim=1)


def _integral_above(density: np.ndarray) -> np.ndarray:
    """From each sample to the last, by trapezoids one wide."""
    return np.append(np.cumsum(((density[1:] + density[:-1]) / 2)[::-1])[::-1], 0.0)


@lru_cache
def _beta_quantiles(alpha: float) -> tuple[int, ...]:
    # With x = 1 / (1 + exp(t)) the density in t is (2 cosh(t/2))^(-2 alpha): smooth, no pole at any
    # alpha. Its tail beyond t is about exp(-alpha t), and the width of its bulk sqrt(2 / alpha).
    alpha = max(alpha, 1e-9)  # below, p is 0 or 1 in all but one draw in millions
    t = np.linspace(0.0, 40.0 / alpha + 16.0 / np.sqrt(alpha), 1 << 16)
    log_density = -2.0 * alpha * (np.logaddexp(t / 2, -t / 2) - np.log(2.0))
    density = np.exp(log_density)
    x = np.exp(-np.logaddexp(0.0, t))
    total = 2.0 * _integral_above(density)[0]
    tail = _integral_above(density) / total  # P(T > t); 1/2 at t = 0, by symmetry
    nodes = np.arange(QUANTILE_BINS // 2 + 1) / QUANTILE_BINS
    t_nodes = np.interp(nodes, tail[::-1], t[::-1])
    x_nodes = np.exp(-np.logaddexp(0.0, t_nodes))
    # Hardly any p of the last bin lie near its end, 0: it ends where its mean is right instead.
    mean = QUANTILE_BINS * np.interp(t_nodes[1], t, _integral_above(density * x)) / total
    x_nodes[0] = max(0.0, 2.0 * mean - x_nodes[1])
    lower_half = np.rint(x_nodes * (1 << QUANTILE_BITS)).astype(np.int64) << (32 - QUANTILE_BITS)
    return tuple(np.concatenate([lower_half, ONE - lower_half[-2::-1]]).tolist())


def beta_quantiles(alpha: float) -> Tensor:
    """Inverse CDF of Beta(alpha, alpha) at k/1024, as thresholds: int64 (1025,), 0 .. 2**32.

    Any ``alpha`` > 0. :func:`keep_threshold` interpolates between the nodes, so the CDF of what is
    drawn is off by less than 1/1024 everywhere. A p within 2**-25 of 0 or 1 becomes 0 or 1. The
    first and the last node keep the mean of their bins.
    """
    return torch.tensor(_beta_quantiles(alpha), device="cpu")


def keep_threshold(word: Tensor, quantiles: Tensor) -> Tensor:
    """The threshold below which a word keeps its cell: the inverse CDF at ``word``, in integers."""
    low = quantiles[word >> QUANTILE_SHIFT]
    high = quantiles[(word >> QUANTILE_SHIFT) + 1]
    fraction = word & ((1 << QUANTILE_SHIFT) - 1)
    return low + ((high - low) * fraction >> QUANTILE_SHIFT)


def draw_grid_size(seed: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """One of ``sizes``, each as likely (paper: the grid's scale is drawn per mini-batch)."""
    return sizes[philox(0, 0, 0, Stream.GRID_SIZE, seed)[0] * len(sizes) >> 32]
