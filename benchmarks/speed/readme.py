"""Writes the tables of figures into README.md and docs/performance.md.

    python -m benchmarks.speed.readme            rewrites them from benchmarks/results/
    python -m benchmarks.speed.readme --check    fails where that would change them

A table stands between two lines, <!-- name --> and <!-- /name -->; the names are those of TABLES.
The prose holds no figures.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.speed import model
from benchmarks.speed.candidates import FIRST
from benchmarks.speed.candidates import TARGETS as WITH_TARGETS
from benchmarks.speed.cases import COPY_BANDWIDTH
from benchmarks.speed.compare import (
    DEVICE_TIME,
    N_CALLS,
    OVER_COPY,
    OVER_FLOOR,
    OVER_LARGER_FLOOR,
    OVER_STANDARDIZING,
    TIME,
)
from benchmarks.speed.host import BY_PYTHON, HOST_TIME, RECORDED
from benchmarks.speed.measure import DEVICE_COUNTERS
from benchmarks.speed.memory import LATER_PEAK, PEAK
from benchmarks.speed.results import RESULTS, ROOT, Row, find, measured_on, read
from benchmarks.speed.step import HALF, OVER_CUTMIX

FILES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BACKENDS = ("triton", "cuda", "cpp")


class Target(NamedTuple):
    """What the project set out to reach."""

    words: str
    sense: str
    """``at most`` or ``at least``."""
    bound: float
    where: tuple[str, ...]
    """A file and cases in it."""
    candidate: str
    figure: str
    unit: str = "x"


CPU, X4, HOST = ("cpu", "cifar", "imagenet"), ("cpu", "augmentations=4"), ("host", "tiny")
GPU, GPU_X4 = ("gpu", "imagenet"), ("gpu", "augmentations=4", "imagenet, four augmentations")
STANDARDIZED, TINY = ("gpu", "imagenet, standardised"), ("gpu", "tiny")
STEPS, CPU_STEPS = ("gpu", "ResNet-50"), ("price", "resnet18", "resnet50")
COPYING = "`cpp` with `out=` over copying the same bytes"
FOUR_CALLS = "one call with four augmentations over four calls"
BANDWIDTH = "GPU: `triton` over its bytes at the bandwidth of a copy"
REPLAYED = "GPU: `triton`, replayed, over its bytes or two launches"
FUSED = "GPU: `triton` that standardises over standardising alone"
APART = "GPU: standardising in one pass, then `triton`, over `triton` that standardises"
RECIPE = "a step of the recipe half at half the resolution over one with timm's CutMix"
MOST = 1024 + 8 * 64 * 7 * 7 / 1024  # KiB: 1 MiB and 8 bytes per cell
MOST_OF_GPU = (1 << 20) + 8 * 256 * 7 * 7
RECORDING, RECORDING_RAW = f"triton function{RECORDED}", f"triton raw operator{RECORDED}"
UNDRIVEN = "`triton`, host time of {}, without the driver's"
EAGER, COMPILED, CUTMIX = "eager reference", "compiled reference", "timm CutMix, batch (in place)"
LAUNCHES, SYNCS, MEMORY = DEVICE_COUNTERS
TARGETS = [
    Target(COPYING, "at most", 1.3, CPU, "cpp, out=", OVER_COPY),
    Target("eager reference over `cpp`", "at least", 8, CPU, EAGER, "time / cpp"),
    Target("compiled reference over `cpp`", "at least", 3, CPU, COMPILED, "time / cpp"),
    Target(f"`cpp`, {FOUR_CALLS}", "at most", 0.7, X4, "cpp", N_CALLS),
    Target(f"`cpp`, {PEAK}", "at most", MOST, ("cpu", "imagenet"), "cpp", LATER_PEAK, "KiB"),
    Target(f"`cpp`, {RECIPE}", "at most", 1.06, CPU_STEPS, "half pass_scale=0.5", OVER_CUTMIX),
    Target(UNDRIVEN.format("a call"), "at most", 45, HOST, RECORDING, HOST_TIME, "us"),
    Target(UNDRIVEN.format("the operator"), "at most", 30, HOST, RECORDING_RAW, HOST_TIME, "us"),
    Target(BANDWIDTH, "at most", 1.1, GPU, "triton", OVER_FLOOR),
    Target(REPLAYED, "at most", 1.5, ("gpu", "cifar"), "triton", OVER_LARGER_FLOOR),
    Target("GPU: eager reference over `triton`", "at least", 5, GPU, EAGER, "time / triton"),
    Target(
        "GPU: compiled reference over `triton`", "at least", 1.5, GPU, COMPILED, "time / triton"
    ),
    Target(
        "GPU: timm's CutMix over `triton`", "at least", 1, GPU, CUTMIX, "time / triton, targets"
    ),
    Target(f"GPU: `triton`, {FOUR_CALLS}", "at most", 0.65, GPU_X4, "triton", N_CALLS),
    Target(FUSED, "at most", 0.7, STANDARDIZED, "triton", OVER_STANDARDIZING),
    Target(APART, "at least", 1, STANDARDIZED, FIRST + "triton", "time / triton"),
    Target(f"GPU: {RECIPE}", "at most", 1.06, STEPS, HALF.format("triton"), OVER_CUTMIX),
    Target(f"GPU: `triton`, {LAUNCHES}", "at most", 2, GPU, "triton", LAUNCHES, ""),
    Target(f"GPU: `triton`, {SYNCS}", "at most", 0, GPU, "triton", SYNCS, ""),
    Target(
        "GPU: `triton`, host time of a call",
        "at most",
        15,
        TINY,
        "triton function",
        HOST_TIME,
        "us",
    ),
    Target(f"GPU: `triton`, {MEMORY}", "at most", MOST_OF_GPU, GPU, "triton", MEMORY, "B"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it would")
    check = parser.parse_args().check
    stale = [path for path in FILES if rewritten(path.read_text(), RESULTS) != path.read_text()]
    for path in stale:
        print(f"{path}: {'not what the results say' if check else 'rewritten'}")
        if not check:
            path.write_text(rewritten(path.read_text(), RESULTS))
    sys.exit(bool(stale) and check)


def rewritten(text: str, directory: Path) -> str:
    """The text with new tables between its markers."""
    for name, table in TABLES.items():
        if f"<!-- {name} -->" in text:
            text = between_markers(text, name, table(directory))
    return text


def between_markers(text: str, name: str, table: str) -> str:
    head, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- /{name} -->\n")
    return f"{head}{begin}{table}\n{end}{tail}" if end else text


def benchmarks(directory: Path) -> str:
    """A table for each machine: the speed-ups, then the times."""
    machines = {path: read(path) for path in sorted(directory.glob("*.csv"))}
    tables = [
        machine(rows, path)
        for path, rows in machines.items()
        if "candidate" in rows and "floor" in {*rows.candidate}
    ]
    return "\n\n".join(tables)


def machine(rows: pd.DataFrame, path: Path) -> str:
    rows = rows[rows.case.isin(rows[rows.candidate == "floor"].case) & rows.value.notna()]
    own = next(backend for backend in BACKENDS if backend in {*rows.candidate})
    time = DEVICE_TIME if DEVICE_TIME in {*rows.figure} else TIME
    mixes = rows.figure.isin([f"time / {own}", f"time / {own}{WITH_TARGETS}"])
    parts = "copy_|clone of|launches|standardising"
    ratios = rows[mixes & ~rows.candidate.str.contains(parts)]
    times = rows[(rows.figure == time) & rows.candidate.isin([own, f"{own}, out="])]
    between = pd.DataFrame(index=["**Time of a call (lower is better)**"])
    table = (
        pd.concat([by_case(ratios), between, by_case(times)])
        .fillna("")
        .rename(
            index={own: f"`{own}`", f"{own}, out=": f"`{own}` with `out=`"},
            columns={case: f"{case}: {shape}" for case, shape in zip(rows.case, rows["shape"])},
        )
    )
    table.index.name = "Speed-up over other libraries (higher is better)"
    run, rounds = rows.iloc[0], rows.rounds.max()
    caption = (
        f"`{own}` on {measured_on(run)}: medians of up to "
        f"{rounds} interleaved rounds ([all figures](benchmarks/results/{path.name})). Adapters "
        "are our versions of papers that no library provides."
    )
    return f"{caption}\n\n{markdown(table.reset_index())}"


def by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each candidate, a column for each case."""
    rows = rows.assign(value=[shown(value, unit) for value, unit in zip(rows.value, rows.unit)])
    return rows.pivot_table("value", "candidate", "case", "first", sort=False)


