"""The gradient of the graft (stage 6)."""

import triton
import triton.language as tl

from sg_kernels.backends.triton.arguments import GraftMemory, Size, Tiles
from sg_kernels.backends.triton.cells import destination_of
from sg_kernels.backends.triton.chunks import chunks_of, store_chunks
from sg_kernels.backends.triton.copy import load_taken, tile_cells, tile_chunks, tile_offset

SCAN = tl.constexpr(1024)
"""Index entries scanned per iteration: 8 per thread."""


@triton.jit
def load_gradient(pointer, offset, inside, taken, LAYOUT: tl.constexpr):
    value = load_taken(pointer, offset, inside, taken, LAYOUT)
    value = value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)
    if not LAYOUT.uniform:
        value = tl.where(taken, value, 0)
    return value


@triton.jit
def graft_backward_kernel(
    memory: GraftMemory,
    batch: tl.int32,
    rows: tl.int32,
    tiles: Tiles,
    grid: Size,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One program per (image, tile) adds what each row took from it: first its own rows, then those
    grafted onto it, both in order. Without atomics, so the sum is the same every time.

    ``memory.images`` are the gradients of the rows.
    """
    program = tl.program_id(0)
    own = (program // tiles.total).to(tl.int64)
    place, inside = tile_chunks(program % tiles.total, tiles, LAYOUT)
    cell = tile_cells(place, tiles, grid, LAYOUT)
    offset = tile_offset(place, tiles.sides, tiles.source, LAYOUT)
    grad = chunks_of(memory.images, UNIT, LAYOUT.lanes)
    out = chunks_of(memory.out, UNIT, LAYOUT.lanes)
    wide: tl.constexpr = tl.float64 if tl.float64 == UNIT else tl.float32
    total = tl.full([LAYOUT.lines * LAYOUT.chunks, LAYOUT.lanes], 0.0, wide)
    for start in range(0, rows, batch):
        row = start + own
        other, _ = destination_of(memory.index, row, own, batch)
        all_taken = (other == own).to(tl.int32)
        mask = tl.load(memory.mask + row * grid.height * grid.width + cell)
        taken = mask.to(tl.int32) + all_taken > 0
        total += load_gradient(grad, row * tiles.source.image + offset, inside, taken, LAYOUT)
    for start in range(0, rows, SCAN):
        candidate = start + tl.arange(0, SCAN)
        onto = tl.load(memory.index + candidate, mask=candidate < rows, other=-1) == own
        onto = onto & (candidate % batch != own)  # a row that meets itself is counted already
        row = tl.min(tl.where(onto, candidate, rows), axis=0).to(tl.int64)
        while row < rows:
            taken = tl.load(memory.mask + row * grid.height * grid.width + cell) == 0
            total += load_gradient(grad, row * tiles.source.image + offset, inside, taken, LAYOUT)
            onto = onto & (candidate > row)
            row = tl.min(tl.where(onto, candidate, rows), axis=0).to(tl.int64)
    out_offset = tile_offset(place, tiles.sides, tiles.out, LAYOUT)
    out += own * tiles.out.image * LAYOUT.lanes
    store_chunks(out, out_offset, inside, total.to(UNIT), LAYOUT.lanes)
