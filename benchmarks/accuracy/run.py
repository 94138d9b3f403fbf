"""Trains what an experiment needs, and adds a row to a CSV as each run ends.

    python -m benchmarks.accuracy.run recipes

Start it again after it was stopped: it goes on where it was. Several processes may share the CSV.
"""

import argparse
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy import experiments, queue
from benchmarks.accuracy.train import train

ROOT = Path(__file__).parents[2]
SETTINGS = {"fashion": experiments.FASHION, "clutter": experiments.CLUTTER}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=experiments.EXPERIMENTS)
    parser.add_argument("--data", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "accuracy.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [SETTINGS[name] for name in given.data]
    runs = list(experiments.runs_of(given.experiment, settings, given.seeds))
    done = queue.finished(given.results)
    left = sum(run.steps for run in runs if queue.key(run) not in done)
    machine = {"commit": commit(), "torch": torch.__version__, "device": device}
    with tqdm(total=left, unit="step", smoothing=0.05, mininterval=1) as bar:
        for run in queue.unfinished(runs, given.results):
            bar.set_description(f"{run.data}, {run.method}, seed {run.seed}")
            outcome = train(run, device, bar.update)
            ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
            row = {**run._asdict(), **outcome._asdict(), **machine, "ended": ended}
            queue.add(given.results, row)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
