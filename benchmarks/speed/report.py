"""A run as markdown: ratios first, then times, counts, and what is absent."""

from collections.abc import Callable

from benchmarks.results import Row, Run

RATIOS = "Ratios: the candidate's time over that of what stands behind the slash"


def tables(run: Run, rows: list[Row]) -> str:
    """Every row of the run."""
    parts = [
        f"# {run.device}",
        f"{run.date}, commit {run.commit}, driver {run.driver}.\n{run.versions}.",
        section(RATIOS, rows, lambda row: row.unit == "x"),
        section("Times", rows, lambda row: row.unit in ("ms", "us")),
        section("Rates and shares", rows, lambda row: row.unit in ("GB/s", "%")),
        section("Counts", rows, lambda row: row.unit in ("", "B", "KiB") and row.value is not None),
        absences(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(run: Run, rows: list[Row]) -> str:
    """What a terminal shows: the ratios, and what is absent."""
    ratios = section(RATIOS, rows, lambda row: row.unit == "x")
    return "\n\n".join(part for part in (run.device, ratios, absences(rows)) if part)


def section(title: str, rows: list[Row], belongs: Callable[[Row], bool]) -> str:
    chosen = [row for row in rows if row.value is not None and belongs(row)]
    if not chosen:
        return ""
    lines = ["| case | candidate | figure | median | p20 .. p80 |", "|---|---|---|---:|---:|"]
    lines += [
        f"| {row.case} | {row.candidate} | {row.figure} | {value(row)} | {spread(row)} |"
        for row in chosen
    ]
    return f"## {title}\n\n" + "\n".join(lines)


def value(row: Row) -> str:
    return f"{figure(row.value)} {row.unit}".strip() if row.value is not None else ""


def spread(row: Row) -> str:
    if row.p20 is None or row.p80 is None or row.rounds == 1:
        return ""
    return f"{figure(row.p20)} .. {figure(row.p80)}"


def figure(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def absences(rows: list[Row]) -> str:
    """One line a candidate, figure and reason, with the cases it is absent from."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.value is None:
            key = (row.candidate, row.figure, row.note.replace("|", "/"))
            names = cases.setdefault(key, [])
            if row.case not in names:
                names.append(row.case)
    if not cases:
        return ""
    lines = ["| candidate | figure | why | cases |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {', '.join(where)} |" for key, where in cases.items()]
    return "## Absent\n\n" + "\n".join(lines)
