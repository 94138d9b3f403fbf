"""Launch 1: the channel saliency (stage 1), the pairing, p and the seed of the call."""

import triton
import triton.language as tl

from sg_kernels.backends.triton import cells, philox
from sg_kernels.backends.triton.arguments import Maps, Pairing, SaliencyMemory, Sums
from sg_kernels.backends.triton.chunks import chunks_of, load_chunks

SAMPLES = tl.constexpr(8)
"""Samples paired per program: few, so that the pairing of a large batch is spread out."""
TICKETS = tl.constexpr(64)
"""Tickets compared with theirs per iteration: 4 comparisons per thread."""


@triton.jit
def draw_pairing(program, batch, memory, pairing, key, NO_FIXED_POINTS: tl.constexpr):
    """The pairing of some samples in a draw, and p. Each program of a draw stores the same p, as a
    branch would cost registers.
    """
    tiles = tl.cdiv(batch, SAMPLES)
    draw = program // tiles
    sample = (program % tiles) * SAMPLES + tl.arange(0, SAMPLES)
    p = cells.draw_keep_prob(draw, key, memory.quantiles, pairing)
    tl.store(memory.drawn + 1 + draw, p)
    row = draw.to(tl.int64) * batch + sample
    exists = sample < batch
    if memory.given_index is None:
        destination = philox.pairing(sample, batch, draw, key, NO_FIXED_POINTS, TICKETS)
    else:
        destination = tl.load(memory.given_index + row, mask=exists)
    tl.store(memory.index + row, destination, mask=exists)


