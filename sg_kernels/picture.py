"""Draws what a call did to each image; matplotlib is imported only then."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sg_kernels import checks
from sg_kernels.functional import graft
from sg_kernels.pipeline import GraftResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

SOURCE, DESTINATION = "#e4572e", "#2e6f95"
"""The colours of image i, of which a row keeps the cells of the mask, and of image j."""
TITLES = {
    "source $i$": SOURCE,
    "destination $j$": DESTINATION,
    "saliency of $i$": "black",
    "mask $M$": "black",
    "graft": "black",
    "target": "black",
}
MOST_ROWS = 8
"""Rows drawn if none are chosen."""
MOST_CLASSES = 3
"""Classes named per target, the largest first."""
LEAST_WEIGHT = 0.05
"""The least weight of a class that is named; less is label smoothing or next to nothing."""
ROW_HEIGHT, WIDTH, TITLE_HEIGHT = 1.75, 10.5, 0.4  # inches


def show(
    result: GraftResult,
    images: Tensor,
    names: Sequence[str] | None = None,
    *,
    rows: Sequence[int] | None = None,
    figure: "FigureBase | None" = None,
) -> "FigureBase":
    """Draws source, destination, saliency, mask, graft and target of each row.

    The mask and the bars of lam have the colours of the titles: one for what is kept of the source,
    one for what shows of the destination. Without a saliency map its column stays empty.

    Args:
        result: of :func:`sg_kernels.saliency_graft`, or a module's.
        images: the images that were grafted, (B, 1, H, W) or (B, 3, H, W). uint8, and floats in
            [0, 1], are drawn as they are; anything else is scaled, each channel by its range in the
            batch.
        names: the names of the classes; default: their numbers.
        rows: which rows of the result to draw; default: the first 8.
        figure: a matplotlib ``Figure`` or ``SubFigure`` to draw in; default: a new figure.

    Returns:
        The figure, with six axes per row, row by row.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
        ModuleNotFoundError: matplotlib is missing.
    """
    chosen = _checked_rows(result, images, names, rows)
    from matplotlib import pyplot

    if figure is None:
        height = ROW_HEIGHT * len(chosen) + TITLE_HEIGHT
        figure = pyplot.figure(figsize=(WIDTH, height), layout="constrained")
    grid: Any = figure.subplots(len(chosen), len(TITLES), squeeze=False)
    pictures = _displayable(images.cpu())
    # From the pictures, as result.images may be on another scale.
    grafts = graft(pictures, result.mask.cpu(), result.index.cpu())
    for axes, row in zip(grid, chosen):
        _draw_row(list(axes), result, pictures, grafts, row)
        _draw_target(axes[-1], result, names, row)
    for axes, (title, colour) in zip(grid[0], TITLES.items()):
        axes.set_title(
            title, color=colour, fontsize=12, loc="left" if axes is grid[0, -1] else None
        )
    return figure


def _checked_rows(result: Any, images: Any, names: Any, rows: Any) -> list[int]:
    if not isinstance(result, GraftResult):
        raise TypeError(f"result must be a GraftResult; got {type(result).__name__}")
    if isinstance(images, Tensor) and images.dim() > 4:
        raise ValueError(
            f"images must be (B, C, H, W); got {tuple(images.shape)}: choose a frame of each"
        )
    checks.check_images(images)
    batch, channels = images.shape[:2]
    if images.is_complex() or channels not in (1, 3):
        raise ValueError(
            f"images must be real, with 1 or 3 channels; got {images.dtype}, {tuple(images.shape)}"
        )
    grafted = len(result.mask) if result.saliency is None else len(result.saliency)
    if batch != grafted and (result.saliency is not None or not batch or grafted % batch):
        raise ValueError(f"images must be the {grafted} of result; got {batch}")
    classes = 0 if result.targets is None else result.targets.shape[1]
    if names is not None and len(names) < classes:
        raise ValueError(f"names must be of the {classes} classes of result; got {len(names)}")
    count = len(result.mask)
    chosen = list(range(min(count, MOST_ROWS))) if rows is None else [int(row) for row in rows]
    if not (chosen and all(0 <= row < count for row in chosen)):
        raise ValueError(f"rows must be some of 0 .. {count - 1}; got {chosen}")
    return chosen


def _displayable(images: Tensor) -> Tensor:
    """uint8 in 0 .. 255, or floats in 0 .. 1."""
    images = images.detach()
    if images.dtype == torch.uint8:
        return images
    values = images.float()
    low, high = values.aminmax()
    if low < 0 or high > 1:
        low, high = values.amin((0, 2, 3), True), values.amax((0, 2, 3), True)
        values = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return values


def _draw_row(
    axes: "list[Axes]", result: GraftResult, pictures: Tensor, grafts: Tensor, row: int
) -> None:
    from matplotlib.colors import ListedColormap

    i, j = row % len(pictures), int(result.index[row])
    for place, picture in ((0, pictures[i]), (1, pictures[j]), (4, grafts[row])):
        image = _array(picture.movedim(0, -1))
        # Of one channel; matplotlib would stretch each image to its own range.
        top = 255 if image.dtype == np.uint8 else 1
        axes[place].imshow(image, cmap="gray", vmin=0, vmax=top)
    if result.saliency is not None:
        axes[2].imshow(_array(result.saliency[i]), cmap="magma", vmin=0)
    cells = ListedColormap([DESTINATION, SOURCE])
    axes[3].imshow(_array(result.mask[row].byte()), cmap=cells, vmin=0, vmax=1, alpha=0.7)
    for place, each in enumerate(axes[:5]):
        each.set(xticks=[], yticks=[])
        colour = (SOURCE, DESTINATION)[place] if place < 2 else "0.8"
        for spine in each.spines.values():
            spine.set(color=colour, linewidth=2.5 if place < 2 else 1)


def _draw_target(axes: "Axes", result: GraftResult, names: Sequence[str] | None, row: int) -> None:
    """Bars of lam and 1 - lam, and under them the classes of the target."""
    lam = float(result.lam[row])
    axes.barh([1, 0], [lam, 1 - lam], color=[SOURCE, DESTINATION], height=0.36)
    for y, symbol, weight in ((1, r"\lambda", lam), (0, r"1-\lambda", 1 - lam)):
        axes.text(0.0, y + 0.25, f"${symbol} = {weight:.2f}$", va="bottom", fontsize=11)
    if result.targets is not None:
        weights, classes = result.targets[row].topk(min(MOST_CLASSES, result.targets.shape[1]))
        lines = [
            f"{weight:.2f}  {names[c] if names is not None else f'class {c}'}"
            for weight, c in zip(weights.tolist(), classes.tolist())
            if weight >= LEAST_WEIGHT
        ]
        axes.text(0.0, -0.4, "\n".join(lines), va="top", fontsize=9)
    axes.set(xlim=(-0.05, 1.0), ylim=(-1.6, 1.8), box_aspect=1)
    axes.axis("off")


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
