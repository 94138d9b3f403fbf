"""Triton's copy by a given mask on tiles of three axes, (lines, chunks, lanes).

Our tiles are flat, (chunks, lanes). Triton's compiler chooses along which axis the threads of a
warp lie, and of three axes Triton 3.6 takes the lines first: one request of a warp then touches
many lines of memory. What that costs, this kernel shows, in the place of ours.
"""

import triton
import triton.language as tl

from sg_kernels.backends.triton.arguments import GraftMemory, Size, Tiles
from sg_kernels.backends.triton.cells import destination_of
from sg_kernels.backends.triton.chunks import chunks_of
from sg_kernels.backends.triton.copy import quotient


@triton.jit
def graft_kernel(
    memory: GraftMemory,
    batch: tl.int32,
    tiles: Tiles,
    grid: Size,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """As copy.graft_kernel, for images whose chunks are whole and lie in one cell each."""
    tl.static_assert(LAYOUT.uniform and not LAYOUT.strided)
    sides, source = tiles.sides, tiles.source
    program = tl.program_id(0)
    row, tile = program // tiles.total, program % tiles.total
    own = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    other, _ = destination_of(memory.index, row, own, batch)

    line = tile // tiles.across * LAYOUT.lines + tl.arange(0, LAYOUT.lines)
    chunk = tile % tiles.across * LAYOUT.chunks + tl.arange(0, LAYOUT.chunks)
    lane = tl.arange(0, LAYOUT.lanes)[None, None, :]
    inside = (line < tiles.lines)[:, None] & (chunk < tiles.chunks)[None, :]
    channel = quotient(line, sides.per_height)
    y = line - channel * sides.height

    element = chunk * tiles.step
    x = quotient(element, sides.per_channels) if LAYOUT.channels_last else element
    column = quotient(tl.minimum(x, sides.width - 1) * grid.width, sides.per_width)
    cell = quotient(y * grid.height, sides.per_height)[:, None] * grid.width + column[None, :]
    from_own = tl.load(memory.mask + row * grid.height * grid.width + cell) != 0

    offset = (channel * source.channel + y * source.y)[:, None] + chunk[None, :]
    offset += tl.where(from_own, own, other) * source.image
    out_offset = (channel * tiles.out.channel + y * tiles.out.y)[:, None] + chunk[None, :]
    images = chunks_of(memory.images, UNIT, LAYOUT.lanes)
    out = chunks_of(memory.out, OUT_UNIT, LAYOUT.lanes) + row * tiles.out.image * LAYOUT.lanes
    shape: tl.constexpr = [LAYOUT.lines, LAYOUT.chunks, LAYOUT.lanes]
    wanted = tl.broadcast_to(inside[:, :, None], shape)
    value = tl.load(images + (offset[:, :, None] * LAYOUT.lanes + lane), mask=wanted, other=0)
    tl.store(out + (out_offset[:, :, None] * LAYOUT.lanes + lane), value, mask=wanted)