@triton.jit
def place_of(cell, size, sums):
    """Where a cell of the map lies, in chunks."""
    # The interpreter holds a stride below 2**31 in 32 bits, whatever its declared type.
    y, x = (cell // size.width).to(tl.int64), (cell % size.width).to(tl.int64)
    return y * sums.y_stride + x * sums.x_stride


@triton.jit
def sum_planes(features, partial, tile, first, last, size, sums, BLOCK: tl.constexpr):
    """Sums the rows first .. last - 1, of ``planes`` planes (h, w) each, over the channels.

    A row has as many planes as make its length a multiple of ``lanes`` where h * w is not. If these
    are several, the columns of the program, chunks * lanes, hold the whole row.
    """
    UNROLL: tl.constexpr = BLOCK.unroll
    COLUMNS: tl.constexpr = BLOCK.chunks * BLOCK.lanes
    CELLS: tl.constexpr = COLUMNS // BLOCK.planes
    map_cells = size.height * size.width
    position = tl.arange(0, BLOCK.rows * BLOCK.chunks)
    chunk = tile * BLOCK.chunks + position % BLOCK.chunks
    exists = chunk * BLOCK.lanes < BLOCK.planes * map_cells
    dense: tl.constexpr = BLOCK.layout == "planes"
    chunk_offset = chunk.to(tl.int64) if dense else place_of(chunk, size, sums)
    total = tl.full([BLOCK.rows * BLOCK.chunks, BLOCK.lanes], 0.0, tl.float32)
    for start in range(first, last, BLOCK.rows * UNROLL):
        for part in tl.static_range(UNROLL):
            row = start + part * BLOCK.rows + position // BLOCK.chunks
            offset = row.to(tl.int64) * sums.row_stride + chunk_offset
            inside = (row < last) & exists
            value = load_chunks(features, offset, inside, BLOCK.lanes)
            total += tl.abs(value).to(tl.float32)
    summed = tl.sum(tl.reshape(total, [BLOCK.rows, COLUMNS]), axis=0)
    cell = tile * CELLS + tl.arange(0, CELLS)
    if BLOCK.planes > 1:  # in one tile, whose CELLS >= map_cells: every place is a column
        place = tl.arange(0, BLOCK.planes)[:, None] * map_cells + cell[None, :]
        summed = tl.gather(summed, tl.ravel(place), 0)
        summed = tl.sum(tl.reshape(summed, [BLOCK.planes, CELLS]), axis=0)
    tl.store(partial + cell, summed, mask=cell < map_cells)


@triton.jit
def sum_channels(features, partial, tile, first, last, size, sums, BLOCK: tl.constexpr):
    """Sums the chunks first .. last - 1 of the channels of ``rows`` neighbouring cells."""
    UNROLL: tl.constexpr = BLOCK.unroll
    map_cells = size.height * size.width
    position = tl.arange(0, BLOCK.rows * BLOCK.chunks)
    cell = tile * BLOCK.rows + position // BLOCK.chunks
    pixel = place_of(cell, size, sums)
    total = tl.full([BLOCK.rows * BLOCK.chunks, BLOCK.lanes], 0.0, tl.float32)
    for start in range(first, last, BLOCK.chunks * UNROLL):
        for part in tl.static_range(UNROLL):
            chunk = start + part * BLOCK.chunks + position % BLOCK.chunks
            inside = (cell < map_cells) & (chunk < last)
            value = load_chunks(features, pixel + chunk, inside, BLOCK.lanes)
            total += tl.abs(value).to(tl.float32)
    summed = tl.sum(tl.reshape(tl.sum(total, axis=1), [BLOCK.rows, BLOCK.chunks]), axis=1)
    cell = tile * BLOCK.rows + tl.arange(0, BLOCK.rows)
    tl.store(partial + cell, summed, mask=cell < map_cells)


@triton.jit
def check_map(given, memory, maps, batch, sample, part, parts, BLOCK: tl.constexpr):
    """Copies part of a ready map, with NaN for what is not >= 0, and resamples part of its grid.

    ``rows`` values of each of ``chunks`` cells are read in parallel.
    """
    map_cells, grid_cells = maps.size.height * maps.size.width, maps.grid.height * maps.grid.width
    COPIED: tl.constexpr = BLOCK.rows * BLOCK.chunks
    for start in range(part * COPIED, map_cells, parts * COPIED):
        cell = start + tl.arange(0, COPIED)
        place, valid = sample * map_cells + cell, cell < map_cells
        value = cells.checked(tl.load(given + place, mask=valid, other=0.0))
        tl.store(memory.partials + place, value, mask=valid)
    if memory.grid is not None:
        for start in range(part * BLOCK.chunks, grid_cells, parts * BLOCK.chunks):
            cell = start + tl.arange(0, BLOCK.chunks)
            valid = cell < grid_cells
            value = cells.resample(given, maps, batch, sample, cell, valid, 1, False, BLOCK.rows, 1)
            tl.store(memory.grid + sample * grid_cells + cell, value, mask=valid)


@triton.jit
def saliency_kernel(
    memory: SaliencyMemory,
    batch: tl.int32,
    sums: Sums,
    maps: Maps,
    pairing: Pairing,
    NO_FIXED_POINTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The first ``pairing.programs`` draw the pairing; each of the others takes a split and a tile
    of a sample.
    """
    if OVERLAPS:  # with the end of the kernel before, which may have written what is read here
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    if program < pairing.programs:
        if memory.index is not None:
            key = pairing.host_seed
            if memory.seed is not None:
                key = tl.load(memory.seed)
            if memory.step is not None:  # which launch 2 advances
                key = philox.call_seed(key, tl.load(memory.step), pairing.rank)
            if program == 0:
                tl.store(memory.drawn, key)
            draw_pairing(program, batch, memory, pairing, key, NO_FIXED_POINTS)
    else:
        task = program - pairing.programs
        tile, split = task % sums.tiles, task // sums.tiles % sums.splits
        sample = (task // sums.tiles // sums.splits).to(tl.int64)
        if BLOCK.layout == "given":
            given = chunks_of(memory.source, ELEMENT, 1)
            check_map(given, memory, maps, batch, sample, tile, sums.tiles, BLOCK)
        else:
            source = chunks_of(memory.source, ELEMENT, BLOCK.lanes)
            features = source + sample * sums.sample_stride * BLOCK.lanes
            size = maps.size
            partial = split.to(tl.int64) * batch + sample
            partial = memory.partials + partial * size.height * size.width
            share = tl.cdiv(sums.rows, sums.splits)
            first, last = split * share, min(sums.rows, (split + 1) * share)
            if BLOCK.layout == "channels_last":
                sum_channels(features, partial, tile, first, last, size, sums, BLOCK)
            else:
                sum_planes(features, partial, tile, first, last, size, sums, BLOCK)