def targets(directory: Path) -> str:
    """Each target: what was measured, what the model predicts, and whether the former meets it."""
    predicted = {gpu: model.predictions(bandwidth) for gpu, bandwidth in COPY_BANDWIDTH.items()}
    lines = []
    for words, sense, bound, (file, *cases), candidate, figure, unit in TARGETS:
        path = directory / f"{file}.csv"
        rows = read(path) if path.exists() else pd.DataFrame(columns=Row._fields)
        found = [find(rows, case, candidate, figure) for case in cases]
        values = {row.case: row.value for row in found if row is not None}
        met = all(
            value <= bound if sense == "at most" else value >= bound for value in values.values()
        )
        line = {"target": words, "bound": f"{sense} {quantity(f'{bound:.7g}', unit)}"}
        line["measured"] = ", ".join(f"{case}: {shown(values[case], unit, 3)}" for case in values)
        for gpu, figures in predicted.items():
            line[f"predicted, {gpu}"] = ", ".join(
                f"{case}: {range_of(figures[case, candidate, figure], unit)}"
                for case in cases
                if (case, candidate, figure) in figures
            )
        line["met"] = ("yes" if met else "no") if len(values) == len(cases) else "not measured"
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def range_of(found: model.Range, unit: str) -> str:
    return " to ".join(dict.fromkeys(shown(value, unit, 3) for value in found))


