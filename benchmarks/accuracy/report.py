"""Says what the runs show: tables with differences to CutMix, paired by seed, and plots.

    python -m benchmarks.accuracy.report             of benchmarks/results/, into docs/accuracy.md:
                                                     what has enough seeds
    python -m benchmarks.accuracy.report FILE.csv    of other runs, on the terminal

The plots stand beside the CSV.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks.accuracy.experiments import BASELINE, EXPERIMENTS
from benchmarks.accuracy.train import OCCLUDED
from benchmarks.speed.plots import style_rows
from benchmarks.speed.readme import between_markers, markdown
from benchmarks.speed.results import RESULTS, ROOT

PAGE = ROOT / "docs" / "accuracy.md"
SETTING = ["data", "train_images", "network", "steps", "batch", "rate", "test"]
ENOUGH = 8
"""Seeds for a claim."""
OPTIONS = "ablations", "threshold", "softmax", "sampling", "diversity", "others"
"""The experiments that compare options of one method; the first two of SECTIONS are the rest."""
SECTIONS = "recipes", "methods", "options"
"""Of the page: each has a plot, and its tables."""


class Comparison(NamedTuple):
    section: str
    title: str
    runs: pd.DataFrame


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", nargs="?", type=Path, default=RESULTS / "accuracy.csv")
    path = parser.parse_args().csv
    rows = read(path)
    published = path.resolve().parent == RESULTS
    if published:
        rows = with_enough_seeds(rows)
    found = sections(comparisons(rows))
    for section, part in found.items():
        print(tables(part), end="\n\n")
        draw(part, path.with_name(f"{path.stem}-{section}.png"))
    if published:
        PAGE.write_text(rewritten(PAGE.read_text(), found))


def rewritten(page: str, found: dict[str, list[Comparison]]) -> str:
    """The page with new tables between the markers of each section."""
    for section, part in found.items():
        page = between_markers(page, section, tables(part))
    return page


def read(path: Path) -> pd.DataFrame:
    """One error a row: a run that was tested with occlusion too gives a row for each share."""
    rows = pd.read_csv(path, dtype={"occluded": str, "commit": str}, keep_default_na=False)
    frames = [rows.assign(test="plain")]
    for i, share in enumerate(OCCLUDED):
        hidden = rows[rows.occluded != ""]
        error = hidden.occluded.str.split().str[i].astype(float)
        frames.append(hidden.assign(error=error, test=f"{share:.0%} of the cells hidden"))
    return pd.concat(frames, ignore_index=True)


def with_enough_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Without what was run on too few seeds for a claim."""
    seeds = rows.groupby([*SETTING, "budget", "method"]).seed.transform("nunique")
    return rows[seeds >= ENOUGH]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The methods of one setting and budget: mean error, and the paired difference to CutMix."""
    baseline = rows[rows.method == BASELINE].set_index("seed").error
    lines = []
    for method, runs in rows.groupby("method", sort=False):
        error = runs.set_index("seed").error
        difference = (error - baseline).dropna()
        count = len(difference)
        spread = difference.sem() * stats.t.ppf(0.975, count - 1) if count > 1 else float("nan")
        lines.append(
            {
                "method": method,
                "cost": runs.cost.iloc[0] / 3,
                "seeds": len(error),
                "error": error.mean(),
                "standard error": error.sem(),
                "difference": difference.mean() if method != BASELINE else float("nan"),
                "reach": spread if method != BASELINE else float("nan"),
            }
        )
    return pd.DataFrame(lines).sort_values("error", ignore_index=True)


def verdict(line: pd.Series) -> str:
    if line.method == BASELINE:
        return ""
    if line.seeds < ENOUGH:
        return "too few seeds"
    if abs(line.difference) <= line.reach:
        return "no difference shown"
    return "better" if line.difference < 0 else "worse"


def comparisons(rows: pd.DataFrame) -> list[Comparison]:
    """The runs that are compared. At plain cost, equal steps and equal cost agree."""
    found = []
    for setting, runs in rows.groupby(SETTING, sort=False):
        data, images, network, steps, batch, rate, test = setting
        plain = runs[(runs.cost == 3) & (runs.budget == "cost")]
        for budget, words in (("cost", "equal cost"), ("steps", "equal steps")):
            of_budget = runs[runs.budget == budget]
            if of_budget.empty:
                continue
            if budget == "steps":
                of_budget = pd.concat([plain, of_budget])
            of_budget = of_budget.drop_duplicates(["method", "seed"])
            size = f"{images} images, {network}, {steps} steps of {batch}"
            found_parts = parts(of_budget, budget) if test == "plain" else [(test, of_budget)]
            for experiment, part in found_parts:
                title = f"{data}, {words}, {experiment}: {size}"
                found.append(Comparison(section_of(experiment), title, part))
    return found


def sections(found: list[Comparison]) -> dict[str, list[Comparison]]:
    """By section, without those that are empty."""
    by_name = {name: [each for each in found if each.section == name] for name in SECTIONS}
    return {name: part for name, part in by_name.items() if part}


def section_of(experiment: str) -> str:
    if experiment in ("key", "recipes"):
        return "recipes"
    return "options" if experiment in OPTIONS else "methods"


def parts(rows: pd.DataFrame, budget: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The smallest experiment that has all the methods; or each that has some of its own, run at
    the budget, then what belongs to none.
    """
    tested = {name: methods for name, methods in EXPERIMENTS.items() if name != "occlusion"}
    whole = [name for name, methods in tested.items() if {*rows.method} <= {*methods}]
    if whole:
        yield min(whole, key=lambda name: len(tested[name])), rows
        return
    shown = {BASELINE}
    of_budget = {*rows[rows.budget == budget].method}
    for experiment, methods in tested.items():
        own = of_budget & {*methods} - shown
        if own and experiment != "key":  # which is a part of the recipes
            yield experiment, rows[rows.method.isin(methods)]
            shown |= own
    if of_budget - shown:
        yield "others", rows[(rows.method == BASELINE) | ~rows.method.isin(shown)]


