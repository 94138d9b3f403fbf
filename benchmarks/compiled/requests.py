"""What one request of a warp touches: the first access of warp 0 to images or features.

The compiler decides which thread holds which part of a tile; the compiled kernel says so. Where
each part lies in memory is known from the launch.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from sg_kernels.backends.triton.arguments import Block, Layout, Maps, Sums, Tiles

WARP = 32
"""Threads."""
SECTOR, LINE = 32, 128
"""Bytes that memory hands out at once, and those that the cache looks up at once."""


class Request(NamedTuple):
    bytes: int = 0
    sectors: int = 0
    lines: int = 0

    @property
    def scattered(self) -> bool:
        """Whether it takes part of a sector, or more lines than as many bytes in a row may."""
        return self.sectors * SECTOR > self.bytes or (self.lines - 1) * LINE > self.bytes


class Access(NamedTuple):
    """A load or store of a tile, and Triton's blocked layout of it: each thread takes a run of
    elements; the threads of a warp lie along the axes in ``order``, the fastest first.
    """

    shape: tuple[int, ...]
    unit: int
    """Bytes of an element."""
    size_per_thread: tuple[int, ...]
    threads_per_warp: tuple[int, ...]
    order: tuple[int, ...]

    def elements(self) -> NDArray[np.int64]:
        """What the threads of warp 0 access first, (threads, run), as positions in the tile."""
        thread, place = np.arange(WARP), [np.zeros(WARP, np.int64)] * len(self.shape)
        for axis in self.order:
            block = thread % self.threads_per_warp[axis] * self.size_per_thread[axis]
            place[axis] = block % self.shape[axis]
            thread = thread // self.threads_per_warp[axis]
        run = np.arange(self.size_per_thread[self.order[0]])
        return np.ravel_multi_index(tuple(place), self.shape)[:, None] + run

    def request(self, chunks: NDArray[np.int64], lanes: int) -> Request:
        """What it touches if the chunks of the tile lie so; those below 0 it leaves out."""
        chunk, lane = np.divmod(self.elements(), lanes)
        place = chunks.ravel()[chunk]
        first = np.unique((place * lanes + lane)[place >= 0]) * self.unit
        return Request(
            first.size * self.unit, *[np.unique(first // n).size for n in (SECTOR, LINE)]
        )


def accesses(ttgir: str) -> list[Access]:
    layouts = {}
    for name, fields in re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", ttgir, re.MULTILINE):
        lists = re.findall(r"(?:sizePerThread|threadsPerWarp|order) = \[([\d, ]+)\]", fields)
        layouts[name] = [tuple(map(int, numbers.split(","))) for numbers in lists]
    tensor = r"tt\.(?:load|store) .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>, (#blocked\w*)>"
    return [
        Access(tuple(map(int, shape.split("x"))), int(bits) // 8, *layouts[layout])
        for shape, bits, layout in re.findall(tensor, ttgir)
    ]


def first_tile(group: dict[type, Any]) -> NDArray[np.int64]:
    """Where its chunks lie, in chunks: (lines or rows, chunks). A copy lies as its images do.
    -1 for those past the end.
    """
    if layout := group.get(Layout):
        tiles, line, across = group[Tiles], np.arange(layout.lines), np.arange(layout.chunks)
        channel, y = np.divmod(line, tiles.sides.height)
        begin = channel * tiles.source.channel + y * tiles.source.y
        exists = (line[:, None] < tiles.lines) & (across < tiles.chunks)
    else:
        block, sums, size = group[Block], group[Sums], group[Maps].size
        row, across = np.arange(block.rows), np.arange(block.chunks)
        if block.layout == "channels_last":
            y, x = np.divmod(row, size.width)
            begin = y * sums.y_stride + x * sums.x_stride
            exists = (y[:, None] < size.height) & (across < sums.rows)
        else:
            begin = row * sums.row_stride
            chunks = block.planes * size.height * size.width // block.lanes
            exists = (row[:, None] < sums.rows) & (across < chunks)
    return np.where(exists, begin[:, None] + across, -1)


def worst_request(ttgir: str, arguments: tuple[Any, ...]) -> Request:
    """The most scattered request to images or features, of a launch with these arguments."""
    group = {type(argument): argument for argument in arguments}
    units = [a.primitive_bitwidth // 8 for a in arguments if isinstance(a, tl.dtype)]
    lanes, chunks = (group.get(Layout) or group[Block]).lanes, first_tile(group)
    found = [
        access.request(chunks, lanes)
        for access in accesses(ttgir)
        if np.prod(access.shape) == chunks.size * lanes and access.unit in units
    ]
    return max(found, key=lambda request: request.lines / request.bytes)