def predictions(directory: Path) -> str:
    """What the predictions of the targets follow from."""
    return f"{model.assumptions()}\n\n{markdown(model.table())}"


def host(directory: Path) -> str:
    """The host's time of a call that is repeated, and of one that Python makes."""
    rows = read(directory / "host.csv")
    by_python = f"triton function{BY_PYTHON}{RECORDED}"
    found = [find(rows, "tiny", name, HOST_TIME) for name in (RECORDING, RECORDING_RAW, by_python)]
    call, operator, python = [shown(row.value, row.unit, 3) for row in found if row is not None]
    return (
        f"A call of `triton` takes {call} of the host's time, the raw operator alone {operator}; a "
        f"call that Python launches takes {python}. Measured without a GPU, so without the "
        f"driver's part, on {measured_on(rows.iloc[0])}."
    )


TABLES = {"benchmarks": benchmarks, "host": host, "targets": targets, "model": predictions}


def shown(value: float, unit: str, ratio_digits: int = 2) -> str:
    digits = ratio_digits if unit == "x" else 3
    # Counts are whole, and memory comes in pages of 4 KiB.
    whole = unit in ("", "KiB") or abs(value) >= 10**digits
    return quantity(f"{value:.0f}" if whole else f"{value:#.{digits}g}".rstrip("."), unit)


def quantity(number: str, unit: str) -> str:
    return number + unit if unit == "x" else f"{number} {unit}".rstrip()


def markdown(table: pd.DataFrame) -> str:
    align = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align, tablefmt="github")


if __name__ == "__main__":
    main()
