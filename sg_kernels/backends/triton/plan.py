"""What a launch looks like, decided from sizes, strides and the device alone.

Fixed rules instead of autotuning: the kernels move bytes, so their speed depends on the width of an
access, the bytes in flight and the number of programs. Sizes that become constants of a kernel are
rounded to powers of two, so that few variants are compiled.

The policy, which csrc/cuda shares:

- Launch 1 splits the channels of each sample where a batch alone would leave multiprocessors idle.
  Each split writes a partial sum; launch 2 adds them up.
- In launch 2 several programs share the tiles of a row, and each works out the row's mask itself.
  This is cheap for grids of at most MAX_CELLS_IN_LAUNCH_2 cells and at most MAX_TERMS "terms": the
  values that a thread adds up for its cells, which is cells per thread x splits x window. Beyond
  either limit, one program per row works out the mask and a third launch copies.
- A chunk is the widest access that pointers, strides and lines allow. Tiles shrink, and more
  programs share a row, until every multiprocessor has work.

The number of programs aimed at is a multiple of the number of multiprocessors.
"""

from functools import lru_cache
from math import ceil, lcm
from typing import NamedTuple

from triton import cdiv, next_power_of_2

from sg_kernels.backends.triton.arguments import (
    Block,
    Cells,
    Layout,
    Maps,
    Rows,
    Sides,
    Size,
    Strides,
    Sums,
    Tiles,
)

CHUNK = 16
"""Bytes of the widest access."""
MIN_RUN = 256
"""Least bytes of a line in a tile: eight sectors, so that neighbouring bytes are read together."""
MAX_EXTENT = 2**30
"""Most bytes of an image, and most cells times a side: kernels count both in 32 bits, with room for
a tile that reaches past the end. Larger calls use the reference."""

MAX_DRAWS = 65535
"""Most augmentations: the second axis of a launch ends there. Larger calls use the reference."""
MAX_CELLS = 4096
"""Most cells per program; finer grids, as of 65 x 64, use the reference."""
MAX_CELLS_IN_LAUNCH_2 = 1024
"""Largest grid that every program of launch 2 works out: 8 cells per thread."""
MAX_TERMS = 128
"""Most values that a thread adds up for its cells in launch 2: 32 loads in a row, four in flight
each. The blocks of csrc have twice the threads, and half the limit."""

THREADS = 128
"""Of a program: small enough that one program waits for memory while others run."""
MANY_THREADS = 1024
"""Of a program that holds more than MAX_CELLS_IN_LAUNCH_2 cells: up to 4 per thread."""
WARP = 32
"""Of a program whose cells fit one warp, which needs no barriers."""

PROGRAMS_1 = 6.5
"""Splits double until launch 1 has this many programs per multiprocessor, on average. Eight fit, at
64 registers per thread."""
PROGRAMS_2 = 15.5
"""Programs of launch 2 per multiprocessor, on average, where rows have enough tiles: two rounds of
about eight, so that the last to finish cost little. More would repeat more masks."""
MIN_PROGRAMS = 2
"""Tiles shrink until there are more programs per multiprocessor, to hide the latency of memory."""

MAX_SPLITS = 16
"""More would cost launch 2 more loads than they save launch 1."""
MAX_SUMS = 2048
"""Most partial sums of a sample, which every program of launch 2 reads: 16 per thread."""
PARTIAL_BYTES = 1 << 20
"""Most memory of the partial sums of a call: extra memory stays below 1 MiB."""

MAX_PLANES_CELLS = 2048
"""Most values of a row of planes: a program holds the row whole, 8 KiB of shared memory."""
CHANNEL_CHUNKS = 32
"""Most chunks of channels side by side: one for each thread of a warp."""
UNROLL = 8
"""Loads in flight per thread of launch 1, where there is enough to read."""
SHORT_UNROLL = 4
"""The same where at most this many blocks hold everything: more loads would lie past the end."""

GIVEN_VALUES = 1024
"""Values of a ready map that a program reads at once: 8 per thread."""
GIVEN_CELLS = 256
"""Most cells that it resamples at once: 2 per thread."""
GIVEN_TERMS = (1, 16, 256)
"""Values of a cell that it reads in parallel: the first of these that holds a window, or the last.
Only these variants are compiled."""
MAX_GIVEN_TILES = 64
"""Most programs per ready map: a batch of four then gives a large device two per multiprocessor."""

