"""What `make aot` says of the memory that a warp touches, on layouts made by hand."""

import pytest

from sg_kernels import backends

if backends._UNLOADED["triton"]:
    pytest.skip(backends._UNLOADED["triton"], allow_module_level=True)

import triton.language as tl

from benchmarks.compiled.requests import worst_request
from sg_kernels.backends.triton import plan

KERNEL = """
#blocked = #ttg.blocked<{{{layout}}}>
#blocked1 = #ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [32], order = [0]}}>
    %id = tt.load %index : !tt.ptr<i64> loc(#loc1)
    %mask = tt.load %from, %valid : tensor<512x!tt.ptr<i8>, #blocked1> loc(#loc2)
    %scale = tt.load %affine : tensor<{shape}x!tt.ptr<f32>, #blocked1> loc(#loc3)
    %value = tt.load %address, %inside, %zero : tensor<{shape}x!tt.ptr<i64>, #blocked> loc(#loc4)
    tt.store %out, %value, %inside : tensor<{shape}x!tt.ptr<i64>, #blocked> loc(#loc5)
"""
FLAT = "sizePerThread = [1, 2], threadsPerWarp = [32, 1], order = [1, 0]"
ALONG = "sizePerThread = [1, 1, 2], threadsPerWarp = [4, 8, 1], order = [2, 1, 0]"
ACROSS = "sizePerThread = [1, 1, 2], threadsPerWarp = [32, 1, 1], order = [2, 0, 1]"
NARROW = "sizePerThread = [1, 1], threadsPerWarp = [16, 2], order = [1, 0]"


def request(layout, shape, lines, chunks, width):
    """Of a tile of images (3, 64, width) in chunks of two integers of 8 bytes."""
    planes = 64 * width
    strides = 3 * planes, planes, width, 1
    images = (512, 3, 64, width), strides, strides, 4, 16, (8, 8)
    planned = plan.tile(512, *images, False, plan.THREADS, 132)
    assert planned.layout[-3:] == (lines, chunks, 2)
    kernel = KERNEL.format(shape=shape, layout=layout)
    return worst_request(kernel, (512, planned.tiles, planned.layout, tl.int64))


def test_a_request_along_the_lines_touches_its_own_bytes():
    for layout, shape in ((FLAT, "512x2"), (ALONG, "64x8x2")):
        found = request(layout, shape, lines=64, chunks=8, width=32)
        assert found == (512, 16, 4)
        assert not found.scattered


def test_a_request_across_the_lines_is_scattered():
    found = request(ACROSS, "64x8x2", lines=64, chunks=8, width=32)
    assert found == (512, 32, 32)
    assert found.scattered


def test_whole_sectors_of_many_lines_are_scattered():
    layout = "sizePerThread = [1, 1, 2], threadsPerWarp = [16, 2, 1], order = [2, 1, 0]"
    found = request(layout, "64x8x2", lines=64, chunks=8, width=32)
    assert found == (512, 16, 16)
    assert found.scattered


def test_narrow_accesses_touch_few_bytes_but_whole_sectors():
    found = request(NARROW, "512x2", lines=64, chunks=8, width=32)
    assert found == (256, 8, 2)
    assert not found.scattered


def test_chunks_past_the_end_of_a_line_are_left_out():
    # 24 of 32: 384 bytes of the first line.
    assert request(FLAT, "512x2", lines=16, chunks=32, width=96) == (384, 12, 3)
