"""The plans of the Triton backend: pure functions of sizes, strides and the device."""

import itertools

import pytest
import torch
import triton

from sg_kernels.backends.triton import plan

MULTIPROCESSORS = 132


def contiguous(*shape):
    return torch.empty(shape, device="meta").stride()


def tile(shape, grid, strides=None, out_strides=None, itemsize=4, rows=None):
    dense = contiguous(*shape)
    given = rows or shape[0], shape, strides or dense, out_strides or dense, itemsize, 16
    return plan.tile(*given, grid, False, plan.THREADS, MULTIPROCESSORS)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("address", [0, 1, 2, 4, 8, 24])
def test_a_chunk_begins_and_ends_on_its_own_multiples(itemsize, address):
    aligned = plan.alignment(address * itemsize)
    for length in (1, 3, 6, 8, 20, 64):
        chunk = plan.widest_chunk(itemsize, aligned, length)
        assert chunk <= max(16, itemsize)
        assert chunk == itemsize or (address * itemsize % chunk == length * itemsize % chunk == 0)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 13, 56])
def test_no_window_is_larger_than_its_bound(size):
    for grid in range(1, size + 1):
        windows = [-(-(g + 1) * size // grid) - g * size // grid for g in range(grid)]
        assert max(windows) <= plan.window(size, grid)
    assert plan.window(size, size + 1) == 1


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 1, 1, 2**16), (1, 2**15)),
        ((1, 1, 2**16, 1), (2**15, 1)),
        ((1, 5, 2**13, 2**13), (1, 1)),
    ],
)
def test_images_that_32_bits_do_not_count_have_no_tile(shape, grid):
    assert tile(shape, grid) is None


def test_strides_that_32_bits_do_not_count_have_no_tile():
    shape, strided = (1, 2, 8, 8), contiguous(1, 2, 2**15, 2**15)
    assert tile(shape, (1, 1)) is not None
    assert tile(shape, (1, 1), strides=strided) is None
    assert tile(shape, (1, 1), out_strides=strided) is None
    assert tile((1, 3, 2**13, 2**13), (64, 64)) is not None


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [1, 7, 224, 384, 1040, 5000])
def test_a_tile_of_any_width_holds_a_line_and_a_chunk(itemsize, channels_last, width):
    shape = (2, 3, 9, width)
    image = 27 * width
    strides = (image, 1, 3 * width, 3) if channels_last else (image, 9 * width, width, 1)
    for grid, whole, threads, multiprocessors in itertools.product(
        (1, 7, 9), (False, True), (32, 128, 1024), (1, MULTIPROCESSORS)
    ):
        layout, unit_bytes, tiles = plan.tile(
            2,
            shape,
            strides,
            strides,
            itemsize,
            16,
            (min(9, grid), min(width, grid)),
            whole,
            threads,
            multiprocessors,
        )
        assert layout.lines >= 1
        assert layout.chunks >= 1
        line = 3 * width if layout.channels_last else width
        assert tiles.chunks * layout.lanes * unit_bytes == line * itemsize
        assert tiles.total * layout.lines * layout.chunks >= tiles.lines * tiles.chunks
        assert layout.lines * layout.chunks <= 1024 * 4


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_a_tile_leaves_as_few_lanes_idle_as_its_shortest_run_of_a_line_allows(chunk):
    assert plan.chunks_across(84, 16, 128) == 32  # 1344 bytes, of 224 pixels in 3 channels
    for count in range(1, 600):
        most = min(triton.next_power_of_2(count), 256)
        found = plan.chunks_across(count, chunk, most)
        powers = [2**bit for bit in range(9) if 2**bit <= most]
        allowed = [n for n in powers if n * chunk >= plan.MIN_RUN] or [most]
        assert found in allowed
        assert -count % found == min(-count % n for n in allowed)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("cell", [1, 2, 4, 8, 12, 16])
