"""Says what the runs show: tables with differences to CutMix, paired by seed, and a plot.

    python -m benchmarks.accuracy.report             of benchmarks/results/, into docs/accuracy.md:
                                                     what has enough seeds
    python -m benchmarks.accuracy.report FILE.csv    of other runs, on the terminal

The plot stands beside the CSV.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", nargs="?", type=Path, default=RESULTS / "accuracy.csv")
    path = parser.parse_args().csv
    rows = read(path)
    published = path.resolve().parent == RESULTS
    if published:
        rows = with_enough_seeds(rows)
    text = tables(rows)
    print(text)
    draw(rows, path.with_suffix(".png"))
    if published:
        PAGE.write_text(between_markers(PAGE.read_text(), "accuracy", text))


def read(path: Path) -> pd.DataFrame:
    """One error a row: a run that was tested with occlusion gives a row for each share too."""
    rows = pd.read_csv(path, dtype={"occluded": str, "commit": str}, keep_default_na=False)
    frames = [rows]
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


def groups(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs that are compared, by a title. At plain cost, equal steps and equal cost agree."""
    found = {}
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
            for experiment, part in parts(of_budget) if test == "plain" else [(test, of_budget)]:
                found[f"{data}, {words}, {experiment}: {size}"] = part
    return found


def parts(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The smallest experiment that has all the methods; or each that has some of its own, then what
    belongs to none.
    """
    whole = [name for name, methods in EXPERIMENTS.items() if {*rows.method} <= {*methods}]
    if whole:
        yield min(whole, key=lambda name: len(EXPERIMENTS[name])), rows
        return
    shown = {BASELINE}
    for experiment, methods in EXPERIMENTS.items():
        own = {*rows.method} & {*methods} - shown
        if own and experiment != "key":  # which is a part of the recipes
            yield experiment, rows[rows.method.isin(methods)]
            shown |= own
    if {*rows.method} - shown:
        yield "others", rows[(rows.method == BASELINE) | ~rows.method.isin(shown)]


def tables(rows: pd.DataFrame) -> str:
    texts = []
    for title, runs in groups(rows).items():
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


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A panel for each comparison: the difference to CutMix with its interval."""
    found = {title: summary(runs) for title, runs in groups(rows).items()}
    height = sum(0.9 + 0.3 * len(lines) for lines in found.values())
    ratios = [1 + len(lines) for lines in found.values()]
    figure, panels = plt.subplots(
        len(found), figsize=(9, height), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    for panel, (title, lines) in zip(panels[:, 0], found.items()):
        lines = lines.fillna({"difference": 0.0, "reach": 0.0})
        places = range(len(lines))
        colours = ["black" if method == BASELINE else "#d95f02" for method in lines.method]
        panel.errorbar(lines.difference, places, xerr=lines.reach, fmt="none", ecolor="#8c9bab")
        panel.scatter(lines.difference, places, c=colours, zorder=3)
        labels = [f"{row.method}  ({row.error:.1f} %, {row.seeds})" for row in lines.itertuples()]
        panel.set_yticks(places, labels)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_title(title, loc="left", fontsize=9)
        style_rows(panel)
    figure.supxlabel(
        "test error minus CutMix's, points, with its 95 % interval; left is better", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
