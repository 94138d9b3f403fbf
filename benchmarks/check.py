"""Has a change made us slower? Ratios of today against those that are committed.

    python -m benchmarks.check --calibrate 5    measures them in five processes and keeps them
    python -m benchmarks.check                  measures once, and fails where one has fallen

Ratios, not times: both sides run on the same machine in the same minute. Above 1 ours is the
faster. One has fallen when it is lower than the lowest of the calibration by more than the whole
range of the calibration; processes differ from each other by more than rounds do.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import cases, results
from benchmarks.candidates import (
    EAGER,
    Candidate,
    compiled,
    copies,
    ours,
    own_backends,
    peers,
    stages,
)
from benchmarks.compare import Prepared, ratio_rows
from benchmarks.measure import DeviceClock
from benchmarks.results import Row, find, row_of

LOWEST, HIGHEST = "lowest of the runs", "highest of the runs"
PEERS = ("timm CutMix, batch (in place)",)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibrate", type=int, metavar="RUNS", help="keep the range of so many")
    parser.add_argument("--rounds", type=int, default=51, help="measured rounds (51)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where they are kept")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 5 if options.quick else options.rounds
    path = options.results / f"{results.file_name(device)}-check.csv"
    if options.once:
        if options.quick:
            torch.set_num_threads(1)
        print(json.dumps(measure(device, options.quick, rounds)))
    elif options.calibrate:
        runs = [fresh_process(rounds, options.quick) for _ in tqdm(range(options.calibrate))]
        results.write(path, results.describe_run(device), calibration(runs))
        print(f"wrote {path}")
    else:
        if not path.exists():
            sys.exit(f"{path} is missing: run with --calibrate 5 on this machine first")
        run, kept = results.read(path)
        here = results.device_name(device)
        if run.device != here:
            print(f"the ratios are of {run.device}; this is {here}")
        fallen = verdicts(kept, [Row(*row) for row in fresh_process(rounds, options.quick)])
        sys.exit(1 if fallen else 0)


@torch.no_grad()
def measure(device: str, quick: bool, rounds: int) -> list[Row]:
    """The ratios of both headline cases."""
    torch.manual_seed(0)
    np.random.seed(0)
    clock = DeviceClock() if device == "cuda" else None
    own: list[Candidate] = []
    for backend in own_backends(device):
        own += [*ours(backend), *stages(backend)]
    mixing = [peer for peer in peers() if peer.name in PEERS]
    chosen = [*own, EAGER, compiled(device, quick)[0], *copies(), *mixing]
    rows = []
    for case in cases.headline(device, quick):
        prepared = Prepared(case, chosen, device)
        if clock is None:
            samples = prepared.wall_times(rounds)
        else:
            samples, _ = prepared.device_times(clock, rounds)
        found = ratio_rows(case, samples, device, samples.keys())
        rows += [row for row in found if higher_is_better(row)]
    return rows


def higher_is_better(row: Row) -> bool:
    # Cloning measures how the system hands out memory, and differs most from run to run.
    return row.unit == "x" and "copy_" not in row.figure and not row.candidate.startswith("clone")


def fresh_process(rounds: int, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.check", "--once", "--rounds", str(rounds)]
    run = subprocess.run(
        [*command, *["--quick"] * quick], stdout=subprocess.PIPE, text=True, check=True
    )
    return [Row(*row) for row in json.loads(run.stdout.splitlines()[-1])]


def calibration(runs: list[list[Row]]) -> list[Row]:
    """Of each ratio the median over the runs, the lowest and the highest."""
    rows = []
    for row in runs[0]:
        found = [find(run, row.case, row.candidate, row.figure) for run in runs]
        values = np.array([match.value for match in found if match and match.value is not None])
        where = (row.case, row.shape, row.candidate)
        rows.append(row_of(*where, row.figure, values, "x"))
        for figure, value in ((LOWEST, values.min()), (HIGHEST, values.max())):
            rows.append(
                Row(*where, f"{row.figure}, {figure}", float(value), "x", rounds=len(values))
            )
    return rows


def verdicts(kept: list[Row], today: list[Row]) -> list[Row]:
    """Prints each ratio beside what was kept; the kept ones that have fallen or are gone."""
    fallen = []
    print(f"{'case':<10}{'candidate':<32}{'figure':<30}{'kept':>8}{'least':>8}{'today':>8}")
    for row in kept:
        low = find(kept, row.case, row.candidate, f"{row.figure}, {LOWEST}")
        high = find(kept, row.case, row.candidate, f"{row.figure}, {HIGHEST}")
        if low is None or high is None:
            continue
        least = least_accepted(low.value, high.value)
        now = find(today, row.case, row.candidate, row.figure)
        value = now.value if now else None
        bad = value is None or value < least
        shown = "gone" if value is None else f"{value:.2f}"
        print(
            f"{row.case:<10}{row.candidate:<32}{row.figure:<30}{row.value:>8.2f}{least:>8.2f}"
            f"{shown:>8}{'  FALLEN' if bad else ''}"
        )
        if bad:
            fallen.append(row)
    return fallen


def least_accepted(lowest: float, highest: float) -> float:
    # In proportion, as ratios are: 2 .. 4 accepts 1, and never a negative number.
    return lowest * (lowest / highest)


if __name__ == "__main__":
    main()
