"""Rows, and the CSV they are kept in: one file a machine, one row a figure."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

RESULTS = Path(__file__).with_name("results")
OVER_FLOOR = "time / the floor at the copy bandwidth"
OVER_LARGER_FLOOR = "time / that floor or two launches"
PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "kornia", "gco-wrapper")
OPENCV = ("opencv-contrib-python-headless", "opencv-python-headless", "opencv-python")


class Run(NamedTuple):
    """Where and on what a figure was taken."""

    date: str
    commit: str
    device: str
    driver: str
    versions: str


class Row(NamedTuple):
    """One figure: a median with its spread, or a count; no value where it is absent."""

    case: str
    shape: str
    candidate: str
    figure: str
    value: float | None
    unit: str
    p20: float | None = None
    p80: float | None = None
    rounds: int | None = None
    note: str = ""
    """How it was measured, or why it is absent."""


def row_of(
    case: str,
    shape: str,
    candidate: str,
    figure: str,
    values: np.ndarray,
    unit: str,
    note: str = "",
) -> Row:
    """The median of ``values``, leaving out the rounds that were sat out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return absent(case, shape, candidate, figure, "no round was common to both")
    p20, p50, p80 = (significant(value) for value in np.percentile(values, (20, 50, 80)))
    return Row(case, shape, candidate, figure, p50, unit, p20, p80, len(values), note)


def absent(case: str, shape: str, candidate: str, figure: str, why: str) -> Row:
    return Row(case, shape, candidate, figure, None, "", note=why)


def significant(value: float) -> float:
    return float(f"{value:.6g}")


def describe_run(device: str) -> Run:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Run(now, git_commit(), device_name(device), driver(device), versions())


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        model = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    except OSError:
        model = ""
    name = model.partition(":")[2].partition("\n")[0].strip() or platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def driver(device: str) -> str:
    """The GPU's driver, or the kernel."""
    if device != "cuda":
        return platform.release()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return output_of(query).partition("\n")[0] or "unknown"


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in (*PACKAGES, *OPENCV):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return "; ".join(found)


def git_commit() -> str:
    """The commit, with a + where what is measured has changed since, not only the results."""
    git = ["git", "--no-optional-locks", "-C", str(RESULTS.parents[1])]
    commit = output_of([*git, "rev-parse", "--short", "HEAD"])
    written = f":!{RESULTS.relative_to(RESULTS.parents[1])}"
    changed = output_of([*git, "status", "--porcelain", "-uno", "--", ".", written, ":!README.md"])
    return commit + "+" * bool(changed) if commit else "unknown"


def output_of(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip()


def file_name(device: str) -> str:
    """``cpu``, or the GPU's model: ``nvidia-h100-80gb-hbm3``."""
    if device != "cuda":
        return device
    words = "".join(c if c.isalnum() else " " for c in torch.cuda.get_device_name().lower())
    return "-".join(words.split())


def write(path: Path, run: Run, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Run._fields, *Row._fields))
        writer.writerows((*run, *("" if value is None else value for value in row)) for row in rows)
    unfinished.replace(path)  # a run that is stopped leaves no half of a file


def read(path: Path) -> tuple[Run, list[Row]]:
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    rows = [
        Row(
            *(record[name] for name in ("case", "shape", "candidate", "figure")),
            _number(record["value"]),
            record["unit"],
            _number(record["p20"]),
            _number(record["p80"]),
            int(record["rounds"]) if record["rounds"] else None,
            record["note"],
        )
        for record in records
    ]
    return Run(*(records[0][name] for name in Run._fields)), rows


def _number(text: str) -> float | None:
    return float(text) if text else None


def find(rows: Iterable[Row], case: str, candidate: str, figure: str) -> Row | None:
    """The row of a figure that has a value."""
    for row in rows:
        wanted = (row.case, row.candidate, row.figure) == (case, candidate, figure)
        if wanted and row.value is not None:
            return row
    return None
