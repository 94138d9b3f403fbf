"""Our backends beside the reference, torch.compile, copies and other mixups, in one run.

    python -m benchmarks.speed.compare                   all, into benchmarks/results/
    python -m benchmarks.speed.compare --part deciding   first times and ratios, sizes, backends,
    python -m benchmarks.speed.compare --part rest       then the rest, added to the same CSV
    python -m benchmarks.speed.compare --quick           does it run? Tiny shapes

Writes <machine>.csv, one figure a row, and plots; on CUDA where there is a device, else on the CPU.
The CSV is rewritten after every section, and the slowest section, compiling the reference, comes
last: `python -m benchmarks.speed.plots` draws what a run that was stopped has left. What cannot run
is a row without a value that says why.
"""

import argparse
import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.speed import cases, measure, results
from benchmarks.speed.candidates import (
    COMPILED,
    COPY,
    EAGER,
    IN_TURN,
    STANDARDIZING,
    Candidate,
    Run,
    compiled,
    copies,
    everything,
    in_turn,
    ours,
    own_backends,
    standardizing,
    standardizing_first,
    two_launches,
)
from benchmarks.speed.cases import Case, floor_bytes, make_data
from benchmarks.speed.host import HOST_TIME, OPERATORS, host_times
from benchmarks.speed.measure import DeviceClock, Timed, interleave, reason
from benchmarks.speed.memory import peak_memory
from benchmarks.speed.results import Row, absent, row_of
from benchmarks.speed.step import measure_steps
from sg_kernels.backends import DEVICES

TIME, DEVICE_TIME = "time", "device time"
OVER_COPY, OVER_STANDARDIZING = f"time / {COPY}", f"time / {STANDARDIZING}"
OVER_FLOOR = "time / the floor at the copy bandwidth"
OVER_LARGER_FLOOR = "time / that floor or two launches"
N_CALLS = "time / n calls of one"
WAITS = "it waits for the device"
LOAD = "load average at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="measured rounds (101)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--part", choices=PARTS, help="a part alone; the rest keeps the CSV's rows")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--results", type=Path, help="where to write")
    options = parser.parse_args()
    quick_results = results.RESULTS.parents[1] / "build" / "quick"
    directory = options.results or (quick_results if options.quick else results.RESULTS)
    if options.threads or options.quick:
        torch.set_num_threads(options.threads or 1)
    if options.quick:
        from tests import emulation  # of a GPU: its backend, too

        emulation.load_if_asked()
    torch.manual_seed(0)
    np.random.seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = directory / f"{results.file_name(device)}.csv"
    load = round(os.getloadavg()[0], 2)
    run, rows = results.describe_run(device), [Row("machine", "", "all", LOAD, load)]
    kept = results.read(path) if options.part == "rest" and path.exists() else None
    print(f"{LOAD}: {load} (near 0, or the times are too long)")
    clock = DeviceClock() if device == "cuda" else None
    rounds = 2 if options.quick else options.rounds
    for name in [options.part] if options.part else PARTS:
        for more in PARTS[name](device, clock, options.quick, rounds):
            rows += more
            results.write(path, run, rows, kept)
    try:
        from benchmarks.speed import plots

        plots.draw(path)
    except Exception as error:  # matplotlib is missing, or there is nothing to draw
        print(f"no plots: {reason(error)}")
    print(f"{tables(results.read(path))}\n\nwrote {path} and its plots")


