"""Launch 1: the channel saliency (stage 1), the pairing, and the seed of the call."""

import triton
import triton.language as tl

from sg_kernels.kernels import cells, philox
from sg_kernels.kernels.chunks import chunks_of, load_chunks
from sg_kernels.kernels.launch import kernel

SAMPLES = tl.constexpr(8)
"""Of how many samples a program draws the pairing."""
TICKETS = tl.constexpr(64)
"""With how many tickets it compares theirs at once."""


@triton.jit
def draw_pairing(program, batch, given_index, index, key, NO_FIXED_POINTS: tl.constexpr):
    tiles = tl.cdiv(batch, SAMPLES)
    draw = program // tiles
    sample = (program % tiles) * SAMPLES + tl.arange(0, SAMPLES)
    row = draw.to(tl.int64) * batch + sample
    exists = sample < batch
    if given_index is None:
        destination = philox.pairing(sample, batch, draw, key, NO_FIXED_POINTS, TICKETS)
    else:
        destination = tl.load(given_index + row, mask=exists)
    tl.store(index + row, destination, mask=exists)


@triton.jit
def sum_planes(
    features,
    partial,
    tile,
    first,
    last,
    map_cells,
    w,
    row_stride,
    y_stride,
    x_stride,
    DENSE: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums the rows first .. last - 1, of PLANES planes (h, w) each, over the channels.

    So many planes make a row that its length is a multiple of LANES where h * w is not. Where they
    are several, the program's columns, CHUNKS * LANES, hold the whole row.
    """
    COLUMNS: tl.constexpr = CHUNKS * LANES
    CELLS: tl.constexpr = COLUMNS // PLANES
    chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
    chunk_offset = chunk.to(tl.int64) if DENSE else chunk // w * y_stride + chunk % w * x_stride
    total = tl.zeros([ROWS, CHUNKS, LANES], tl.float32)
    for start in range(first, last, ROWS * UNROLL):
        for part in tl.static_range(UNROLL):
            row = start + part * ROWS + tl.arange(0, ROWS)
            inside = (row < last)[:, None] & (chunk * LANES < PLANES * map_cells)[None, :]
            offset = row.to(tl.int64)[:, None] * row_stride + chunk_offset[None, :]
            value = load_chunks(features, offset, inside, LANES)
            total += tl.abs(value).to(tl.float32)
    sums = tl.reshape(tl.sum(total, axis=0), [COLUMNS])
    cell = tile * CELLS + tl.arange(0, CELLS)
    if PLANES > 1:  # in one tile, whose CELLS >= map_cells: no place lies beyond the columns
        place = tl.arange(0, PLANES)[:, None] * map_cells + cell[None, :]
        sums = tl.gather(sums, tl.ravel(place), 0)
        sums = tl.sum(tl.reshape(sums, [PLANES, CELLS]), axis=0)
    tl.store(partial + cell, sums, mask=cell < map_cells)


@triton.jit
def sum_channels(
    features,
    partial,
    tile,
    first,
    last,
    map_cells,
    w,
    y_stride,
    x_stride,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums the channels of ROWS cells, which lie side by side: chunks first .. last - 1 of each."""
    cell = tile * ROWS + tl.arange(0, ROWS)
    pixel = cell // w * y_stride + cell % w * x_stride
    total = tl.zeros([ROWS, CHUNKS, LANES], tl.float32)
    for start in range(first, last, CHUNKS * UNROLL):
        for part in tl.static_range(UNROLL):
            chunk = start + part * CHUNKS + tl.arange(0, CHUNKS)
            inside = (cell < map_cells)[:, None] & (chunk < last)[None, :]
            offset = pixel[:, None] + chunk[None, :]
            value = load_chunks(features, offset, inside, LANES)
            total += tl.abs(value).to(tl.float32)
    sums = tl.sum(tl.sum(total, axis=2), axis=1)
    tl.store(partial + cell, sums, mask=cell < map_cells)


@triton.jit
def check_map(
    given,
    saliency,
    grid,
    sample,
    part,
    parts,
    batch,
    h,
    w,
    gh,
    gw,
    window_h,
    window_w,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies a part of a ready map, what is not >= 0 in it as NaN, and resamples its part."""
    COPIED: tl.constexpr = TERMS * BLOCK
    for start in range(part * COPIED, h * w, parts * COPIED):
        cell = start + tl.arange(0, COPIED)
        value = cells.checked(tl.load(given + sample * h * w + cell, mask=cell < h * w, other=0.0))
        tl.store(saliency + sample * h * w + cell, value, mask=cell < h * w)
    if grid is not None:
        for start in range(part * BLOCK, gh * gw, parts * BLOCK):
            cell = start + tl.arange(0, BLOCK)
            valid = cell < gh * gw
            value = cells.resample(
                given,
                sample,
                batch,
                1,
                (h, w),
                (gh, gw),
                (window_h, window_w),
                cell,
                valid,
                False,
                TERMS,
                1,
            )
            tl.store(grid + sample * gh * gw + cell, value, mask=valid)


@kernel
def saliency_kernel(
    source: tl.int64,
    partials,
    grid,
    batch: tl.int32,
    tiles: tl.int32,
    splits: tl.int32,
    rows: tl.int32,
    h: tl.int32,
    w: tl.int32,
    sample_stride: tl.int64,
    row_stride: tl.int64,
    y_stride: tl.int64,
    x_stride: tl.int64,
    gh: tl.int32,
    gw: tl.int32,
    window_h: tl.int32,
    window_w: tl.int32,
    given_index,
    index,
    seed,
    seed_value: tl.int64,
    step,
    rank: tl.int32,
    call_seed,
    pairing_programs: tl.int32,
    NO_FIXED_POINTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The first ``pairing_programs`` draw the pairing; the others take a sample's split and tile.

    ``rows`` of a split's partial sum are rows of planes, or chunks of channels in LAYOUT
    "channels_last". Strides count chunks of LANES elements. With a ready map, LAYOUT "given",
    ``partials`` is the saliency itself. Without ``index`` only the map is wanted.
    """
    program = tl.program_id(0)
    if program < pairing_programs:
        if index is not None:
            key = seed_value
            if seed is not None:
                key = tl.load(seed)
            if step is not None:  # which launch 2 advances
                key = philox.call_seed(key, tl.load(step), rank)
            if program == 0:
                tl.store(call_seed, key)
            draw_pairing(program, batch, given_index, index, key, NO_FIXED_POINTS)
    else:
        task = program - pairing_programs
        tile, split = task % tiles, task // tiles % splits
        sample = (task // tiles // splits).to(tl.int64)
        if LAYOUT == "given":
            check_map(
                chunks_of(source, ELEMENT, 1),
                partials,
                grid,
                sample,
                tile,
                tiles,
                batch,
                h,
                w,
                gh,
                gw,
                window_h,
                window_w,
                ROWS,
                CHUNKS,
            )
        else:
            features = chunks_of(source, ELEMENT, LANES) + sample * sample_stride * LANES
            partial = partials + (split.to(tl.int64) * batch + sample) * h * w
            share = tl.cdiv(rows, splits)
            first, last = split * share, min(rows, (split + 1) * share)
            if LAYOUT == "channels_last":
                sum_channels(
                    features,
                    partial,
                    tile,
                    first,
                    last,
                    h * w,
                    w,
                    y_stride,
                    x_stride,
                    ROWS,
                    CHUNKS,
                    LANES,
                    UNROLL,
                )
            else:
                sum_planes(
                    features,
                    partial,
                    tile,
                    first,
                    last,
                    h * w,
                    w,
                    row_stride,
                    y_stride,
                    x_stride,
                    LAYOUT == "planes",
                    PLANES,
                    ROWS,
                    CHUNKS,
                    LANES,
                    UNROLL,
                )
