"""Has a change made us slower? Today's ratios against those that are kept in results/.

    python -m benchmarks.speed.check --calibrate 8    measures in eight processes, keeps the ratios
    python -m benchmarks.speed.check                  measures once; fails where one has fallen

Ratios, not times: both sides run on one machine in the same minutes. Above 1, ours is faster. One
process differs from the next by more than its rounds do, so today's ratio is held against those of
several processes: it has fallen when it lies below the prediction limit of their logarithms, by
Student's t. If the logarithms are normal and nothing has changed, at most one check of all ratios
in a hundred fails. A peer that is no longer installed is listed and does not fail the check.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.speed import candidates, cases, results
from benchmarks.speed.compare import DEVICE_TIME, OVER_COPY, TIME, Prepared
from benchmarks.speed.measure import DeviceClock
from benchmarks.speed.results import Row, row_of

LEAST = ", least accepted"
FALSE_ALARMS = 0.01
"""At most this share of checks of all ratios fails though nothing has changed."""
PEER = "timm CutMix, batch (in place)"
KEY = ["case", "shape", "candidate", "figure"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibrate", type=int, metavar="RUNS", help="keep the ratios of so many")
    parser.add_argument("--rounds", type=int, default=51, help="measured rounds (51)")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where they are kept")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate == 1:
        parser.error("--calibrate: one run does not show how far runs differ")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here, run = results.device_name(device), results.describe_run(device)
    path = options.results / f"{results.file_name(device)}-check.csv"
    if options.once:
        results.write(options.once, run, measure(device, quick=False, rounds=options.rounds))
    elif options.calibrate:
        runs = [fresh_process(options.rounds) for _ in tqdm(range(options.calibrate))]
        results.write(path, run, calibration(runs))
        print(f"wrote {path}")
    elif not path.exists() or (kept := results.read(path)).device[0] != here:
        why = f"is of {kept.device[0]}, this is {here}" if path.exists() else "is missing"
        sys.exit(f"{path} {why}: run with --calibrate 8 on this machine first")
    else:
        table = verdicts(kept, fresh_process(options.rounds))
        print(table.to_markdown(index=False, floatfmt=".2f"))
        sys.exit(int((table.verdict == "FALLEN").any()))


@torch.no_grad()
def measure(device: str, quick: bool, rounds: int) -> list[Row]:
    """The ratios of both headline cases, and what is absent."""
    torch.manual_seed(0)
    np.random.seed(0)
    clock = DeviceClock() if device == "cuda" else None
    peers = {each.name for each in candidates.peers()} - {PEER}
    chosen = [each for each in candidates.everything(device) if each.name not in peers]
    chosen += candidates.compiled(device, quick)[:1]
    rows = []
    for case in cases.headline(device, quick):
        prepared = Prepared(case, chosen, device, clock)
        found = prepared.ratio_rows(prepared.samples(DEVICE_TIME if clock else TIME, rounds))
        # Lower is better over the copy; cloning differs most from run to run, as the system does.
        skipped = {OVER_COPY, "clone of the images"}
        rows += [row for row in found if skipped.isdisjoint(row)]
        rows += prepared.missing
    return rows


def fresh_process(rounds: int) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "once.csv"
        command = [sys.executable, "-m", "benchmarks.speed.check", "--once", str(path)]
        subprocess.run([*command, "--rounds", str(rounds)], check=True)
        return results.read(path)


def calibration(runs: list[pd.DataFrame]) -> list[Row]:
    """For each ratio that every run has: the median, and the least that a check accepts."""
    found = pd.concat(runs).dropna(subset="value").groupby(KEY, sort=False).value
    common = {key: values for key, values in found if len(values) == len(runs)}
    rows = []
    for (*where, figure), values in common.items():
        least = least_accepted(values, FALSE_ALARMS / len(common))
        rows.append(row_of(tuple(where), figure, values, "x"))
        rows.append(Row(*where, figure + LEAST, float(f"{least:.6g}"), "x"))
    return rows


def least_accepted(values: pd.Series, chance: float) -> float:
    """The value that another ratio of the same kind falls below with that chance."""
    logarithms, n = np.log(values), len(values)
    margin = student.ppf(1 - chance, n - 1) * np.std(logarithms, ddof=1) * math.sqrt(1 + 1 / n)
    return math.exp(np.mean(logarithms) - margin)


def verdicts(kept: pd.DataFrame, today: pd.DataFrame) -> pd.DataFrame:
    """Every kept ratio, the least accepted, today's, and whether it has fallen."""
    kept, present = kept.set_index(KEY).value, today.dropna(subset="value").set_index(KEY).value
    missing = today[today.value.isna()].set_index("candidate").note.to_dict()
    rows = []
    for *where, figure in (key for key in kept.index if not key[-1].endswith(LEAST)):
        key, candidate = (*where, figure), where[2]
        least, now = kept[(*where, figure + LEAST)], present.get(key, math.nan)
        verdict = "" if now >= least else "FALLEN"  # or gone: now is NaN
        if key not in present and candidate in missing:
            verdict = f"absent: {missing[candidate]}"
        rows.append((where[0], candidate, figure, kept[key], least, now, verdict))
    columns = ["case", "candidate", "figure", "kept", "least", "today", "verdict"]
    return pd.DataFrame(rows, columns=columns)


if __name__ == "__main__":
    main()
