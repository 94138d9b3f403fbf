"""The launch table: what a kernel is compiled for and started with, from sizes and strides alone.

Fixed rules instead of autotuning: the kernels move bytes, and what decides how fast is the width of
an access, the bytes in flight and the number of programs. Sizes that become constants of a kernel
are rounded to powers of two, so that few variants are ever compiled.
"""

from functools import lru_cache
from math import lcm
from typing import NamedTuple

from triton import cdiv, next_power_of_2

CHUNK = 16
"""Bytes of the widest access."""

MAX_CELLS_IN_LAUNCH_2 = 1024
"""Up to so many cells each program of launch 2 works out its sample's mask on the way."""
MAX_TERMS_IN_LAUNCH_2 = 64
"""Of so many values, of splits and window, each may be the sum: what a program reads of a cell."""
MAX_CELLS = 4096
"""Up to so many one program holds; finer grids, as of 65 x 64, run on the reference."""

MAX_EXTENT = 2**30
"""Of an image in bytes, and of a side times its cells: kernels count both in 32 bits, with room for
a tile that reaches past the end. What is larger runs on the reference."""

THREADS = 128
"""Of a program, unless it holds more cells than MAX_CELLS_IN_LAUNCH_2."""
PROGRAMS_1 = 1024
"""Launch 1 is split until it has so many, about 8 for each multiprocessor of a large device."""
PROGRAMS_2 = 2048
"""Launch 2 shares out the tiles of a row until it has so many, about 16 for each multiprocessor.
More would work out more masks again."""
MIN_PROGRAMS = 264
"""Tiles are made smaller until there are so many."""
MIN_RUN = 256
"""Bytes of a line that a tile takes at least, so that what is read at once stays together."""
PARTIAL_BYTES = 1 << 20
"""What the partial sums of all splits may take."""


class Saliency(NamedTuple):
    """How launch 1 sums channels; see saliency_kernel."""

    layout: str
    planes: int
    rows: int
    """Constant: rows of a block."""
    chunks: int
    lanes: int
    unroll: int
    tiles: int
    splits: int
    row_count: int
    strides: tuple[int, ...]
    """Of samples, rows, y and x, in chunks."""


class Tile(NamedTuple):
    """How launch 2 copies images; see graft.py."""

    channels_last: bool
    strided: bool
    uniform: bool
    unit_bytes: int
    lines: int
    """Constant: lines of a tile."""
    chunks: int
    lanes: int
    tiles: int
    tiles_across: int
    line_count: int
    chunk_count: int
    step: int
    """Elements that lie in one cell for sure: of a chunk, or where not uniform of a lane."""
    sides: tuple[int, ...]
    """The channels, height and width, one at least, then the reciprocals of these."""
    strides: tuple[int, ...]
    """Of images, channels, y and x, then the same of the output's, in chunks."""


class Cells(NamedTuple):
    """How a program holds the cells of a sample, and the values that it sums to one."""

    cells: int
    terms: int
    """Constant: so many are read at once by threads of their own,"""
    unroll: int
    """and so often by the same."""
    threads: int


class Plan(NamedTuple):
    """Both launches of a call."""

    saliency: Saliency
    cells: Cells
    tile: Tile
    window: tuple[int, int]
    """The most of a map's rows and columns that a cell of the grid averages over."""
    parts: int
    """So many programs of launch 2 share out the tiles of a row."""
    at_once: bool
    """Whether they do; else a third launch copies."""


def alignment(*addresses: int) -> int:
    """The largest power of two, at most CHUNK, that every address is a multiple of."""
    bits = CHUNK
    for address in addresses:
        bits |= address
    return bits & -bits


def widest_chunk(itemsize: int, aligned: int, *runs: int) -> int:
    """The bytes of the widest access, where runs of elements begin and end on its multiples."""
    return max(itemsize, alignment(aligned, *[run * itemsize for run in runs]))


def reciprocal(divisor: int) -> int:
    """What graft.quotient takes for a divisor below 2**31: a factor above 5 bits for a shift."""
    shift = (divisor - 1).bit_length()
    return cdiv(1 << 31 + shift, divisor) << 5 | shift


def window(size: int, grid: int) -> int:
    """The most cells of a map's axis that a cell of the grid averages over."""
    return 1 if grid >= size else cdiv(size, grid) + (size % grid != 0)


