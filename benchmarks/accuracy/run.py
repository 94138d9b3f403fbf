"""Trains what an experiment needs, and adds a row to a CSV as each run ends.

    python -m benchmarks.accuracy.run recipes
    python -m benchmarks.accuracy.run recipes --data clutter --methods cutmix "half alpha=0.5"
    python -m benchmarks.accuracy.run classification --size full --data cifar100 --root data

Start it again after it was stopped: runs that have a row are left out. Several processes may share
the CSV; each takes the next run that no other is making.
"""

import argparse
import csv
import fcntl
import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.experiments import EXPERIMENTS, SIZES, runs_of
from benchmarks.accuracy.train import Run, train
from benchmarks.speed.results import ROOT, device_name, git_commit

Key = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--data", nargs="+", help="default: fashion clutter")
    parser.add_argument("--network", help="instead of the one that the size has for the data")
    parser.add_argument("--methods", nargs="+", help="instead of the experiment's, written alike")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0, help="tune on seeds you do not report")
    parser.add_argument("--budget", choices=("cost", "steps"), default="cost", help="what is equal")
    parser.add_argument("--root", type=Path, help="the folder of the data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "accuracy.csv")
    given = parser.parse_args()
    sizes = SIZES[given.size]
    names = given.data or ["fashion", "clutter"]
    if not set(names) <= set(sizes):
        parser.error(f"--data: --size {given.size} has {', '.join(sizes)}; got {' '.join(names)}")
    settings = [sizes[name] for name in names]
    if given.network:
        settings = [setting._replace(network=given.network) for setting in settings]
    torch.set_num_threads(given.threads)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = list(runs_of(given.experiment, settings, seeds, given.budget, given.methods))
    make_all(runs, given.results, given.root)


def make_all(runs: list[Run], path: Path, root: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = {"commit": git_commit(), "torch": torch.__version__, "device": device_name(device)}
    done = finished(path)
    left = sum(run.steps for run in runs if key(run) not in done)
    with tqdm(total=left, unit="step", smoothing=0.05, mininterval=1) as bar:
        for run in unfinished(runs, path):
            bar.set_description(f"{run.data}, {run.method}, seed {run.seed}")
            outcome = train(run, root, device, bar.update)
            ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
            add(path, {**run._asdict(), **outcome._asdict(), **machine, "ended": ended})


def key(run: Run) -> Key:
    """As the CSV spells it."""
    return tuple(str(value) for value in run)


def finished(path: Path) -> set[Key]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in Run._fields) for row in csv.DictReader(file)}


def unfinished(runs: Iterable[Run], path: Path) -> Iterator[Run]:
    """The runs that have no row, and that no other process is making, one by one."""
    locks = path.with_suffix(".locks")
    locks.mkdir(parents=True, exist_ok=True)
    for run in runs:
        name = hashlib.sha256(repr(key(run)).encode()).hexdigest()[:16]
        with (locks / name).open("w") as lock:  # which is free again when its process has died
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if key(run) not in finished(path):
                yield run


def add(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
