"""Writes the tables of figures into README.md and docs/performance.md.

    python -m benchmarks.speed.readme            rewrites them from benchmarks/results/
    python -m benchmarks.speed.readme --check    fails where that would change them

A table stands between two lines: <!-- benchmarks --> and <!-- /benchmarks -->, or <!-- targets -->
and <!-- /targets -->. The prose holds no figures.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.speed.candidates import TARGETS as WITH_TARGETS
from benchmarks.speed.compare import DEVICE_TIME, N_CALLS, OVER_COPY, TIME
from benchmarks.speed.host import HOST_TIME, STUBBED
from benchmarks.speed.memory import LATER_PEAK
from benchmarks.speed.results import RESULTS, ROOT, find, read

FILES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BACKENDS = ("triton", "cuda", "cpp")
NO_MIXUPS = "copy_|clone|sum of|two launches"


class Target(NamedTuple):
    """What the project set out to reach."""

    words: str
    file: str
    cases: tuple[str, ...]
    candidate: str
    figure: str
    sense: str
    """``at most`` or ``at least``."""
    bound: float


CPU, X4 = ("cpu", ("cifar", "imagenet")), ("cpu", ("augmentations=4",))
PEAK_BOUND = 1024 + 8 * 64 * 7 * 7 / 1024  # 1 MiB and 8 bytes per cell
STUB = f"triton function{STUBBED}"
TARGETS = [
    Target(
        "`cpp` with `out=` over copying the same bytes",
        *CPU,
        "cpp, out=",
        OVER_COPY,
        "at most",
        1.3,
    ),
    Target("eager reference over `cpp`", *CPU, "eager reference", "time / cpp", "at least", 8),
    Target(
        "compiled reference over `cpp`", *CPU, "compiled reference", "time / cpp", "at least", 3
    ),
    Target(
        "`cpp`, one call with four augmentations over four calls",
        *X4,
        "cpp",
        N_CALLS,
        "at most",
        0.7,
    ),
    Target(
        "`cpp`, peak memory beyond the outputs",
        "cpu",
        ("imagenet",),
        "cpp",
        LATER_PEAK,
        "at most",
        PEAK_BOUND,
    ),
    Target(
        "`triton`, host time of a call, launcher stubbed",
        "host",
        ("tiny",),
        STUB,
        HOST_TIME,
        "at most",
        15,
    ),
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
    for name, table in (("benchmarks", benchmarks), ("targets", targets)):
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->\n")
        if end:
            text = f"{head}{begin}{table(directory)}\n{end}{tail}"
    return text


def benchmarks(directory: Path) -> str:
    """A table for each machine: the speed-ups, then the times."""
    machines = {path: read(path) for path in sorted(directory.glob("*.csv"))}
    tables = [
        machine(rows, path) for path, rows in machines.items() if "floor" in {*rows.candidate}
    ]
    return "\n\n".join(tables)


def machine(rows: pd.DataFrame, path: Path) -> str:
    cases = rows[rows.candidate == "floor"].case
    rows = rows[rows.case.isin(cases) & rows.value.notna()]
    own = next(backend for backend in BACKENDS if backend in {*rows.candidate})
    time = DEVICE_TIME if DEVICE_TIME in {*rows.figure} else TIME
    mixes = rows.figure.isin([f"time / {own}", f"time / {own}{WITH_TARGETS}"])
    ratios = rows[mixes & ~rows.candidate.str.contains(NO_MIXUPS)]
    times = rows[(rows.figure == time) & rows.candidate.isin([own, f"{own}, out="])]
    between = pd.DataFrame(index=["**Time of a call (lower is better)**"])
    table = pd.concat([by_case(ratios), between, by_case(times)]).fillna("")
    table = table.rename(
        index={own: f"`{own}`", f"{own}, out=": f"`{own}` with `out=`"},
        columns={case: f"{case}: {shape}" for case, shape in zip(rows.case, rows["shape"])},
    )
    table.index.name = "Speed-up over other libraries (higher is better)"
    run, rounds = rows.iloc[0], rows.rounds.max()
    torch = next(each for each in run.versions.split("; ") if each.startswith("torch "))
    note = " Adapters are our versions of papers that no library provides."
    return (
        f"`{own}` on {run.device}, {torch}, {run.date[:10]}, commit {run.commit}: medians of up to "
        f"{rounds} interleaved rounds ([all figures](benchmarks/results/{path.name})).{note}\n\n"
        + markdown(table.reset_index())
    )


def by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each candidate, a column for each case."""
    rows = rows.assign(value=[shown(value, unit) for value, unit in zip(rows.value, rows.unit)])
    return rows.pivot_table("value", "candidate", "case", "first", sort=False)


def targets(directory: Path) -> str:
    """Each target, what was measured, and whether that meets it."""
    lines = []
    for target in TARGETS:
        rows = read(directory / f"{target.file}.csv")
        found = [find(rows, case, target.candidate, target.figure) for case in target.cases]
        values = {row.case: row.value for row in found if row is not None}
        unit = next((row.unit for row in found if row is not None), "")
        sign = 1 if target.sense == "at most" else -1
        met = all(sign * value <= sign * target.bound for value in values.values())
        line = {
            "target": target.words,
            "bound": f"{target.sense} {quantity(f'{target.bound:.5g}', unit)}",
            "measured": ", ".join(f"{case}: {shown(values[case], unit, 3)}" for case in values),
            "met": ("yes" if met else "no") if len(values) == len(found) else "not measured",
        }
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def shown(value: float, unit: str, ratio_digits: int = 2) -> str:
    digits = ratio_digits if unit == "x" else 3
    whole = unit == "KiB" or abs(value) >= 10**digits  # memory comes in pages of 4 KiB
    return quantity(f"{value:.0f}" if whole else f"{value:#.{digits}g}".rstrip("."), unit)


def quantity(number: str, unit: str) -> str:
    return number + unit if unit == "x" else f"{number} {unit}"


def markdown(table: pd.DataFrame) -> str:
    right = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=right, tablefmt="github")


if __name__ == "__main__":
    main()
