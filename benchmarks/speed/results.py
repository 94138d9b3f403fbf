"""The rows of a run, and the CSV that keeps them: one figure a row."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = r"torch|triton|numpy|timm|torchvision|kornia|gco-wrapper|opencv-.*"
RUN = ("date", "commit", "device", "driver", "versions")
"""The columns that say when and on what a figure was measured."""
Where = tuple[str, str, str]
"""The name of a case, its shape, and a candidate."""


class Row(NamedTuple):
    """A median with its spread over the rounds, or a count."""

    case: str
    shape: str
    candidate: str
    figure: str
    value: float | None
    """None where it is absent."""
    unit: str = ""
    p20: float | None = None
    p80: float | None = None
    rounds: int | None = None
    note: str = ""
    """How it was measured, or why it is absent."""


def row_of(where: Where, figure: str, values: pd.Series, unit: str, note: str = "") -> Row:
    """The median over the rounds in which ``values`` were measured."""
    values = values.dropna()
    if values.empty:
        return absent(where, figure, "no round was common to both")
    p20, p50, p80 = (float(f"{value:.6g}") for value in values.quantile([0.2, 0.5, 0.8]))
    return Row(*where, figure, p50, unit, p20, p80, len(values), note)


def absent(where: Where, figure: str, why: str) -> Row:
    return Row(*where, figure, None, note=why)


def write(
    path: Path, run: dict[str, str], rows: Iterable[Row], kept: pd.DataFrame | None = None
) -> None:
    """The rows of a run, and those ``kept`` of another whose figures it has not."""
    frame = pd.DataFrame([{**run, **row._asdict()} for row in rows]).astype({"rounds": "Int64"})
    if kept is not None:
        frame = pd.concat([kept, frame]).drop_duplicates(list(Row._fields[:4]), keep="last")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    frame.to_csv(unfinished, index=False, float_format="%.12g")
    unfinished.replace(path)  # a run that is stopped leaves no half of a file


def read(path: Path) -> pd.DataFrame:
    texts = dict.fromkeys([*RUN, "shape", "unit", "note"], str)
    return pd.read_csv(path, dtype={**texts, "rounds": "Int64"}).fillna(dict.fromkeys(texts, ""))


def find(rows: pd.DataFrame, case: str, candidate: str, figure: str) -> pd.Series | None:
    """The row of a figure that has a value."""
    wanted = (rows.case == case) & (rows.candidate == candidate) & (rows.figure == figure)
    found = rows[wanted & rows.value.notna()]
    return None if found.empty else found.iloc[0]


def summary(rows: pd.DataFrame) -> str:
    """What a terminal shows: the ratios but those along an axis, then what is absent and why."""
    keys = ["candidate", "figure"]
    ratios = rows[(rows.unit == "x") & ~rows.case.str.contains("=")]
    ratios = ratios.pivot_table("value", keys, "case", sort=False)
    ratios = ratios.map("{:.3g}".format, na_action="ignore").fillna("")
    missing = rows[rows.value.isna()].groupby([*keys, "note"], sort=False)
    cases = missing.case.agg(lambda names: ", ".join(dict.fromkeys(names)))
    tables = [table.reset_index() for table in (ratios, cases) if len(table)]
    return "\n\n".join(table.to_markdown(index=False, disable_numparse=True) for table in tables)


def describe_run(device: str) -> dict[str, str]:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = output_of(query).partition("\n")[0] if device == "cuda" else platform.release()
    installed = {each.name: each.version for each in metadata.distributions()}
    versions = {"python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    versions |= {name: installed[name] for name in installed if re.fullmatch(PACKAGES, name)}
    listed = "; ".join(f"{name} {version}" for name, version in versions.items())
    return dict(zip(RUN, (now, git_commit(), device_name(device), driver, listed)))


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads"


def measured_on(run: pd.Series) -> str:
    """Where and when a row was measured, in words."""
    torch_version = next(each for each in run.versions.split("; ") if each.startswith("torch "))
    return f"{run.device}, {torch_version}, {run.date[:10]}, commit {run.commit}"


def file_name(device: str) -> str:
    return "gpu" if device == "cuda" else device


def git_commit() -> str:
    """With a + where anything but results and the tables made of them has changed since."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    commit = output_of([*git, "rev-parse", "--short", "HEAD"])
    written = [f":!{path}" for path in ("benchmarks/results", "README.md", "docs")]
    changed = output_of([*git, "status", "--porcelain", "-uno", "--", ".", *written])
    return commit + "+" * bool(changed) if commit else "unknown"


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
