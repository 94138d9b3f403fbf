"""Keeps the figures of README.md to those in benchmarks/results/.

    python -m benchmarks.readme            rewrites them
    python -m benchmarks.readme --check    fails where rewriting would change them

A table stands between two markers, which name the CSV it is made from:

    <!-- benchmarks: cpu -->
    <!-- /benchmarks -->

That of the targets stands between <!-- targets --> and <!-- /targets -->. A figure in the prose
stands between two others, which name its row: file, case, candidate, figure. It keeps the decimals
that it is written with:

    <!-- cpu | tiny | cpp function | host time -->33 us<!-- / -->

Any other time, ratio, rate or share is an error, and in the Performance section any size too;
elsewhere sizes are limits that the code has.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.candidates import COPY, copies, two_launches
from benchmarks.memory import FIGURE as MEMORY
from benchmarks.results import OVER_FLOOR, Row, Run, find

README = results.RESULTS.parents[1] / "README.md"
TABLE = re.compile(r"(<!-- benchmarks: (\S+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
TARGET_TABLE = re.compile(r"(<!-- targets -->\n).*?(<!-- /targets -->)", re.DOTALL)
FIGURE = re.compile(
    r"(<!-- ([^|>]+) \| ([^|>]+) \| ([^|>]+) \| ([^|>]+) -->)([^<]*)(<!-- / -->)", re.DOTALL
)
UNBACKED = re.compile(r"-?\d[\d.,]*\s?(?:x|ns|us|µs|ms|s|%|GB/s|TB/s)(?!\w)")
SIZE = re.compile(r"-?\d[\d.,]*\s?[KMG]i?B(?![\w/])")
BACKENDS = ("triton", "cuda", "cpp")
FLOORS = (COPY, OVER_FLOOR.removeprefix("time / "))
MOVES = [candidate.name for candidate in (*copies(), two_launches())]
NO_ROW = "no such row"
TIMES = {"device time": "device", "time": "", "host time": "host"}


class Target(NamedTuple):
    """What the project set out to reach."""

    words: str
    sense: str
    """``at most`` or ``at least``."""
    bound: float
    rows: str
    """As a marker names them: file, cases, candidate, figure."""

    def line(self, directory: Path) -> str:
        file, cases, candidate, figure = self.rows.split(" | ")
        _, rows = results.read(directory / f"{file}.csv")
        found = [find(rows, case, candidate, figure) for case in cases.split(" and ")]
        if None in found:
            return f"| {self.words} | {NO_ROW} |"
        if self.sense == "at most":
            met = all(row.value <= self.bound for row in found)
        else:
            met = all(row.value >= self.bound for row in found)
        bound = f"{self.sense} {with_unit(f'{self.bound:g}', found[0].unit)}"
        measured = ", ".join(f"{row.case}: {shown(row, 3)}" for row in found)
        return f"| {self.words} | {bound} | {measured} | {'met' if met else 'short'} |"


BOTH = "cpu | cifar and imagenet"
CELLS = 64 * 7 * 7  # of the case imagenet
TARGETS = [
    Target(
        "`cpp` with `out=` / copy_ of the same bytes",
        "at most",
        1.3,
        f"{BOTH} | cpp, out= | time / {COPY}",
    ),
    Target("eager reference / `cpp`", "at least", 8, f"{BOTH} | eager reference | time / cpp"),
    Target(
        "compiled reference / `cpp`", "at least", 3, f"{BOTH} | compiled reference | time / cpp"
    ),
    Target(
        "`cpp`, one call with four augmentations / four calls",
        "at most",
        0.7,
        "cpu | augmentations=4 | cpp | time / n calls of one",
    ),
    Target(
        "`cpp`, peak memory beyond the outputs: 1 MiB and 8 bytes a cell",
        "at most",
        1024 + 8 * CELLS / 1024,
        f"cpu | imagenet | cpp | {MEMORY}, later calls",
    ),
    Target(
        "`triton`, host time of a call, its launcher stubbed",
        "at most",
        15,
        "host | tiny | triton function, launcher stubbed | host time",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    options = parser.parse_args()
    text = options.readme.read_text()
    if options.check:
        found = problems(text, options.results)
        print("\n".join(found))
        sys.exit(1 if found else 0)
    options.readme.write_text(rewritten(text, options.results))
    print("\n".join(unbacked(text)))


def problems(text: str, directory: Path) -> list[str]:
    """What in the text differs from the results, or is backed by none."""
    current, wanted = text.splitlines(), rewritten(text, directory).splitlines()
    stale = [f"stale: {line}" for line in current if line not in wanted]
    missing = [f"missing: {line}" for line in wanted if line not in current]
    return stale + missing + unbacked(text)


def rewritten(text: str, directory: Path) -> str:
    def block(match: re.Match[str]) -> str:
        return match[1] + table(*results.read(directory / f"{match[2]}.csv"), match[2]) + match[3]

    def targets(match: re.Match[str]) -> str:
        lines = [target.line(directory) for target in TARGETS]
        header = ["| target | | measured | |", "|---|---|---|---|"]
        return match[1] + "\n".join([*header, *lines, ""]) + match[2]

    def figure(match: re.Match[str]) -> str:
        _, rows = results.read(directory / f"{match[2]}.csv")
        row = find(rows, *match.group(3, 4, 5))
        if row is None or row.value is None:
            return f"{match[1]}{NO_ROW}{match[7]}"
        decimals = re.search(r"\.(\d+)", match[6])
        number = f"{row.value:.{len(decimals[1]) if decimals else 0}f}"
        return match[1] + with_unit(number, row.unit) + match[7]

    return FIGURE.sub(figure, TARGET_TABLE.sub(targets, TABLE.sub(block, text)))


def unbacked(text: str) -> list[str]:
    """Figures that no marker ties to a row, and markers that name none."""
    prose = FIGURE.sub("", TARGET_TABLE.sub("", TABLE.sub("", text)))
    performance = prose.partition("\n## Performance\n")[2].partition("\n## ")[0]
    untied = [*UNBACKED.finditer(prose), *SIZE.finditer(performance)]
    return [
        *(f"no row is named for: {match[0]}" for match in untied),
        *(f"{NO_ROW}: {line}" for line in text.splitlines() if NO_ROW in line),
    ]


def table(run: Run, rows: list[Row], name: str) -> str:
    """The figures of the two headline cases: ratios first, then times."""
    cases = list(
        dict.fromkeys(r.case for r in rows if (r.candidate, r.figure) == ("floor", "bytes"))
    )
    shapes = {row.case: row.shape for row in rows}
    chosen = list(dict.fromkeys(key for row in rows if (key := line_of(row)) is not None))
    lines = []
    for candidate, figure in sorted(chosen, key=lambda key: rank(key[1])):
        found = [find(rows, case, candidate, figure) for case in cases]
        if any(found):
            cells = [shown(row) if row else "absent" for row in found]
            lines.append(f"| {label(candidate, figure)} | {' | '.join(cells)} |")
    rounds = max((row.rounds or 0 for row in rows), default=0)
    torch = next((v for v in run.versions.split("; ") if v.startswith("torch ")), "torch")
    note = " An adapter is ours, after the paper: no library computes it."
    adapters = note if any("adapter" in line for line in lines) else ""
    header = [f"{case}: {shapes[case]}" for case in cases]
    return "\n".join(
        [
            f"{run.device}, {torch}, {run.date[:10]}, commit {run.commit}: medians of up to "
            f"{rounds} interleaved rounds ([all figures](benchmarks/results/{name}.md)).{adapters}",
            "",
            f"| | {' | '.join(header)} |",
            f"|---|{'---:|' * len(cases)}",
            *lines,
            "",
        ]
    )


def line_of(row: Row) -> tuple[str, str] | None:
    """Whether, and as which line, the table shows a row."""
    own = row.candidate.split(",")[0]
    whole = row.candidate in (own, f"{own}, out=") and own in BACKENDS
    behind_slash = row.figure.removeprefix("time / ")
    if whole and (row.figure in TIMES or behind_slash in FLOORS):
        return row.candidate, row.figure
    mixes = behind_slash in BACKENDS or behind_slash.endswith(", targets")
    if mixes and row.candidate not in MOVES:
        return row.candidate, row.figure
    return None


def rank(figure: str) -> int:
    """What others take comes first, then what the floor takes, then times."""
    if figure in TIMES:
        return 2 + list(TIMES).index(figure)
    return int(figure.removeprefix("time / ") in FLOORS)


def label(candidate: str, figure: str) -> str:
    if figure in TIMES:
        return " ".join(filter(None, (code(candidate), TIMES[figure])))
    other = figure.removeprefix("time / ")
    return f"{code(candidate)} / {code(other)}"


def code(candidate: str) -> str:
    """A backend as code, what is said about it as words."""
    name, _, given = candidate.partition(", ")
    if name not in BACKENDS:
        return candidate
    return f"`{name}`" + {"": "", "out=": " with `out=`", "targets": " with targets"}[given]


def shown(row: Row, ratio_digits: int = 2) -> str:
    if row.unit == "KiB":  # whole pages
        return with_unit(f"{row.value:.0f}", row.unit)
    digits = ratio_digits if row.unit == "x" else 3
    value = float(f"{row.value:.{digits}g}")
    decimals = max(0, digits - 1 - exponent(value))
    return with_unit(f"{value:.{decimals}f}", row.unit)


def exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def with_unit(number: str, unit: str) -> str:
    return number + unit if unit == "x" else f"{number} {unit}".strip()


if __name__ == "__main__":
    main()
