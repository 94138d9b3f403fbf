"""The arguments of the kernels in groups, with the type of every number.

A kernel takes groups whole and reads their fields by name. Groups of constants become part of its
code; the other groups are passed at every launch. The first group of each kernel holds its memory,
and nothing else may be None. An ``Address`` is a pointer as an integer, so that code depends on the
width of an element and not on its dtype.

In Triton 3.6 the field of a group of constants is a Python value, no constexpr. Where it must be
one, for static_range and for strings that are passed on, kernels bind it: NAME: tl.constexpr =
GROUP.field.
"""

from typing import Annotated, NamedTuple

from torch import Tensor

Int32 = Annotated[int, "i32"]
Int64 = Annotated[int, "i64"]
Float32 = Annotated[float, "fp32"]
Address = Int64


class Size(NamedTuple):
    height: Int32
    width: Int32


class Maps(NamedTuple):
    """The maps of a batch and their grid.

    The batch is passed apart: as a field here it costs launch 2 seven registers on sm_100.
    """

    size: Size
    grid: Size
    window: Size
    """The most rows and columns of a map that a cell of the grid averages over."""


class SaliencyMemory(NamedTuple):
    """What launch 1 reads and writes."""

    source: Address
    """Features, or a ready map."""
    partials: Tensor
    """The partial sums, or with a ready map the saliency itself."""
    grid: Tensor | None = None
    """A ready map on the grid; None where the grid has the size of the map."""
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    """The pairing; None where only the map is wanted."""
    given_index: Tensor | None = None
    drawn: Tensor | None = None
    """The seed of the call, then of each draw p; see cells.draw_keep_prob."""
    seed: Tensor | None = None
    """None where the seed is on the host: :attr:`Pairing.host_seed`."""
    step: Tensor | None = None
    quantiles: Tensor | None = None


class Sums(NamedTuple):
    """How launch 1 walks features; strides in chunks."""

    splits: Int32
    tiles: Int32
    rows: Int32
    """Rows of planes, or with layout "channels_last" chunks of channels."""
    sample_stride: Int64
    row_stride: Int64
    y_stride: Int64
    x_stride: Int64


class Pairing(NamedTuple):
    programs: Int32
    """How many programs draw the pairing."""
    rank: Int32
    host_seed: Int64
    """The seed, where it is on the host."""
    keep_prob: Int64
    """As ``prob`` a threshold of 32-bit words: 2**32 is certain."""
    prob: Int64


class Block(NamedTuple):
    """Constants of launch 1; see sum_planes, sum_channels and check_map."""

    layout: str
    """"planes", "strided", "channels_last", or with a ready map "given"."""
    planes: int
    rows: int
    chunks: int
    lanes: int
    unroll: int


class RowsMemory(NamedTuple):
    """What launch 2 reads and writes."""

    images: Address
    out: Address
    maps: Tensor
    saliency: Tensor | None
    """Where the maps are written whole; None where they are already."""
    drawn: Tensor
    step: Tensor | None
    given_mask: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    targets: Tensor | None
    lam: Tensor
    mask: Tensor
    mixed: Tensor
    affine: Tensor | None
    """Scale and shift of each channel; None where images are copied as they are."""


class Rows(NamedTuple):
    batch: Int32
    parts: Int32
    """How many programs share the tiles of a row."""


class Options(NamedTuple):
    """The numbers among the options of a call."""

    temperature: Float32
    threshold: Float32
    k: Int32
    num_classes: Int32
    label_smoothing: Float32


class Stages(NamedTuple):
    """The choices among the options of a call: constants of launch 2."""

    normalize: str
    topk: bool
    norm: str
    targets: str
    """"ids", "rows" or "none"."""


class Cells(NamedTuple):
    """How a program holds the cells of a sample, and the values that it sums to one: constants."""

    cells: int
    """Cells of the block, a power of two."""
    splits: int
    """Partial sums of each value of a map."""
    resampled: bool
    """Whether the grid has another size than the map."""
    terms: int
    """Values of a cell read in parallel, by different threads."""
    unroll: int
    """Loads in flight per thread."""


class GraftMemory(NamedTuple):
    """What the graft alone, or its gradient, reads and writes."""

    images: Address
    out: Address
    mask: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    affine: Tensor | None = None
    """As in :class:`RowsMemory`."""


class Sides(NamedTuple):
    """The sides of an image, at least 1, and plan.reciprocal of each."""

    channels: Int32
    height: Int32
    width: Int32
    per_channels: Int64
    per_height: Int64
    per_width: Int64


class Strides(NamedTuple):
    """In chunks."""

    image: Int64
    channel: Int32
    y: Int32
    x: Int32


class Tiles(NamedTuple):
    """The tiles of an image; see copy.py."""

    total: Int32
    across: Int32
    """How many lie side by side."""
    per_across: Int64
    """As in :class:`Sides`."""
    lines: Int32
    chunks: Int32
    """Of a line."""
    step: Int32
    """Elements that are sure to lie in one cell: of a chunk, or if not uniform of a lane."""
    sides: Sides
    source: Strides
    out: Strides


class Layout(NamedTuple):
    """Constants of a tile; see copy.py."""

    channels_last: bool
    planes: bool
    """Whether the lines of an image lie in planes: its channels, or frames."""
    strided: bool
    uniform: bool
    lines: int
    chunks: int
    lanes: int


class MixMemory(NamedTuple):
    """What the mixing of targets alone reads and writes."""

    targets: Tensor
    lam: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    mixed: Tensor