def deciding(
    device: str, clock: DeviceClock | None, quick: bool, rounds: int
) -> Iterator[list[Row]]:
    """How long calls take, and which backend, tile and kind of launch is the fastest where."""
    backends = own_backends(device)
    # Before anything is profiled, which can slow down every later launch.
    yield from guarded("tiny", host_times((*backends, "reference"), device, rounds))
    for case in cases.headline(device, quick):
        yield from guarded(case.name, headline(case, everything(device), device, clock, rounds))
    plain = [ours(backend)[0] for backend in backends]
    case = cases.standardized(device, quick)
    also = [standardizing(), *map(standardizing_first, backends)]
    yield from guarded(case.name, grow([case], [*plain, *also], device, clock, rounds))
    case = cases.several(device, quick)
    yield from guarded(case.name, grow([case], plain, device, clock, rounds))
    given = [each for backend in backends for each in ours(backend)[:2]]
    growing = [EAGER, copies()[0], *given, *in_turn(device)]
    few = min(rounds, max(5, rounds // 4))
    for axis, points in cases.growth(quick).items():
        yield from guarded(axis, grow(points, growing, device, clock, few))


def rest(device: str, clock: DeviceClock | None, quick: bool, rounds: int) -> Iterator[list[Row]]:
    """What a step and a call cost otherwise, and the compiled reference."""
    headlines = cases.headline(device, quick)
    if clock is None:
        yield from guarded("peak memory", peak_memory(quick))
    steps = 3 if quick else max(15, rounds // 8)
    yield from guarded("training step", measure_steps(device, quick, steps), grad=True)
    for case in headlines:
        yield from guarded(case.name, count(case, everything(device), device, clock))
    # Last, as compiling takes minutes; among all the others again, so that caches are as before.
    slow = compiled(device, quick)
    for case in headlines:
        again = headline(case, [*everything(device), *slow], device, clock, rounds)
        rows = ([row for row in more if row.candidate.startswith(COMPILED)] for more in again)
        yield from guarded(case.name, rows)
        yield from guarded(case.name, count(case, slow, device, clock))


PARTS = {"deciding": deciding, "rest": rest}
"""Of a run, in this order. Each yields rows; a section that fails becomes a row that says so."""


def guarded(section: str, measured: Iterable[list[Row]], grad: bool = False) -> Iterator[list[Row]]:
    """What a section yields; where it fails, a row that says so."""
    try:
        with torch.set_grad_enabled(grad):
            yield from measured
    except Exception as error:
        print(f"{section}: not measured, {reason(error)}")
        yield [absent((section, "", "all"), "all", reason(error))]
    gc.collect()
    with contextlib.suppress(RuntimeError):  # of a device that a kernel has brought down
        torch.cuda.empty_cache()


class Prepared:
    """The candidates of a case that run here; ``missing`` are rows that say why others do not."""

    def __init__(
        self, case: Case, candidates: Iterable[Candidate], device: str, clock: DeviceClock | None
    ) -> None:
        self.case, self.device, self.clock = case, device, clock
        self.missing: list[Row] = []
        self.notes: dict[str, str] = {}
        """How each was timed on the device."""
        self.runs: dict[str, Run] = {}
        self.candidates: list[Candidate] = []
        data = make_data(case, device)
        for candidate in candidates:
            try:
                run = candidate.build(case, data)
                run()
                measure.synchronize()  # raises here what would else hit a later candidate
            except Exception as error:
                self.missing.append(absent(case.where(candidate.name), TIME, reason(error)))
                continue
            self.runs[candidate.name] = run
            self.candidates.append(candidate)

    def samples(self, figure: str, rounds: int) -> pd.DataFrame:
        failed: dict[str, str] = {}
        if figure == DEVICE_TIME and self.clock:
            timed, clock = self.on_device(self.clock, failed), self.clock
        else:
            timed = {name: Timed(run) for name, run in self.runs.items()}
            clock = measure.host if figure == HOST_TIME else measure.wall
        samples, late = interleave(timed, rounds, clock, f"{self.case.name}, {figure}")
        reasons = {**failed, **late}.items()
        self.missing += [absent(self.case.where(name), figure, why) for name, why in reasons]
        return samples

    def on_device(self, clock: DeviceClock, failed: dict[str, str]) -> dict[str, Timed]:
        floor, timed = floor_bytes(self.case), {}
        warm = "" if clock.cold(floor) else ", whose inputs the L2 may hold"
        sets = [make_data(self.case, self.device, True) for _ in range(clock.sets(floor))]
        for name, build, capturable in ((c.name, c.build, c.capturable) for c in self.candidates):
            try:
                runs = [build(self.case, data) for data in sets]
                if measure.count_syncs(runs[0]):
                    failed[name] = WAITS
                    continue
                timed[name], how = clock.prepare(runs, capturable)
                self.notes[name] = how + warm
            except Exception as error:
                failed[name] = reason(error)
        return timed

    def time_rows(self, figure: str, samples: pd.DataFrame) -> list[Row]:
        scale, unit = (1e3, "us") if figure == HOST_TIME else (1e6, "ms")
        notes = self.notes if figure == DEVICE_TIME else {}
        return [
            row_of(self.case.where(name), figure, values / scale, unit, notes.get(name, ""))
            for name, values in samples.items()
        ]

    def ratio_rows(
        self, samples: pd.DataFrame, but: Iterable[str] = (), note: str = ""
    ) -> list[Row]:
        """Others' times over ours: above 1, ours is faster. For the copy, and what grafting may
        include, the inverse too."""
        rows = []
        for name, against in ((each.name, each.against) for each in self.candidates):
            for mine in (b + kind for b in own_backends(self.device) for kind in against):
                absent = name in but or name not in samples or mine not in samples
                if absent or name == mine:
                    continue
                ratio = samples[name] / samples[mine]
                rows.append(row_of(self.case.where(name), f"time / {mine}", ratio, "x", note))
                if name in (COPY, STANDARDIZING):
                    where = self.case.where(mine)
                    rows.append(row_of(where, f"time / {name}", 1 / ratio, "x", note))
        return rows

    def floor_rows(self, clock: DeviceClock, samples: pd.DataFrame) -> list[Row]:
        """Device times over what the floor's bytes take at the bandwidth of a copy, and over what
        two launches take where that is more."""
        bandwidth = copy_bandwidth(clock)
        rows = [row_of(self.case.where("a large copy_"), "bandwidth", bandwidth, "GB/s")]
        floor = floor_bytes(self.case) / bandwidth.median()
        launches = samples.get(two_launches().name, pd.Series(np.nan, samples.index))
        for name in (each.name for each in self.candidates if each.whole and each.name in samples):
            where, times = self.case.where(name), samples[name]
            rows.append(row_of(where, OVER_FLOOR, times / floor, "x"))
            rows.append(row_of(where, OVER_LARGER_FLOOR, times / launches.clip(lower=floor), "x"))
        return rows


def headline(
    case: Case, candidates: list[Candidate], device: str, clock: DeviceClock | None, rounds: int
) -> Iterator[list[Row]]:
    """Times and ratios of one case."""
    prepared = Prepared(case, candidates, device, clock)
    yield [Row(*case.where("floor"), "bytes", floor_bytes(case), "B")]
    wall = prepared.samples(TIME, rounds)
    yield prepared.time_rows(TIME, wall)
    if clock is None:
        yield prepared.ratio_rows(wall)
    else:
        host = prepared.samples(HOST_TIME, min(rounds, 10))
        times = prepared.samples(DEVICE_TIME, rounds)
        yield prepared.time_rows(HOST_TIME, host) + prepared.time_rows(DEVICE_TIME, times)
        yield prepared.floor_rows(clock, times) + prepared.ratio_rows(times)
        yield prepared.ratio_rows(wall, but=times, note=f"wall times: {WAITS}")
    yield prepared.missing


def tables(rows: pd.DataFrame) -> str:
    """What a terminal shows: the ratios, what is absent, and the fastest backend of each case."""
    return f"{results.summary(rows)}\n\n{fastest(rows)}"


def fastest(rows: pd.DataFrame) -> str:
    """Which backend should be the default at which size: on the device alone, and as a call that
    the host makes. Between backends whose rounds overlap there is nothing to choose."""
    rows = rows[rows.figure.isin([DEVICE_TIME, TIME]) & rows.value.notna()]
    names = [name for name in (*DEVICES, IN_TURN) if name in {*rows.candidate}]
    lines = []
    for (case, shape, figure), found in rows.groupby(["case", "shape", "figure"], sort=False):
        found = found[found.candidate.isin(names)].set_index("candidate").sort_values("value")
        backends = found.drop(IN_TURN, errors="ignore")
        if len(backends) < 2:
            continue
        best = backends[backends.p20 <= backends.p80.iloc[0]].index
        times = {name: f"{value:.4g}" for name, value in found.value.items()}
        where = {"case": case, "shape": shape, "in ms": figure}
        lines.append({**where, **times, "fastest": " or ".join(best)})
    columns = ["case", "shape", "in ms", *names, "fastest"]
    table = pd.DataFrame(lines, columns=columns).fillna("")
    return table.to_markdown(index=False, disable_numparse=True)


def copy_bandwidth(clock: DeviceClock) -> pd.Series:
    """Bytes read and written per nanosecond, by a copy that no cache holds."""
    source = torch.rand_like(clock.ballast)
    # Several copies, to hide what the events cost.
    copies = [partial(clock.ballast.copy_, source)] * 8
    copy = Timed(lambda: [copy() for copy in copies], len(copies), busy=2)
    times = pd.Series([clock(copy) for _ in range(15)][5:])
    clock.ballast.fill_(1.0)
    return 2 * source.numel() * source.element_size() / times


def count(
    case: Case, candidates: list[Candidate], device: str, clock: DeviceClock | None
) -> Iterator[list[Row]]:
    """What does not depend on a clock."""
    prepared = Prepared(case, candidates, device, clock)
    for name, profiled in ((each.name, each.compiled) for each in prepared.candidates):
        operators = measure.count_operators_profiled if profiled else measure.count_operators
        counters = {OPERATORS: operators, **(measure.DEVICE_COUNTERS if clock else {})}
        for figure, counter in counters.items():
            try:
                unit = "B" if "memory" in figure else ""
                yield [Row(*case.where(name), figure, counter(prepared.runs[name]), unit)]
            except Exception as error:
                yield [absent(case.where(name), figure, reason(error))]


def grow(
    points: list[Case],
    candidates: list[Candidate],
    device: str,
    clock: DeviceClock | None,
    rounds: int,
) -> Iterator[list[Row]]:
    """Times and ratios of the cases along one axis; of several augmentations also over as many
    calls."""
    figure = DEVICE_TIME if clock else TIME
    for case in points:
        several = [c for c in candidates if case.augmentations > 1 and c.name != COPY]
        repeated = {c.name: n_calls_of_one(c) for c in several}
        prepared = Prepared(case, [*candidates, *repeated.values()], device, clock)
        samples = prepared.samples(figure, rounds)
        for name, one in repeated.items():
            if name in samples and one.name in samples:
                ratio = samples[name] / samples.pop(one.name)
                yield [row_of(case.where(name), N_CALLS, ratio, "x")]
        yield prepared.time_rows(figure, samples) + prepared.ratio_rows(samples)
        if clock:
            yield prepared.time_rows(TIME, prepared.samples(TIME, rounds))
        yield prepared.missing


def n_calls_of_one(candidate: Candidate) -> Candidate:
    """Instead of one call with n augmentations."""

    def build(case: Case, data: cases.Data) -> Run:
        one = candidate.build(case._replace(augmentations=1), data)

        def run() -> None:
            for _ in range(case.augmentations):
                one()

        return run

    return candidate._replace(name=f"{candidate.name}, n calls of one", build=build)


if __name__ == "__main__":
    main()
