"""What a run looks like: every candidate beside the floor, and how the cost grows.

python -m benchmarks.speed.plots FILE.csv    draws <name>.png and <name>-growth.png beside it
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.speed import results
from benchmarks.speed.candidates import COPY, IN_TURN

OURS, THEIRS = "#d95f02", "#8c9bab"
SHADES = {"triton": "#d95f02", "cuda": "#7b3294", "cpp": "#d95f02", COPY: "black"}
AXES = {
    "batch": "batch of 3x32x32 images, 640x8x8 features",
    "channels": "channels of the 8x8 features of 128 images",
    "grid": "cells along a side; 128 images, 64x8x8 features",
    "augmentations": "augmentations of 128 images, 640x8x8 features",
}
PARTS = "channel_saliency|map given|sum of|of the images|two launches|triton graft"
"""Candidates that are a part of the work, not a way of mixing."""


def draw(path: Path) -> None:
    rows = results.read(path).dropna(subset="value")
    figure = "device time" if (rows.figure == "device time").any() else "time"
    times = rows[(rows.figure == figure) & (rows.candidate != IN_TURN)]
    label = f"{figure} of a call, ms"
    draw_candidates(times[times.case.isin(["cifar", "imagenet"])], label, path.with_suffix(".png"))
    draw_growth(times, label, path.with_name(f"{path.stem}-growth.png"))


def draw_candidates(rows: pd.DataFrame, label: str, path: Path) -> None:
    """One panel a case: a dot for each candidate, and the floor as a line."""
    shown = rows[(rows.candidate != COPY) & ~rows.candidate.str.contains(PARTS)]
    cases = list(shown.groupby("case", sort=False))
    height = sum(1.2 + 0.24 * len(chosen) for _, chosen in cases)
    figure, panels = plt.subplots(
        len(cases), figsize=(8, height), squeeze=False, layout="constrained"
    )
    for panel, (case, chosen) in zip(panels[:, 0], cases):
        chosen = chosen.sort_values("value")
        for y, row in enumerate(chosen.itertuples()):
            color = OURS if row.candidate.split(",")[0] in SHADES else THEIRS
            panel.plot([row.p20, row.p80], [y, y], color=color, linewidth=2)
            panel.plot(row.value, y, "o", color=color)
            place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            panel.annotate(f"{row.value:.3g}", (row.p80, y), **place)
        panel.set_yticks(range(len(chosen)), chosen.candidate)
        title = f"{case}: {chosen['shape'].iloc[0]}"
        for floor in rows[(rows.case == case) & (rows.candidate == COPY)].value[:1]:
            panel.axvline(floor, color="black", linestyle="--", linewidth=1)
            title += f"\ndashed: the floor of grafting, {COPY}, {floor:.3g} ms"
        panel.set_title(title, loc="left", fontsize=10)
        panel.set(xscale="log", xlabel=f"{label} (logarithmic; median, bar from p20 to p80)")
        panel.xaxis.set_major_formatter(FuncFormatter("{0:g}".format))
        panel.margins(x=0.15, y=0.05)
        style_rows(panel)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def style_rows(panel: Axes) -> None:
    """A row for each candidate, the first on top."""
    panel.invert_yaxis()
    panel.grid(axis="x", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def draw_growth(rows: pd.DataFrame, label: str, path: Path) -> None:
    """One panel an axis: time against its size, both logarithmic."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, (axis, words) in zip(panels.flat, AXES.items()):
        of_axis = rows[rows.case.str.startswith(f"{axis}=")]
        curves(panel, of_axis.assign(size=of_axis.case.str.removeprefix(f"{axis}=").astype(int)))
        panel.set_xlabel(words, fontsize=9)
        panel.set_ylabel(label)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(panel: Axes, rows: pd.DataFrame) -> None:
    for name, points in rows.groupby("candidate", sort=False):
        points = points.sort_values("size")
        color = SHADES.get(name.split(",")[0], THEIRS)
        style = "--" if name == COPY else ":" if "," in name else "-"
        label = f"the floor: {name}" if name == COPY else name
        panel.plot(points["size"], points.value, style, color=color, marker=".", label=label)
        band = {"color": color, "alpha": 0.15, "linewidth": 0}
        panel.fill_between(points["size"], points.p20, points.p80, **band)
    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(set(rows["size"]))))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(color="0.92", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name))
