"""Launch 2, the mask, lam, target and copy of every row; and the mixing of targets alone."""

import triton
import triton.language as tl

from sg_kernels.backends.triton import cells
from sg_kernels.backends.triton.arguments import Maps, MixMemory, Options, Rows, RowsMemory, Tiles
from sg_kernels.backends.triton.cells import destination_of
from sg_kernels.backends.triton.copy import copy_tile, tile_cells, tile_chunks

COLUMNS = tl.constexpr(256)
"""Classes mixed per iteration: 2 per thread."""


@triton.jit
def saliency_graft_kernel(
    memory: RowsMemory,
    rows: Rows,
    tiles: Tiles,
    maps: Maps,
    options: Options,
    STAGES: tl.constexpr,
    CELLS: tl.constexpr,
    GRAFTS: tl.constexpr,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Every program works out the mask of its row, of a sample (the first axis) in a draw (the
    second). One writes it, with lam and target; ``parts`` programs share the tiles of a row. If
    several do, they are others than the one that writes, since one that did both would finish last.
    Without GRAFTS nothing is copied.
    """
    NORM: tl.constexpr = STAGES.norm
    TARGETS: tl.constexpr = STAGES.targets
    if OVERLAPS:  # with the end of launch 1, whose writes are read from here on
        tl.extra.cuda.gdc_wait()
    own, draw = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = draw * rows.batch + own
    writes = tl.program_id(2) == 0
    part = tl.program_id(2) - tl.cast(rows.parts > 1, tl.int32)

    grid_cells = maps.grid.height * maps.grid.width
    cell = tl.arange(0, CELLS.cells)
    valid = cell < grid_cells
    seed, p = tl.load(memory.drawn), tl.load(memory.drawn + 1 + draw)
    grid = cells.grid_of(memory.maps, maps, rows.batch, own, cell, valid, CELLS)
    other, known = destination_of(memory.index, row, own, rows.batch)
    if memory.given_mask is None:
        keep = cells.select(grid, cell, valid, grid_cells, options, STAGES, CELLS.cells)
        kept = cells.sample(keep, cell, own, draw, seed, p)
    else:
        kept = tl.load(memory.given_mask + row * grid_cells + cell, mask=valid, other=0) != 0
    kept = cells.gate(kept, valid, p)

    if GRAFTS and part >= 0:
        bits = cells.bits_of(kept)
        for tile in range(part, tiles.total, rows.parts):
            place, inside = tile_chunks(tile, tiles, LAYOUT)
            tile_cell = tile_cells(place, tiles, maps.grid, LAYOUT)
            from_own = cells.mask_at(kept, bits, tile_cell)
            copy_tile(
                memory, tiles, row, own, other, place, inside, from_own, UNIT, OUT_UNIT, LAYOUT
            )

    if writes:
        tl.store(memory.mask + row * grid_cells + cell, kept, mask=valid)
        if memory.saliency is not None and draw == 0:
            store_saliency(memory, maps, rows.batch, own, grid, cell, valid, CELLS)
        other_grid = cells.grid_of(memory.maps, maps, rows.batch, other, cell, valid, CELLS)
        own_class, other_class, known = cells.classes_of(
            memory.targets, own, other, known, options.num_classes, TARGETS
        )
        lam = cells.label_ratio(grid, other_grid, kept, valid, grid_cells, NORM)
        lam = tl.where(known, lam, float("nan"))
        tl.store(memory.lam + row, lam)
        if TARGETS != "none":
            for start in range(0, options.num_classes, COLUMNS):
                cells.mix_targets(
                    memory.targets,
                    memory.mixed,
                    row,
                    own_class,
                    other_class,
                    lam,
                    start + tl.arange(0, COLUMNS),
                    options.num_classes,
                    options.label_smoothing,
                    TARGETS,
                )
        if memory.step is not None and row == 0:  # launch 1 has read it
            tl.store(memory.step, tl.load(memory.step) + 1)


@triton.jit
def store_saliency(memory, maps, batch, sample, grid, cell, valid, CELLS: tl.constexpr):
    """The map whole, which is the grid where that has its size."""
    SPLITS: tl.constexpr = CELLS.splits
    UNROLL: tl.constexpr = 4 if SPLITS > 4 else SPLITS
    map_cells = maps.size.height * maps.size.width
    saliency = memory.saliency + sample * map_cells
    if CELLS.resampled:
        for start in range(0, map_cells, CELLS.cells):
            place = start + cell
            exists = place < map_cells
            value = cells.sum_splits(
                memory.maps, map_cells, batch, sample, place, exists, SPLITS, UNROLL
            )
            tl.store(saliency + place, value, mask=exists)
    else:
        tl.store(saliency + cell, grid, mask=valid)


@triton.jit
def mix_targets_kernel(
    memory: MixMemory,
    batch: tl.int32,
    tiles: tl.int32,
    num_classes: tl.int32,
    label_smoothing: tl.float32,
    TARGETS: tl.constexpr,
):
    """Stage 8 alone; one program per (row, tile of COLUMNS)."""
    program = tl.program_id(0)
    row, tile = program // tiles, program % tiles
    own = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    other, known = destination_of(memory.index, row, own, batch)
    own, other, known = cells.classes_of(memory.targets, own, other, known, num_classes, TARGETS)
    cells.mix_targets(
        memory.targets,
        memory.mixed,
        row,
        own,
        other,
        tl.where(known, tl.load(memory.lam + row), float("nan")),
        tile * COLUMNS + tl.arange(0, COLUMNS),
        num_classes,
        label_smoothing,
        TARGETS,
    )
