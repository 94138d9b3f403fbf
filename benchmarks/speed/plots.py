"""What a run looks like: every candidate beside the floor, and how the cost grows.

python -m benchmarks.plots FILE.csv    draws it anew, as of a run that was stopped
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks import report, results
from benchmarks.candidates import COPY
from benchmarks.results import Row

OURS, THEIRS, FLOOR = "#d95f02", "#8c9bab", "black"
SHADES = ("#d95f02", "#7b3294")
AXES = {
    "batch": "batch of 3x32x32 images, 640x8x8 features",
    "channels": "channels of the 8x8 features of 128 images",
    "grid": "cells along a side; 128 images, 64x8x8 features",
    "augmentations": "augmentations of 128 images, 640x8x8 features",
}
HEADLINES = ("cifar", "imagenet")
UNDRAWN = ("channel_saliency", "map given", "sum of", "of the images", "one element")
"""Parts of the operator, not a way of mixing."""


def draw(rows: list[Row], path: Path) -> None:
    """``<name>.png`` and ``<name>-growth.png`` beside the CSV."""
    figure_name = "device time" if any(row.figure == "device time" for row in rows) else "time"
    times = [row for row in rows if row.figure == figure_name and row.value is not None]
    candidates(times, figure_name, path.with_suffix(".png"))
    growth(times, figure_name, path.with_name(f"{path.stem}-growth.png"))


def is_ours(name: str) -> bool:
    return name.split(",")[0] in ("triton", "cuda", "cpp")


def candidates(rows: list[Row], figure_name: str, path: Path) -> None:
    """One panel a case: a dot a candidate on a logarithmic axis, and the floor as a line."""
    shown = {
        case: sorted(
            (
                row
                for row in rows
                if row.case == case
                and row.candidate != COPY
                and not any(part in row.candidate for part in UNDRAWN)
            ),
            key=lambda row: row.value or 0.0,
        )
        for case in HEADLINES
    }
    shown = {case: chosen for case, chosen in shown.items() if chosen}
    if not shown:
        return
    tallest = max(map(len, shown.values()))
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, len(shown) * (1.2 + 0.24 * tallest)), layout="constrained"
    )
    for panel, (case, chosen) in zip([panels] if len(shown) == 1 else panels, shown.items()):
        floor = next((row.value for row in rows if (row.case, row.candidate) == (case, COPY)), None)
        for y, row in enumerate(chosen):
            color = OURS if is_ours(row.candidate) else THEIRS
            panel.plot([row.p20, row.p80], [y, y], color=color, linewidth=2)
            panel.plot(row.value, y, "o", color=color, markersize=6)
            panel.annotate(
                report.figure(row.value),
                (row.p80, y),
                (7, 0),
                textcoords="offset points",
                va="center",
            )
        panel.set_yticks(range(len(chosen)), [row.candidate for row in chosen])
        title = f"{case}: {chosen[0].shape}"
        if floor is not None:
            panel.axvline(floor, color=FLOOR, linestyle="--", linewidth=1)
            title += f"\ndashed, the floor of grafting: {COPY}, {report.figure(floor)} ms"
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(f"{figure_name} of a call, ms, logarithmic; median, bar p20 .. p80")
        panel.invert_yaxis()
        panel.margins(x=0.15, y=0.05)
        panel.grid(axis="x", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def growth(rows: list[Row], figure_name: str, path: Path) -> None:
    """One panel an axis: time against its size, both logarithmic, and the floor."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, (axis, label) in zip(panels.flat, AXES.items()):
        curve(panel, [row for row in rows if row.case.startswith(f"{axis}=")])
        panel.set_xlabel(label, fontsize=9)
        panel.set_ylabel(f"{figure_name} of a call, ms")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve(panel: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.candidate for row in rows))
    shades = dict(zip((name for name in names if is_ours(name) and "," not in name), SHADES))
    for name in names:
        points = sorted((size(row), row) for row in rows if row.candidate == name)
        at = [x for x, _ in points]
        color = FLOOR if name == COPY else shades.get(name.split(",")[0], THEIRS)
        style = "--" if name == COPY else ":" if "," in name else "-"
        label = f"the floor: {name}" if name == COPY else name
        panel.plot(
            at, [row.value for _, row in points], style, color=color, marker=".", label=label
        )
        low, high = [row.p20 for _, row in points], [row.p80 for _, row in points]
        panel.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    ticks = sorted({size(row) for row in rows})
    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.grid(color="0.92", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


def size(row: Row) -> int:
    return int(row.case.partition("=")[2])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(results.read(Path(name))[1], Path(name))
