"""Says what the runs show: tables with differences to CutMix, paired by seed, and a plot.

    python -m benchmarks.accuracy.report             of benchmarks/results/, into docs/accuracy.md
    python -m benchmarks.accuracy.report FILE.csv    of other runs, on the terminal

The plot stands beside the CSV.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks.accuracy.experiments import BASELINE
from benchmarks.accuracy.train import OCCLUDED
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
    text = tables(rows)
    print(text)
    draw(rows, path.with_suffix(".png"))
    if path.resolve().parent == RESULTS:
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
            shown = "" if test == "plain" else f", {test}"
            title = f"{data}{shown}, {words}: {images} images, {network}, {steps} steps of {batch}"
            found[title] = of_budget.drop_duplicates(["method", "seed"])
    return found


def tables(rows: pd.DataFrame) -> str:
    texts = []
    for title, runs in groups(rows).items():
        lines = summary(runs)
        table = pd.DataFrame(
            {
                "method": [f"`{method}`" for method in lines.method],
                "cost of a step": lines.cost.map("{:.2f}".format),
                "seeds": lines.seeds.astype(str),
                "error, %": [
                    f"{error:.2f} ± {spread:.2f}"
                    for error, spread in zip(lines.error, lines["standard error"])
                ],
                "minus CutMix": lines.difference.map("{:+.2f}".format, na_action="ignore"),
                "95 % interval": [
                    f"{d - r:+.2f} .. {d + r:+.2f}" for d, r in zip(lines.difference, lines.reach)
                ],
                "": [verdict(line) for _, line in lines.iterrows()],
            }
        )
        table.loc[lines.difference.isna(), ["minus CutMix", "95 % interval"]] = ""
        commits = ", ".join(dict.fromkeys(runs.commit))
        first = runs.iloc[0]
        where = f"Learning rate {first.rate:g}; {first.device}, torch {first.torch}, {commits}."
        texts.append(f"**{title}**\n\n{where}\n\n{markdown(table)}")
    return "\n\n".join(texts)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A panel for each comparison: the difference to CutMix with its interval."""
    found = {title: summary(runs) for title, runs in groups(rows).items()}
    height = sum(1.1 + 0.3 * len(lines) for lines in found.values())
    ratios = [1 + len(lines) for lines in found.values()]
    figure, panels = plt.subplots(
        len(found), figsize=(8, height), squeeze=False, layout="constrained",
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
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(
            "test error minus CutMix's, points, with its 95 % interval; left is better"
        )
        panel.invert_yaxis()
        panel.grid(axis="x", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
