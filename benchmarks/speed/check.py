"""Has a change made us slower? Ratios of today against those that are committed.

    python -m benchmarks.check --calibrate 8    measures them in eight processes and keeps them
    python -m benchmarks.check                  measures once, and fails where one has fallen

Ratios, not times: both sides run on the same machine in the same minute, that of the calibration.
Above 1 ours is the faster. Processes differ from each other by more than rounds do, so a ratio of
one process is held against those of several. One has fallen when it is below the prediction limit
of their logarithms, as Student's t has it: with nothing changed a check of all ratios fails once in
a hundred times at most, if the logarithms are normal. A library that is no longer there is listed
and is no failure.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

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
from benchmarks.measure import DeviceClock, tqdm
from benchmarks.results import Row, find, row_of, significant

LEAST = "least accepted"
FALSE_ALARMS = 0.01
"""Of the checks of all ratios, with nothing changed: at most so many fail."""
PEERS = ("timm CutMix, batch (in place)",)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibrate", type=int, metavar="RUNS", help="keep the range of so many")
    parser.add_argument("--rounds", type=int, default=51, help="measured rounds (51)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where they are kept")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate == 1:
        parser.error("one run does not show how far runs differ")
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
        advice = "run with --calibrate 8 on this machine first"
        if not path.exists():
            sys.exit(f"{path} is missing: {advice}")
        run, kept = results.read(path)
        here = results.device_name(device)
        if run.device != here:
            sys.exit(f"{path} is of {run.device}, this is {here}: {advice}")
        fallen = verdicts(kept, [Row(*row) for row in fresh_process(rounds, options.quick)])
        sys.exit(1 if fallen else 0)


@torch.no_grad()
def measure(device: str, quick: bool, rounds: int) -> list[Row]:
    """The ratios of both headline cases, and what is absent."""
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
        rows += prepared.absent_rows({candidate.name for candidate in chosen})
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
    """Of each ratio that all runs have the median, and the least that a check accepts."""
    found = [
        (row, [find(run, row.case, row.candidate, row.figure) for run in runs]) for row in runs[0]
    ]
    common = [(row, [match.value for match in each]) for row, each in found if all(each)]
    rows = []
    for row, values in common:
        where = (row.case, row.shape, row.candidate)
        rows.append(row_of(*where, row.figure, np.array(values), "x"))
        least = least_accepted(values, FALSE_ALARMS / len(common))
        rows.append(Row(*where, f"{row.figure}, {LEAST}", significant(least), "x"))
    return rows


def least_accepted(values: list[float], chance: float) -> float:
    """What one more of them is below with that chance."""
    logarithms, n = np.log(values), len(values)
    margin = student.ppf(1 - chance, n - 1) * logarithms.std(ddof=1) * math.sqrt(1 + 1 / n)
    return math.exp(logarithms.mean() - margin)


def verdicts(kept: list[Row], today: list[Row]) -> list[Row]:
    """Prints each ratio beside what was kept; the kept ones that have fallen, or that ours no
    longer has."""
    fallen = []
    print(f"{'case':<10}{'candidate':<32}{'figure':<30}{'kept':>8}{'least':>8}{'today':>8}")
    missing = {row.candidate: row.note for row in today if row.value is None}
    for row in kept:
        least = find(kept, row.case, row.candidate, f"{row.figure}, {LEAST}")
        if least is None:
            continue
        now = find(today, row.case, row.candidate, row.figure)
        print(
            f"{row.case:<10}{row.candidate:<32}{row.figure:<30}{row.value:>8.2f}{least.value:>8.2f}",
            end="",
        )
        if now is None and row.candidate in missing:
            print(f"  absent: {missing[row.candidate]}")
        elif now is None or now.value < least.value:
            print("    gone" if now is None else f"{now.value:>8.2f}", " FALLEN")
            fallen.append(row)
        else:
            print(f"{now.value:>8.2f}")
    return fallen


if __name__ == "__main__":
    main()