def tables(found: list[Comparison]) -> str:
    texts = []
    for _, title, runs in found:
        first, commits = runs.iloc[0], ", ".join(dict.fromkeys(runs.commit))
        where = f"Learning rate {first.rate:g}; {first.device}, torch {first.torch}, {commits}."
        texts.append(f"**{title}**\n\n{where}\n\n{table_of(summary(runs))}")
    return "\n\n".join(texts)


def table_of(lines: pd.DataFrame) -> str:
    low, high = lines.difference - lines.reach, lines.difference + lines.reach
    columns = {
        "method": [f"`{method}`" for method in lines.method],
        "cost of a step": lines.cost.map("{:.2f}".format),
        "seeds": lines.seeds.astype(str),
        "error, %": joined(lines.error.map("{:.2f}".format), " ± ", shown(lines["standard error"])),
        "minus CutMix": shown(lines.difference, "+"),
        "95 % interval": joined(shown(low, "+"), " .. ", shown(high, "+")),
        "": [verdict(line) for _, line in lines.iterrows()],
    }
    return markdown(pd.DataFrame(columns))


def shown(values: pd.Series, sign: str = "") -> pd.Series:
    """Two digits; empty where too few seeds give none."""
    return values.map(lambda value: "" if pd.isna(value) else f"{value:{sign}.2f}").astype(str)


def joined(left: pd.Series, between: str, right: pd.Series) -> pd.Series:
    return left + right.where(right == "", between + right)


def draw(found: list[Comparison], path: Path) -> None:
    """A panel for each comparison: the difference to CutMix with its interval."""
    summaries = [summary(comparison.runs) for comparison in found]
    height = sum(0.9 + 0.3 * len(lines) for lines in summaries)
    ratios = [1 + len(lines) for lines in summaries]
    figure, panels = plt.subplots(
        len(found), figsize=(9, height), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    for panel, comparison, lines in zip(panels[:, 0], found, summaries):
        lines = lines.fillna({"difference": 0.0, "reach": 0.0})
        places = range(len(lines))
        colours = ["black" if method == BASELINE else "#d95f02" for method in lines.method]
        panel.errorbar(lines.difference, places, xerr=lines.reach, fmt="none", ecolor="#8c9bab")
        panel.scatter(lines.difference, places, c=colours, zorder=3)
        labels = [f"{row.method}  ({row.error:.1f} %, {row.seeds})" for row in lines.itertuples()]
        panel.set_yticks(places, labels)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_title(comparison.title, loc="left", fontsize=9)
        style_rows(panel)
    figure.supxlabel(
        "test error minus CutMix's, points, with its 95 % interval; left is better", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
