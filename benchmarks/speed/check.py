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

from benchmarks.speed import cases, results
from benchmarks.speed.candidates import EAGER, compiled, copies, ours, own_backends, peers, stages
from benchmarks.speed.compare import DEVICE_TIME, TIME, Prepared
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
    path = options.results / f"{results.file_name(device)}-check.csv"
    if options.once:
        run = results.describe_run(device)
        results.write(options.once, run, measure(device, quick=False, rounds=options.rounds))
    elif options.calibrate:
        runs = [fresh_process(options.rounds) for _ in tqdm(range(options.calibrate))]
        results.write(path, results.describe_run(device), calibration(runs))
        print(f"wrote {path}")
    else:
        kept, here = results.read(path) if path.exists() else None, results.device_name(device)
        if kept is None or kept.device[0] != here:
            found = "is missing" if kept is None else f"is of {kept.device[0]}, this is {here}"
            sys.exit(f"{path} {found}: run with --calibrate 8 on this machine first")
        verdict = verdicts(kept, fresh_process(options.rounds))
        print(verdict.to_markdown(index=False, floatfmt=".2f"))
        sys.exit(int((verdict.verdict == "FALLEN").any()))


@torch.no_grad()
def measure(device: str, quick: bool, rounds: int) -> list[Row]:
    """The ratios of both headline cases, and what is absent."""
    torch.manual_seed(0)
    np.random.seed(0)
    clock = DeviceClock() if device == "cuda" else None
    own = [each for backend in own_backends(device) for each in (*ours(backend), *stages(backend))]
    peer = [each for each in peers() if each.name == PEER]
    # Cloning measures how the system hands out memory, and differs most from run to run.
    moved = [each for each in copies() if not each.name.startswith("clone")]
    rows = []
    for case in cases.headline(device, quick):
        chosen = [*own, EAGER, compiled(device, quick)[0], *moved, *peer]
        prepared = Prepared(case, chosen, device, clock)
        found = prepared.ratio_rows(prepared.samples(DEVICE_TIME if clock else TIME, rounds))
        rows += [row for row in found if "copy_" not in row.figure]  # of those less is better
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
        rows.append(row_of(tuple(where), figure, values, "x"))
        least = least_accepted(values, FALSE_ALARMS / len(common))
        rows.append(Row(*where, figure + LEAST, float(f"{least:.6g}"), "x"))
    return rows


def least_accepted(values: pd.Series, chance: float) -> float:
    """The value that another ratio of the same kind falls below with that chance."""
    logarithms, n = np.log(values), len(values)
    margin = student.ppf(1 - chance, n - 1) * np.std(logarithms, ddof=1) * math.sqrt(1 + 1 / n)
    return math.exp(np.mean(logarithms) - margin)


def verdicts(kept: pd.DataFrame, today: pd.DataFrame) -> pd.DataFrame:
    """Every kept ratio, the least accepted, today's, and whether it has fallen."""
    is_limit = kept.figure.str.endswith(LEAST)
    limits = kept[is_limit].assign(figure=kept.figure.str.removesuffix(LEAST))
    table = kept[~is_limit][[*KEY, "value"]].merge(limits[[*KEY, "value"]], on=KEY)
    present = today.dropna(subset="value")[[*KEY, "value"]]
    table = table.merge(present, on=KEY, how="left", suffixes=(None, "_today"))
    table.columns = [*KEY, "kept", "least", "today"]
    missing = today[today.value.isna()].set_index("candidate").note.to_dict()

    def verdict(row: pd.Series) -> str:
        if pd.isna(row.today) and row.candidate in missing:
            return f"absent: {missing[row.candidate]}"
        return "" if row.today >= row.least else "FALLEN"  # or gone

    return table.assign(verdict=table.apply(verdict, axis=1)).drop(columns="shape")


if __name__ == "__main__":
    main()