def test_a_lane_is_the_most_of_a_chunk_that_lies_in_one_cell(itemsize, cell):
    layout, unit_bytes, tiles = tile((2, 3, 16, 16 * cell), (16, 16), itemsize=itemsize)
    chunk, inside = 16, cell * itemsize & -(cell * itemsize)
    assert layout.lanes * unit_bytes == chunk
    assert layout.uniform == (inside >= chunk)
    assert unit_bytes == min(inside, 8)
    assert tiles.step * itemsize == (chunk if layout.uniform else unit_bytes)


@pytest.mark.parametrize("multiprocessors", [1, 16, 132, 304])
def test_tiles_shrink_until_every_multiprocessor_has_work(multiprocessors):
    shape, image = (8, 3, 224, 224), contiguous(8, 3, 224, 224)
    layout, _, tiles = plan.tile(
        8, shape, image, image, 4, 16, (7, 7), False, plan.THREADS, multiprocessors
    )
    smallest = layout.lines * layout.chunks <= plan.MIN_ACCESSES * plan.THREADS
    assert smallest or 8 * tiles.total > plan.MIN_PROGRAMS * multiprocessors


@pytest.mark.parametrize("multiprocessors", [1, 16, 132, 304])
def test_splits_double_until_every_multiprocessor_has_work(multiprocessors):
    for batch in (1, 8, 64, 512):
        splits = plan.splits_of(batch, 1, 2**20, 1, 49, multiprocessors)
        wanted = plan.PROGRAMS_1 * multiprocessors
        assert splits * batch >= wanted or splits == plan.MAX_SPLITS
        assert splits == 1 or splits * batch < 2 * wanted


@pytest.mark.parametrize(
    ("grid_cells", "most"), [(1, 64), (64, 64), (65, 64), (256, 64), (257, 16), (1024, 16)]
)
def test_launch_2_adds_up_at_most_max_terms_per_thread(grid_cells, most):
    """A thread holds 2 cells of grids up to 256, else 8, each a sum of at most ``most`` values."""
    for values in (1, most):
        held, threads, at_once = plan.cells(window_of(grid_cells, values), 1)
        assert at_once
        assert held.cells // threads * values <= plan.MAX_TERMS
    assert not plan.cells(window_of(grid_cells, most + 1), 1)[2]
    assert not plan.cells(window_of(1025, 1), 1)[2]


def window_of(grid_cells, values):
    """A map each cell of whose grid is a sum of ``values``."""
    size, grid = plan.Size(grid_cells, values), plan.Size(grid_cells, 1)
    return plan.Maps(size, grid, plan.Size(1, values))


@pytest.mark.parametrize("grid_cells", [1, 64, 256, 1024, 4096])
@pytest.mark.parametrize("splits", [1, 2, 4, 8, 16])
def test_splits_are_read_at_once_as_far_as_registers_allow(grid_cells, splits):
    size = plan.Size(grid_cells, 1)
    held, threads, _ = plan.cells(plan.Maps(size, size, plan.Size(1, 1)), splits)
    assert held.splits == splits
    assert not held.resampled
    assert splits % held.unroll == 0
    in_flight = held.unroll * held.cells // threads
    assert in_flight <= plan.SPLITS_IN_FLIGHT
    assert held.unroll == splits or 2 * in_flight > plan.SPLITS_IN_FLIGHT


@pytest.mark.parametrize("splits", [0, 1])
def test_a_grid_is_resampled_where_a_map_of_another_size_is_read(splits):
    maps = plan.Maps(plan.Size(7, 7), plan.Size(7, 5), plan.Size(1, 3))
    assert plan.cells(maps, splits)[0].resampled == bool(splits)
    assert not plan.cells(maps._replace(grid=maps.size), splits)[0].resampled


def test_more_draws_than_an_axis_holds_have_no_plan():
    for draws, planned in ((plan.MAX_DRAWS, True), (plan.MAX_DRAWS + 1, False)):
        image, features = (1, 1, 8, 8), (1, 1, 2, 2)
        copied = draws, image, contiguous(*image), contiguous(*image), 4, 16
        source = features, contiguous(*features), 4, 16, False
        assert (plan.saliency_graft(*copied, *source, (2, 2), 1) is not None) == planned
