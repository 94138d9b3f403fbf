"""The queue of runs, and the CSV that a row is added to as a run ends.

Several processes may share it. A run that was killed is made anew; one that has its row is not.
"""

import csv
import fcntl
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.accuracy.train import Run

Key = tuple[str, ...]


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
        with (locks / name).open("w") as lock:  # the lock of a process that dies is free again
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if key(run) not in finished(path):
                yield run


def add(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