BLOCKS_OF_CELLS = (64, 256, 1024)
"""Cells of a block in launch 2: three variants serve all its grids, the first with one warp."""
PARALLEL_VALUES = 4096
"""Values that a program reads in parallel where a cell has too many for one thread."""
TERMS_IN_FLIGHT = 4
"""Loads in flight per thread where one thread sums the window of a cell."""
SPLITS_IN_FLIGHT = 32
"""The same, over all its cells, where their splits alone are summed: each takes a register."""

ACCESSES = 4
"""Chunks per thread of a tile, all in flight at once."""
MIN_CHUNKS = 256
"""Least chunks of a tile, however few its threads are: 4 KiB."""
MIN_ACCESSES = 2
"""Least chunks per thread to which tiles shrink."""
MAX_CHUNKS_ACROSS = 256
"""Most chunks of a line in a tile: 4 KiB."""
MIN_UNIT = 4
"""Bytes of a lane that fills a register."""
MAX_UNIT = 8
"""Bytes of the widest integer that images are copied as."""


class Saliency(NamedTuple):
    """How launch 1 sums channels."""

    block: Block
    sums: Sums


class Tile(NamedTuple):
    """How launch 2 copies images; see copy.py."""

    layout: Layout
    unit_bytes: int
    """Bytes of a lane."""
    tiles: Tiles


class Plan(NamedTuple):
    """All launches of a call."""

    saliency: Saliency
    maps: Maps
    """As launch 1 reads or writes them."""
    gridded: bool
    """Whether launch 1 resamples a ready map to the grid."""
    grids: Maps
    """As launch 2 reads them."""
    cells: Cells
    threads: int
    """Of launch 2."""
    tile: Tile
    rows: Rows
    at_once: bool
    """Whether launch 2 copies; else a third launch does."""


def alignment(*addresses: int) -> int:
    """The largest power of two, at most CHUNK, that divides every address."""
    bits = CHUNK
    for address in addresses:
        bits |= address
    return bits & -bits


def widest_chunk(itemsize: int, aligned: int, *runs: int) -> int:
    """Bytes of the widest access, where runs of elements begin and end on its multiples."""
    return max(itemsize, alignment(aligned, *[run * itemsize for run in runs]))


def reciprocal(divisor: int) -> int:
    """What copy.quotient takes for a divisor below 2**31: a factor above 5 bits for a shift."""
    shift = (divisor - 1).bit_length()
    return cdiv(1 << 31 + shift, divisor) << 5 | shift


def window(size: int, grid: int) -> int:
    """The most positions of a map's axis that a cell of the grid averages over."""
    return 1 if grid >= size else cdiv(size, grid) + (size % grid != 0)


