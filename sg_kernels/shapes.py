"""Images of more than four dimensions as the four that the operators take.

What stands between C and H shares the mask, so it only has to lie along another dimension. A
contiguous (B, C, D, H, W) is a view as (B, C * D, H, W), and one in channels_last_3d as
(B, C, D * H, W), D planes of H lines each: the ``depth`` of a call.
"""

from math import prod
from typing import NamedTuple

from torch import Tensor

from sg_kernels.backends.reference import is_channels_last


class Folded(NamedTuple):
    """Images of four dimensions."""

    images: Tensor
    """A view where strides allow one, else a copy."""
    out: Tensor | None
    """A view of ``out``; None where none is given, or where it is no such view of the same form:
    then the result must be copied there."""
    depth: int
    """How many planes of H lines, with a mask each, lie one above the other in an image."""


def fold(images: Tensor, out: Tensor | None = None) -> Folded:
    """Folds (B, C, ..., H, W), or (B, H, W), which has one channel, to four dimensions."""
    if images.dim() == 4:
        return Folded(images, out, 1)
    if images.dim() == 3:
        return Folded(images[:, None], None if out is None else out[:, None], 1)
    planes = is_channels_last(images) and (out is None or is_channels_last(out))
    # Dimensions that become one: from the channels, or with planes from the one behind them.
    first, last = (2, -2) if planes else (1, -3)
    if not _are_one(images, first, last):
        images = _dense(images, planes)
    folded = images.flatten(first, last)
    if not planes and is_channels_last(folded):  # which the images are not
        folded = folded.contiguous()
    if out is not None:
        out = out.flatten(first, last) if _are_one(out, first, last) else None
    return Folded(folded, out, prod(images.shape[2:-2]) if planes else 1)


def _are_one(tensor: Tensor, first: int, last: int) -> bool:
    """Whether dimensions ``first`` to ``last`` are one in memory, so that a view can join them."""
    reach = None
    for dim in range(tensor.dim() + last, first - 1, -1):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 1:
            continue
        if reach is not None and stride != reach:
            return False
        reach = size * stride
    return True


def _dense(images: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return images.movedim(1, -1).contiguous().movedim(-1, 1)
    return images.contiguous()
