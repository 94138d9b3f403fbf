"""Launch 2: the stages on cells, and the graft (stage 6); the graft alone; its gradient.

An image is written tile by tile. A tile is LINES lines of CHUNKS chunks. A line is a row of pixels
of one channel, or in CHANNELS_LAST order of all; a chunk is the widest run of bytes that pointers,
strides and lines are multiples of, 16 at best. UNIFORM chunks lie inside one cell each: a lane is
an integer of any width, and a chunk is read from the image it belongs to. Otherwise each lane lies
inside one cell, and a chunk is read from both images where it needs both. Strides count chunks.
Where those of a line are not neighbours, STRIDED, each is one element.
"""

import triton
import triton.language as tl

from sg_kernels.kernels import cells
from sg_kernels.kernels.chunks import chunks_of, load_chunks, store_chunks
from sg_kernels.kernels.launch import kernel

COLUMNS = tl.constexpr(256)
"""Of so many classes a program mixes the targets at once."""
SCAN = tl.constexpr(1024)
"""So many entries of the index a program of the gradient searches at once."""


@triton.jit
def quotient(numerator, reciprocal):
    """numerator // divisor, from table.reciprocal(divisor): a multiplication, not a division."""
    doubled = (numerator * 2).to(tl.uint32, bitcast=True)
    high = tl.umulhi(doubled, tl.zeros_like(doubled) + (reciprocal >> 5).to(tl.uint32))
    return (high >> (reciprocal & 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def tile_lines(tile, extents, sides, LINES: tl.constexpr, CHUNKS: tl.constexpr):
    """The channel and y of each line of a tile, its chunks, and which of these there are.

    ``extents``: how many tiles lie side by side, lines and chunks an image has.
    """
    tiles_across, lines, chunks = extents
    _, height, _, _, per_height, _ = sides
    line = tile // tiles_across * LINES + tl.arange(0, LINES)
    channel = quotient(line, per_height)
    chunk = tile % tiles_across * CHUNKS + tl.arange(0, CHUNKS)
    inside = (line < lines)[:, None] & (chunk < chunks)[None, :]
    return channel, line - channel * height, chunk, inside


@triton.jit
def tile_cells(
    y,
    chunk,
    sides,
    grid_size,
    step_elements,
    UNIFORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LANES: tl.constexpr,
):
    """The cell that each chunk lies in, (LINES, CHUNKS), or each lane, (LINES, CHUNKS, LANES)."""
    _, _, width, per_channels, per_height, per_width = sides
    gh, gw = grid_size
    if UNIFORM:
        element = (chunk * step_elements)[None, :]
        row = quotient(y * gh, per_height)[:, None]
    else:
        lane = chunk[:, None] * LANES + tl.arange(0, LANES)[None, :]
        element = (lane * step_elements)[None, :, :]
        row = quotient(y * gh, per_height)[:, None, None]
    x = quotient(element, per_channels) if CHANNELS_LAST else element
    return row * gw + quotient(tl.minimum(x, width - 1) * gw, per_width)


@triton.jit
def tile_offset(
    channel, y, chunk, sides, strides, CHANNELS_LAST: tl.constexpr, STRIDED: tl.constexpr
):
    """Where each chunk of an image lies, in chunks: (LINES, CHUNKS)."""
    channels, _, _, per_channels, _, _ = sides
    channel_stride, y_stride, x_stride = strides
    down = channel * channel_stride + y * y_stride
    if not STRIDED:
        across = chunk
    elif CHANNELS_LAST:
        x = quotient(chunk, per_channels)
        across = x * x_stride + (chunk - x * channels) * channel_stride
    else:
        across = chunk * x_stride
    return down[:, None] + across[None, :]


@triton.jit
def load_taken(pointer, offset, inside, taken, UNIFORM: tl.constexpr, LANES: tl.constexpr):
    """The chunks that are ``inside`` and of which any lane is ``taken``; zeros elsewhere."""
    if not UNIFORM:
        taken = tl.max(taken.to(tl.int32), axis=2) != 0
    return load_chunks(pointer, offset, inside & taken, LANES)


@triton.jit
def copy_tile(
    images,
    out,
    own,
    other,
    to,
    offset,
    out_offset,
    inside,
    from_own,
    unit: tl.constexpr,
    UNIFORM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Copies the chunks ``inside`` from the source, or where not ``from_own`` the destination.

    ``own``, ``other`` and ``to`` are where these images and the row begin.
    """
    images, out = chunks_of(images, unit, LANES), chunks_of(out, unit, LANES) + to * LANES
    if UNIFORM:
        # The address is chosen, not the value: one access a chunk.
        value = load_chunks(images, tl.where(from_own, own, other) + offset, inside, LANES)
    else:
        value = tl.where(
            from_own,
            load_taken(images, own + offset, inside, from_own, UNIFORM, LANES),
            load_taken(images, other + offset, inside, ~from_own, UNIFORM, LANES),
        )
    store_chunks(out, out_offset, inside, value, LANES)


@triton.jit
def destination_of(index, row, own, batch):
    """Which image a row is grafted onto, and whether its index says so; its own, where not."""
    other = tl.load(index + row)
    known = (other >= 0) & (other < batch)
    return tl.where(known, other, own), known


@kernel
def saliency_graft_kernel(
    images: tl.int64,
    out: tl.int64,
    maps,
    saliency,
    call_seed,
    step,
    quantiles,
    index,
    targets,
    lam,
    mask,
    mixed,
    batch: tl.int32,
    rows: tl.int32,
    parts: tl.int32,
    tiles: tl.int32,
    tiles_across: tl.int32,
    lines: tl.int32,
    chunks: tl.int32,
    step_elements: tl.int32,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    per_channels: tl.int64,
    per_height: tl.int64,
    per_width: tl.int64,
    image_stride: tl.int64,
    channel_stride: tl.int32,
    y_stride: tl.int32,
    x_stride: tl.int32,
    out_image_stride: tl.int64,
    out_channel_stride: tl.int32,
    out_y_stride: tl.int32,
    out_x_stride: tl.int32,
    splits: tl.int32,
    h: tl.int32,
    w: tl.int32,
    gh: tl.int32,
    gw: tl.int32,
    window_h: tl.int32,
    window_w: tl.int32,
    temperature: tl.float32,
    threshold: tl.float32,
    k: tl.int32,
    keep_prob: tl.int64,
    gate: tl.int64,
    num_classes: tl.int32,
    smoothing: tl.float32,
    NORMALIZE: tl.constexpr,
    TOPK: tl.constexpr,
    NORM: tl.constexpr,
    TARGETS: tl.constexpr,
    CELLS: tl.constexpr,
    TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
    GRAFTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STRIDED: tl.constexpr,
    UNIFORM: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Each program works out its sample's mask. The first ``rows`` write it, lam and the target of
    a row each; ``parts`` share out a row's tiles. Where these are several they are other programs,
    for one that did both would finish last. Without GRAFTS nothing is copied.
    """
    program = tl.program_id(0)
    row, part = program % rows, program // rows - (parts > 1).to(tl.int32)
    draw, own = row // batch, (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    if step is not None and program == 0:  # launch 1 has read it
        tl.store(step, tl.load(step) + 1)

    seed = tl.load(call_seed)
    other, known = destination_of(index, row, own, batch)
    map_size, grid_size, window = (h, w), (gh, gw), (window_h, window_w)
    grid_cells = gh * gw
    cell = tl.arange(0, CELLS)
    valid = cell < grid_cells
    grid = cells.resample(
        maps, own, batch, splits, map_size, grid_size, window, cell, valid, True, TERMS, UNROLL
    )
    p, grafts = cells.draw_keep_prob(draw, seed, quantiles, keep_prob, gate)
    keep = cells.select(
        grid, cell, valid, grid_cells, temperature, threshold, k, NORMALIZE, TOPK, CELLS
    )
    kept = cells.sample(keep, cell, valid, own, draw, seed, p, grafts)

    if GRAFTS and part >= 0:
        extents = tiles_across, lines, chunks
        sides = channels, height, width, per_channels, per_height, per_width
        strides = channel_stride, y_stride, x_stride
        out_strides = out_channel_stride, out_y_stride, out_x_stride
        bits = cells.bits_of(kept)
        for tile in range(part, tiles, parts):
            channel, y, chunk, inside = tile_lines(tile, extents, sides, LINES, CHUNKS)
            chunk_cell = tile_cells(
                y, chunk, sides, grid_size, step_elements, UNIFORM, CHANNELS_LAST, LANES
            )
            offset = tile_offset(channel, y, chunk, sides, strides, CHANNELS_LAST, STRIDED)
            out_offset = tile_offset(channel, y, chunk, sides, out_strides, CHANNELS_LAST, STRIDED)
            copy_tile(
                images,
                out,
                own * image_stride,
                other * image_stride,
                row * out_image_stride,
                offset,
                out_offset,
                inside,
                cells.mask_at(kept, bits, chunk_cell),
                UNIT,
                UNIFORM,
                LANES,
            )

    if program < rows:
        tl.store(mask + row * grid_cells + cell, kept, mask=valid)
        own_class, other_class, known = cells.classes_of(
            targets, own, other, known, num_classes, TARGETS
        )
        other_grid = cells.resample(
            maps,
            other,
            batch,
            splits,
            map_size,
            grid_size,
            window,
            cell,
            valid,
            True,
            TERMS,
            UNROLL,
        )
        ratio = cells.label_ratio(grid, other_grid, kept, valid, grid_cells, NORM)
        ratio = tl.where(known, ratio, float("nan"))
        tl.store(lam + row, ratio)
        if TARGETS != "none":
            for start in range(0, num_classes, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                cells.mix_targets(
                    targets,
                    mixed,
                    row,
                    own_class,
                    other_class,
                    ratio,
                    column,
                    num_classes,
                    smoothing,
                    TARGETS,
                )
        if saliency is not None and draw == 0:
            for start in range(0, h * w, CELLS):
                place = start + cell
                exists = place < h * w
                value = cells.resample(
                    maps,
                    own,
                    batch,
                    splits,
                    map_size,
                    map_size,
                    (1, 1),
                    place,
                    exists,
                    True,
                    TERMS,
                    UNROLL,
                )
                tl.store(saliency + own * h * w + place, value, mask=exists)


@kernel
def graft_kernel(
    images: tl.int64,
    out: tl.int64,
    mask,
    index,
    batch: tl.int32,
    tiles: tl.int32,
    tiles_across: tl.int32,
    lines: tl.int32,
    chunks: tl.int32,
    step_elements: tl.int32,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    per_channels: tl.int64,
    per_height: tl.int64,
    per_width: tl.int64,
    image_stride: tl.int64,
    channel_stride: tl.int32,
    y_stride: tl.int32,
    x_stride: tl.int32,
    out_image_stride: tl.int64,
    out_channel_stride: tl.int32,
    out_y_stride: tl.int32,
    out_x_stride: tl.int32,
    gh: tl.int32,
    gw: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    STRIDED: tl.constexpr,
    UNIFORM: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The graft of a mask that lies in memory; a program per (row, tile)."""
    extents = tiles_across, lines, chunks
    sides = channels, height, width, per_channels, per_height, per_width
    strides = channel_stride, y_stride, x_stride
    out_strides = out_channel_stride, out_y_stride, out_x_stride
    program = tl.program_id(0)
    row, tile = program // tiles, program % tiles
    own = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    other, _ = destination_of(index, row, own, batch)
    channel, y, chunk, inside = tile_lines(tile, extents, sides, LINES, CHUNKS)
    chunk_cell = tile_cells(y, chunk, sides, (gh, gw), step_elements, UNIFORM, CHANNELS_LAST, LANES)
    offset = tile_offset(channel, y, chunk, sides, strides, CHANNELS_LAST, STRIDED)
    out_offset = tile_offset(channel, y, chunk, sides, out_strides, CHANNELS_LAST, STRIDED)
    copy_tile(
        images,
        out,
        own * image_stride,
        other * image_stride,
        row * out_image_stride,
        offset,
        out_offset,
        inside,
        tl.load(mask + row * gh * gw + chunk_cell) != 0,
        UNIT,
        UNIFORM,
        LANES,
    )


@kernel
def graft_backward_kernel(
    grad: tl.int64,
    out: tl.int64,
    mask,
    index,
    batch: tl.int32,
    rows: tl.int32,
    tiles: tl.int32,
    tiles_across: tl.int32,
    lines: tl.int32,
    chunks: tl.int32,
    step_elements: tl.int32,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    per_channels: tl.int64,
    per_height: tl.int64,
    per_width: tl.int64,
    image_stride: tl.int64,
    channel_stride: tl.int32,
    y_stride: tl.int32,
    x_stride: tl.int32,
    out_image_stride: tl.int64,
    out_channel_stride: tl.int32,
    out_y_stride: tl.int32,
    out_x_stride: tl.int32,
    gh: tl.int32,
    gw: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    STRIDED: tl.constexpr,
    UNIFORM: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program per (image, tile) adds what each row took from it: its own rows, in order, then
    those grafted onto it, in order. Nothing is added atomically, so it gives the same every time.
    """
    extents = tiles_across, lines, chunks
    sides = channels, height, width, per_channels, per_height, per_width
    strides = channel_stride, y_stride, x_stride
    out_strides = out_channel_stride, out_y_stride, out_x_stride
    program = tl.program_id(0)
    own = (program // tiles).to(tl.int64)
    channel, y, chunk, inside = tile_lines(program % tiles, extents, sides, LINES, CHUNKS)
    chunk_cell = tile_cells(y, chunk, sides, (gh, gw), step_elements, UNIFORM, CHANNELS_LAST, LANES)
    grad_offset = tile_offset(channel, y, chunk, sides, strides, CHANNELS_LAST, STRIDED)
    grad, out = chunks_of(grad, UNIT, LANES), chunks_of(out, UNIT, LANES)
    wide: tl.constexpr = tl.float64 if tl.float64 == UNIT else tl.float32
    total = tl.zeros([LINES, CHUNKS, LANES], wide)
    for start in range(0, rows, batch):
        row = start + own
        other, _ = destination_of(index, row, own, batch)
        all_taken = (other == own).to(tl.int32)
        taken = tl.load(mask + row * gh * gw + chunk_cell).to(tl.int32) + all_taken > 0
        total += load_gradient(
            grad, row * image_stride + grad_offset, inside, taken, UNIFORM, LANES
        )
    for start in range(0, rows, SCAN):
        candidate = start + tl.arange(0, SCAN)
        onto = tl.load(index + candidate, mask=candidate < rows, other=-1) == own
        onto = onto & (candidate % batch != own)  # a row that meets itself is counted already
        row = tl.min(tl.where(onto, candidate, rows), axis=0).to(tl.int64)
        while row < rows:
            taken = tl.load(mask + row * gh * gw + chunk_cell) == 0
            total += load_gradient(
                grad, row * image_stride + grad_offset, inside, taken, UNIFORM, LANES
            )
            onto = onto & (candidate > row)
            row = tl.min(tl.where(onto, candidate, rows), axis=0).to(tl.int64)
    out_offset = tile_offset(channel, y, chunk, sides, out_strides, CHANNELS_LAST, STRIDED)
    store_chunks(out + own * out_image_stride * LANES, out_offset, inside, total.to(UNIT), LANES)


@triton.jit
def load_gradient(pointer, offset, inside, taken, UNIFORM: tl.constexpr, LANES: tl.constexpr):
    value = load_taken(pointer, offset, inside, taken, UNIFORM, LANES)
    value = value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)
    if not UNIFORM:
        value = tl.where(taken, value, 0)
    return value


@kernel
def mix_targets_kernel(
    targets,
    weights,
    index,
    mixed,
    batch: tl.int32,
    tiles: tl.int32,
    num_classes: tl.int32,
    smoothing: tl.float32,
    TARGETS: tl.constexpr,
):
    """Stage 8 alone; a program per (row, tile of COLUMNS)."""
    program = tl.program_id(0)
    row, tile = program // tiles, program % tiles
    own = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    other, known = destination_of(index, row, own, batch)
    own, other, known = cells.classes_of(targets, own, other, known, num_classes, TARGETS)
    lam = tl.where(known, tl.load(weights + row), float("nan"))
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    cells.mix_targets(targets, mixed, row, own, other, lam, column, num_classes, smoothing, TARGETS)