def splits_of(batch: int, tiles: int, row_count: int, block: int, map_cells: int) -> int:
    wanted = cdiv(PROGRAMS_1, max(1, batch * tiles))
    # Every split has a block to read, and launch 2 reads no more than 2048 sums of a sample.
    most = min(
        row_count // block, 2048 // map_cells, PARTIAL_BYTES // 4 // max(1, batch * map_cells)
    )
    splits = 1
    while splits < min(wanted, 16) and 2 * splits <= most:
        splits *= 2
    return splits


@lru_cache(maxsize=1024)
def saliency(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    aligned: int,
) -> Saliency:
    batch, channels, h, w = shape
    sample_stride, channel_stride, y_stride, x_stride = (
        stride if size > 1 else 0 for stride, size in zip(strides, shape)
    )
    map_cells = h * w
    if channel_stride == 1:
        chunk = widest_chunk(itemsize, aligned, channels, sample_stride, y_stride, x_stride)
        layout, planes, lanes = "channels_last", 1, chunk // itemsize
        row_count = channels // lanes
        chunks = min(next_power_of_2(max(1, row_count)), 32)
        rows = THREADS // chunks
        tiles, block = cdiv(map_cells, rows), chunks
    else:
        dense = (
            (w == 1 or x_stride == 1)
            and (h == 1 or y_stride == w)
            and (channels == 1 or channel_stride == map_cells)
        )
        layout, planes, lanes = "strided", 1, 1
        if dense:
            layout = "planes"
            chunk = widest_chunk(itemsize, aligned, channels * map_cells, sample_stride)
            while True:
                lanes = chunk // itemsize
                planes = lcm(map_cells, lanes) // map_cells
                if planes == 1 or planes * map_cells <= 2048:
                    break
                chunk //= 2
            channel_stride = planes * map_cells
        row_count = channels // planes
        chunks = next_power_of_2(planes * map_cells // lanes)
        if planes == 1:
            chunks = min(chunks, THREADS)
        rows = max(1, THREADS // chunks)
        tiles, block = cdiv(planes * map_cells // lanes, chunks), rows
    unroll = 8 if row_count > 4 * block else 4
    return Saliency(
        layout,
        planes,
        rows,
        chunks,
        lanes,
        unroll,
        tiles,
        splits_of(batch, tiles, row_count, block * unroll, map_cells),
        row_count,
        tuple(stride // lanes for stride in (sample_stride, channel_stride, y_stride, x_stride)),
    )


def given(map_cells: int, grid_cells: int, terms: int) -> Saliency:
    """How launch 1 checks a ready map and resamples it to ``grid_cells``, of ``terms`` each."""
    at_once = 1 if terms == 1 else 16 if terms <= 16 else 256
    cells = min(256, 1024 // at_once)
    tiles = min(64, max(cdiv(map_cells, 1024), cdiv(grid_cells, cells)))
    return Saliency("given", 1, at_once, cells, 1, 1, tiles, 1, 0, (0, 0, 0, 0))


def map_too_large(map_size: tuple[int, int], grid_size: tuple[int, int]) -> bool:
    """Whether a map, or a side and its cells, is beyond MAX_EXTENT, or a grid beyond MAX_CELLS."""
    (h, w), (gh, gw) = map_size, grid_size
    return max(h * w, h * gh, w * gw) > MAX_EXTENT or gh * gw > MAX_CELLS


def too_large(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    itemsize: int,
    grid_size: tuple[int, int],
) -> bool:
    """Whether an image, or a side and its cells, is beyond MAX_EXTENT."""
    (_, channels, height, width), (gh, gw) = shape, grid_size
    counts = [width * channels * gw, height * gh, channels * height]
    for pitches in (strides, out_strides):
        last = sum((size - 1) * stride for size, stride in zip(shape[1:], pitches[1:]))
        counts.append(last * itemsize)
    return max(counts) > MAX_EXTENT


def chunks_across(chunk_count: int, chunk: int, most: int) -> int:
    """How many chunks of a line lie in a tile: a power of two that leaves the fewest lanes idle."""
    best = chunks = most
    while chunks * chunk > MIN_RUN:
        chunks //= 2
        if cdiv(chunk_count, chunks) * chunks < cdiv(chunk_count, best) * best:
            best = chunks
    return best


@lru_cache(maxsize=1024)
def tile(
    rows: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    itemsize: int,
    aligned: int,
    grid_size: tuple[int, int],
    whole_elements: bool,
    threads: int,
) -> Tile | None:
    """``whole_elements``: lanes are elements, for arithmetic. None for what is too large."""
    if too_large(shape, strides, out_strides, itemsize, grid_size):
        return None
    _, channels, height, width = shape
    strides = tuple(s if n > 1 else 0 for s, n in zip(strides, shape))
    out_strides = tuple(s if n > 1 else 0 for s, n in zip(out_strides, (rows, *shape[1:])))
    channels_last = 0 < out_strides[1] < out_strides[3]
    if channels_last:
        line_count, line = height, width * channels
        strided = any(s[1] != 1 or s[3] != channels for s in (strides, out_strides))
        pitches: tuple[int, ...] = (strides[0], strides[2], out_strides[0], out_strides[2])
    else:
        line_count, line = channels * height, width
        strided = width > 1 and not strides[3] == out_strides[3] == 1
        pitches = (*strides[:3], *out_strides[:3])
    chunk = itemsize if strided else widest_chunk(itemsize, aligned, line, *pitches)
    chunk_elements = chunk // itemsize
    chunk_count = line // chunk_elements

    gw = grid_size[1]
    pixel = channels * itemsize if channels_last else itemsize
    unit = alignment(chunk, *(cdiv(g * width, gw) * pixel for g in range(1, gw)))
    uniform = unit == chunk
    unit_bytes = itemsize if whole_elements else min(unit, 8)
    lanes = chunk // unit_bytes

    # Accesses in flight for each thread; one where narrow lanes take a register each.
    size = max(4 * threads, 256) if unit_bytes >= 4 or lanes == 1 else threads
    chunks = chunks_across(chunk_count, chunk, min(next_power_of_2(max(1, chunk_count)), 256, size))
    lines = min(size // chunks, next_power_of_2(max(1, line_count)))
    while (
        lines > 1 and lines * chunks > 2 * threads and rows * cdiv(line_count, lines) < MIN_PROGRAMS
    ):
        lines //= 2
    tiles_across = cdiv(chunk_count, chunks)
    sides = [max(1, side) for side in shape[1:]]
    return Tile(
        channels_last,
        strided,
        uniform,
        unit_bytes,
        lines,
        chunks,
        lanes,
        max(1, tiles_across * cdiv(line_count, lines)),
        max(1, tiles_across),
        line_count,
        chunk_count,
        chunk_elements if uniform else unit_bytes // itemsize,
        (*sides, *map(reciprocal, sides)),
        tuple(stride // chunk_elements for stride in (*strides, *out_strides)),
    )


def cells(grid_cells: int, terms: int) -> Cells:
    block = next_power_of_2(grid_cells)
    if block <= MAX_CELLS_IN_LAUNCH_2:
        block = 64 if block <= 64 else 256 if block <= 256 else 1024
    if terms > MAX_TERMS_IN_LAUNCH_2:
        return Cells(block, max(1, 4096 // block), 1, THREADS if block <= 1024 else 1024)
    # One warp needs no barriers.
    threads = 32 if block <= 64 else THREADS if block <= 1024 else 1024
    return Cells(block, 1, min(terms, 4), threads)


@lru_cache(maxsize=1024)
def saliency_graft(
    rows: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    itemsize: int,
    aligned: int,
    source_shape: tuple[int, ...],
    source_strides: tuple[int, ...],
    source_itemsize: int,
    source_aligned: int,
    ready: bool,
    grid_size: tuple[int, int],
) -> Plan | None:
    """The source: a ``ready`` map, or features. None for what is too large, and for no rows."""
    (h, w), (gh, gw) = source_shape[-2:], grid_size
    if rows == 0 or map_too_large((h, w), grid_size):
        return None
    windows = window(h, gh), window(w, gw)
    if ready:  # launch 1 resamples it
        summed, terms = given(h * w, gh * gw, windows[0] * windows[1]), 1
    else:
        summed = saliency(source_shape, source_strides, source_itemsize, source_aligned)
        terms = summed.splits * windows[0] * windows[1]
    held = cells(gh * gw, terms)
    copied = tile(
        rows, shape, strides, out_strides, itemsize, aligned, grid_size, False, held.threads
    )
    if copied is None:
        return None
    at_once = gh * gw <= MAX_CELLS_IN_LAUNCH_2 and terms <= MAX_TERMS_IN_LAUNCH_2
    parts = min(copied.tiles, cdiv(PROGRAMS_2, rows)) if at_once else 1
    return Plan(summed, held, copied, windows, parts, at_once)