def splits_of(
    batch: int, tiles: int, row_count: int, block: int, map_cells: int, multiprocessors: int
) -> int:
    """Splits of a sample's channels, a power of two. ``block``: rows that a program reads at once,
    of which every split gets one.
    """
    memory = PARTIAL_BYTES // 4 // max(1, batch * map_cells)
    most = min(MAX_SPLITS, row_count // block, MAX_SUMS // map_cells, memory)
    splits = 1
    while splits * batch * tiles < PROGRAMS_1 * multiprocessors and 2 * splits <= most:
        splits *= 2
    return splits


@lru_cache(maxsize=1024)
def saliency(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    aligned: int,
    multiprocessors: int,
) -> Saliency:
    """How to sum features of these sizes and strides over their channels."""
    batch, _, h, w = shape
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(strides, shape))
    walk = _across_channels if strides[1] == 1 else _across_planes
    block, row_count, tiles, at_once, row_stride = walk(shape, strides, itemsize, aligned)
    block = block._replace(unroll=UNROLL if row_count > SHORT_UNROLL * at_once else SHORT_UNROLL)
    in_chunks = [s // block.lanes for s in (strides[0], row_stride, strides[2], strides[3])]
    splits = splits_of(batch, tiles, row_count, at_once * block.unroll, h * w, multiprocessors)
    return Saliency(block, Sums(splits, tiles, row_count, *in_chunks))


def _across_channels(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: int
) -> tuple[Block, int, int, int, int]:
    """The block for channels that are neighbours; rows, tiles, rows at once, and their stride."""
    _, channels, h, w = shape
    lanes = widest_chunk(itemsize, aligned, channels, strides[0], *strides[2:]) // itemsize
    row_count = channels // lanes
    chunks = min(next_power_of_2(max(1, row_count)), CHANNEL_CHUNKS)
    rows = THREADS // chunks
    block = Block("channels_last", 1, rows, chunks, lanes, 0)
    return block, row_count, cdiv(h * w, rows), chunks, strides[1]


def _across_planes(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: int
) -> tuple[Block, int, int, int, int]:
    """The same for channels that are planes (h, w). Dense planes are read as rows of several, so
    many that a row is a multiple of the widest access.
    """
    _, channels, h, w = shape
    sample_stride, channel_stride, y_stride, x_stride = strides
    map_cells = h * w
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
            if planes == 1 or planes * map_cells <= MAX_PLANES_CELLS:
                break
            chunk //= 2
        channel_stride = planes * map_cells
    row_chunks = planes * map_cells // lanes
    chunks = next_power_of_2(row_chunks)
    if planes == 1:
        chunks = min(chunks, THREADS)
    rows = max(1, THREADS // chunks)
    block = Block(layout, planes, rows, chunks, lanes, 0)
    return block, channels // planes, cdiv(row_chunks, chunks), rows, channel_stride


def given(map_cells: int, grid_cells: int, terms: int) -> Saliency:
    """How launch 1 checks a ready map and resamples it to ``grid_cells``, of ``terms`` each.

    A map without cells, of a call that needs none, has no splits: neither launch reads it.
    """
    parallel = next((count for count in GIVEN_TERMS if terms <= count), GIVEN_TERMS[-1])
    cells = min(GIVEN_CELLS, GIVEN_VALUES // parallel)
    wanted = max(cdiv(map_cells, GIVEN_VALUES), cdiv(grid_cells, cells))
    block = Block("given", 1, parallel, cells, 1, 1)
    splits = 1 if map_cells else 0
    return Saliency(block, Sums(splits, min(MAX_GIVEN_TILES, wanted), 0, 0, 0, 0, 0))


def map_too_large(map_size: tuple[int, int], grid_size: tuple[int, int]) -> bool:
    """Whether a map, or a side and its cells, exceeds MAX_EXTENT, or a grid MAX_CELLS."""
    (h, w), (gh, gw) = map_size, grid_size
    return max(h * w, h * gh, w * gw) > MAX_EXTENT or gh * gw > MAX_CELLS


def too_large(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    itemsize: int,
    grid_size: tuple[int, int],
) -> bool:
    """Whether an image, or a side and its cells, exceeds MAX_EXTENT."""
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


def tile_extents(
    line_count: int, chunk_count: int, chunk: int, size: int, threads: int, least: int
) -> tuple[int, int]:
    """Lines and chunks of a tile of at most ``size`` chunks; fewer where an image would have less
    than ``least`` tiles, one above the other.
    """
    most = min(next_power_of_2(max(1, chunk_count)), MAX_CHUNKS_ACROSS, size)
    chunks = chunks_across(chunk_count, chunk, most)
    lines = min(size // chunks, next_power_of_2(max(1, line_count)))
    while lines > 1 and lines * chunks > MIN_ACCESSES * threads and cdiv(line_count, lines) < least:
        lines //= 2
    return lines, chunks


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
    multiprocessors: int,
    depth: int = 1,
) -> Tile | None:
    """How ``rows`` images are copied; None for those that are too large. ``whole_elements``: lanes
    are elements, for arithmetic. ``depth``: see :attr:`sg_kernels.call.Call.depth`.
    """
    if too_large(shape, strides, out_strides, itemsize, grid_size):
        return None
    channels, height, width = shape[1:]
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
    if depth > 1:
        # Kernels walk planes as they walk channels, so they need the channels' place.
        if strided or (channels > 1 and not channels_last):
            return None
        height //= depth
        strides, out_strides = ((s[0], height * s[2], *s[2:]) for s in (strides, out_strides))
    elements = chunk // itemsize
    chunk_count = line // elements

    pixel = channels * itemsize if channels_last else itemsize
    # The largest power of two that divides the first byte of every cell of a line.
    gw = grid_size[1]
    in_one_cell = alignment(chunk, *(cdiv(g * width, gw) * pixel for g in range(1, gw)))
    uniform = in_one_cell == chunk
    unit_bytes = itemsize if whole_elements else min(in_one_cell, MAX_UNIT)
    lanes = chunk // unit_bytes
    # Narrow lanes take a register each: one access per thread.
    wide = unit_bytes >= MIN_UNIT or lanes == 1
    size = max(ACCESSES * threads, MIN_CHUNKS) if wide else threads
    least = MIN_PROGRAMS * multiprocessors // rows + 1
    lines, chunks = tile_extents(line_count, chunk_count, chunk, size, threads, least)
    across = max(1, cdiv(chunk_count, chunks))
    sides = [max(1, side) for side in (channels, height, width)]
    tiles = Tiles(
        total=max(1, across * cdiv(line_count, lines)),
        across=across,
        per_across=reciprocal(across),
        lines=line_count,
        chunks=chunk_count,
        step=elements if uniform else unit_bytes // itemsize,
        sides=Sides(*sides, *map(reciprocal, sides)),
        source=Strides(*[stride // elements for stride in strides]),
        out=Strides(*[stride // elements for stride in out_strides]),
    )
    planes = depth > 1 or not channels_last
    layout = Layout(channels_last, planes, strided, uniform, lines, chunks, lanes)
    return Tile(layout, unit_bytes, tiles)


def cells(maps: Maps, splits: int) -> tuple[Cells, int, bool]:
    """How launch 2 holds a grid of the maps; its threads; and whether every program of it works
    out the mask.
    """
    size, grid, window = maps
    grid_cells, values = grid.height * grid.width, splits * window.height * window.width
    resampled = splits > 0 and grid != size
    block = next((size for size in BLOCKS_OF_CELLS if size >= grid_cells), None)
    at_once = block is not None
    block = block or next_power_of_2(grid_cells)
    threads = WARP if block <= BLOCKS_OF_CELLS[0] else THREADS if at_once else MANY_THREADS
    held = block // threads
    if values * held > MAX_TERMS:
        parallel = max(1, PARALLEL_VALUES // block)
        return Cells(block, splits, resampled, parallel, 1), max(threads, THREADS), False
    most = TERMS_IN_FLIGHT if resampled else SPLITS_IN_FLIGHT // held
    return Cells(block, splits, resampled, 1, max(1, min(values, most))), threads, at_once


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
    multiprocessors: int,
    depth: int = 1,
    standardized: bool = False,
) -> Plan | None:
    """The source: a ``ready`` map, or features. None for what is too large, and for no rows."""
    size, grid = Size(*source_shape[-2:]), Size(*grid_size)
    if rows == 0 or rows // shape[0] > MAX_DRAWS or map_too_large(size, grid):
        return None
    windows = Size(window(size.height, grid.height), window(size.width, grid.width))
    if ready:
        averaged = windows.height * windows.width
        summed = given(size.height * size.width, grid.height * grid.width, averaged)
    else:
        summed = saliency(
            source_shape, source_strides, source_itemsize, source_aligned, multiprocessors
        )
    splits = summed.sums.splits
    maps = grids = Maps(size, grid, windows)
    if gridded := ready and grid != size and splits > 0:
        grids = Maps(grid, grid, Size(1, 1))
    held, threads, at_once = cells(grids, splits)
    copied = tile(
        rows,
        shape,
        strides,
        out_strides,
        itemsize,
        aligned,
        grid_size,
        standardized,
        threads,
        multiprocessors,
        depth,
    )
    if copied is None:
        return None
    parts = min(copied.tiles.total, ceil(PROGRAMS_2 * multiprocessors / rows)) if at_once else 1
    return Plan(
        saliency=summed,
        maps=maps,
        gridded=gridded,
        grids=grids,
        cells=held,
        threads=threads,
        tile=copied,
        rows=Rows(shape[0], parts),
        at_once=at_once,
    )
