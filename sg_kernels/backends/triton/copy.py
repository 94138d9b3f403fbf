"""How images are copied, tile by tile (stage 6), and the graft of a given mask.

A tile is ``lines`` lines of ``chunks`` chunks. A line is a row of pixels: of one channel, or with
``channels_last`` of all. A chunk is the widest run of bytes that pointers, strides and lines are
multiples of, at most 16. ``uniform`` chunks lie inside one cell each: a lane is an integer of any
width, and a chunk is read from the image it belongs to. Otherwise each lane lies inside one cell,
and a chunk is read from both images where it needs both. Strides count chunks. Where the elements
of a line are no neighbours, ``strided``, each is a chunk.
"""

import triton
import triton.language as tl

from sg_kernels.backends.triton.arguments import GraftMemory, Size, Tiles
from sg_kernels.backends.triton.cells import destination_of
from sg_kernels.backends.triton.chunks import chunks_of, load_chunks, store_chunks


@triton.jit
def quotient(numerator, reciprocal):
    """numerator // divisor, from plan.reciprocal(divisor): a multiplication, not a division."""
    doubled = tl.cast(numerator * 2, tl.uint32, bitcast=True)
    high = tl.umulhi(doubled, tl.zeros_like(doubled) + (reciprocal >> 5).to(tl.uint32))
    return (high >> (reciprocal & 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def tile_chunks(tile, tiles, LAYOUT: tl.constexpr):
    """The place of each chunk of a tile, line by line: channel, y and chunk of the line. And which
    exist.
    """
    sides = tiles.sides
    position = tl.arange(0, LAYOUT.lines * LAYOUT.chunks)
    down = quotient(tile, tiles.per_across)
    across = tile - down * tiles.across
    line = down * LAYOUT.lines + position // LAYOUT.chunks
    chunk = across * LAYOUT.chunks + position % LAYOUT.chunks
    channel = quotient(line, sides.per_height) if LAYOUT.planes else 0
    inside = (line < tiles.lines) & (chunk < tiles.chunks)
    return (channel, line - channel * sides.height, chunk), inside


@triton.jit
def tile_cells(place, tiles, grid, LAYOUT: tl.constexpr):
    """The cell that each chunk lies in, (chunks,), or each lane, (chunks, lanes)."""
    _, y, chunk = place
    sides = tiles.sides
    row = quotient(y * grid.height, sides.per_height)
    if LAYOUT.uniform:
        element = chunk * tiles.step
    else:
        row = row[:, None]
        element = lanes_in_line(chunk, LAYOUT) * tiles.step
    x = quotient(element, sides.per_channels) if LAYOUT.channels_last else element
    column = quotient(tl.minimum(x, sides.width - 1) * grid.width, sides.per_width)
    return row * grid.width + column


@triton.jit
def lanes_in_line(chunk, LAYOUT: tl.constexpr):
    return chunk[:, None] * LAYOUT.lanes + tl.arange(0, LAYOUT.lanes)[None, :]


@triton.jit
def tile_offset(place, sides, strides, LAYOUT: tl.constexpr):
    """Where each chunk of an image lies, in chunks."""
    channel, y, chunk = place
    down = channel * strides.channel + y * strides.y
    if not LAYOUT.strided:
        across = chunk
    elif LAYOUT.channels_last:
        x = quotient(chunk, sides.per_channels)
        across = x * strides.x + (chunk - x * sides.channels) * strides.channel
    else:
        across = chunk * strides.x
    return down + across


@triton.jit
def load_taken(pointer, offset, inside, taken, LAYOUT: tl.constexpr):
    """The chunks that are ``inside`` and of which any lane is ``taken``; zeros elsewhere."""
    if not LAYOUT.uniform:
        taken = tl.max(taken.to(tl.int32), axis=1) != 0
    return load_chunks(pointer, offset, inside & taken, LAYOUT.lanes)


@triton.jit
def standardize(value, affine, place, sides, DTYPE: tl.constexpr, LAYOUT: tl.constexpr):
    """value * scale + shift of its channel, which launch.options_of keeps from being fused."""
    channel, _, chunk = place
    if LAYOUT.channels_last:
        lane = lanes_in_line(chunk, LAYOUT)
        channel = lane - quotient(lane, sides.per_channels) * sides.channels
    else:  # lines past the last have channels past the last
        channel = tl.minimum(channel, sides.channels - 1)[:, None]
    scale, shift = tl.load(affine + channel), tl.load(affine + sides.channels + channel)
    return (value.to(tl.float32) * scale + shift).to(DTYPE)


@triton.jit
def copy_tile(
    memory,
    tiles,
    row,
    own,
    other,
    place,
    inside,
    from_own,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Copies the chunks ``inside`` to a row: from image ``own``, or where not ``from_own`` from
    image ``other``. Standardised where ``memory`` has what that takes.
    """
    offset = tile_offset(place, tiles.sides, tiles.source, LAYOUT)
    out_offset = tile_offset(place, tiles.sides, tiles.out, LAYOUT)
    own, other = own * tiles.source.image, other * tiles.source.image
    images = chunks_of(memory.images, UNIT, LAYOUT.lanes)
    out = chunks_of(memory.out, OUT_UNIT, LAYOUT.lanes) + row * tiles.out.image * LAYOUT.lanes
    if LAYOUT.uniform:
        # The address is chosen, not the value: one access per chunk.
        start = tl.where(from_own, own, other)
        value = load_chunks(images, start + offset, inside, LAYOUT.lanes)
    else:
        value = tl.where(
            from_own,
            load_taken(images, own + offset, inside, from_own, LAYOUT),
            load_taken(images, other + offset, inside, ~from_own, LAYOUT),
        )
    if memory.affine is not None:
        value = standardize(value, memory.affine, place, tiles.sides, OUT_UNIT, LAYOUT)
    store_chunks(out, out_offset, inside, value, LAYOUT.lanes)


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
    """The graft of a mask that lies in memory; one program per (row, tile)."""
    program = tl.program_id(0)
    row, tile = program // tiles.total, program % tiles.total
    own = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    other, _ = destination_of(memory.index, row, own, batch)
    place, inside = tile_chunks(tile, tiles, LAYOUT)
    cell = tile_cells(place, tiles, grid, LAYOUT)
    from_own = tl.load(memory.mask + row * grid.height * grid.width + cell) != 0
    copy_tile(memory, tiles, row, own, other, place, inside, from_own, UNIT, OUT_UNIT, LAYOUT)
