"""Our backends beside the reference, torch.compile, copies and other mixups, in one run.

    python -m benchmarks.compare            everything, into benchmarks/results/
    python -m benchmarks.compare --quick    a smoke run on tiny shapes, whose numbers mean nothing

Writes <machine>.csv, one row a figure; <machine>.md, the same as tables; and plots. All rows so far
are written whenever there are more; what takes longest, compiling the reference, comes last, and of
a run that was stopped `python -m benchmarks.plots` draws what there is. On CUDA where there is a
device, else on the CPU. What cannot run is a row without a value that says why.
"""

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sg_kernels
from benchmarks import cases, measure, report, results
from benchmarks.candidates import (
    COPY,
    EAGER,
    Call,
    Candidate,
    compiled,
    copies,
    everything,
    ours,
    own_backends,
    peers,
    two_launches,
)
from benchmarks.cases import Case, floor_bytes, make_data
from benchmarks.measure import DeviceClock, Samples, Timed, interleave, reason
from benchmarks.memory import peak_memory
from benchmarks.results import OVER_FLOOR, OVER_LARGER_FLOOR, Row, absent, row_of
from benchmarks.step import measure_steps
from sg_kernels import ops

AT_LEAST_NS = 2e6
TIME, DEVICE_TIME, HOST_TIME = "time", "device time", "host time"
WAITS = "it waits for the device"
N_CALLS = "time / n calls of one"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="measured rounds (101)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--results", type=Path, help="where to write")
    options = parser.parse_args()
    quick_results = results.RESULTS.parents[1] / "build" / "quick"
    directory = options.results or (quick_results if options.quick else results.RESULTS)
    if options.threads or options.quick:
        torch.set_num_threads(options.threads or 1)
    torch.manual_seed(0)
    np.random.seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = directory / f"{results.file_name(device)}.csv"
    run, rows = results.describe_run(device), [load_average()]
    print(f"load average at the start: {rows[0].value} (idle, if the times are to count)")
    clock = DeviceClock() if device == "cuda" else None
    rounds = 5 if options.quick else options.rounds
    for more in measure_all(device, clock, options.quick, rounds):
        rows += more
        results.write(path, run, rows)
        path.with_suffix(".md").write_text(report.tables(run, rows))
    try:
        from benchmarks import plots

        plots.draw(rows, path)
    except Exception as error:  # matplotlib is missing, or there is nothing to draw
        print(f"no plots: {reason(error)}")
    print(report.summary(run, rows))
    print(f"\nwrote {path} and what is made of it")


def load_average() -> Row:
    """What else ran: above 0 by much, and the times are too long."""
    return Row("machine", "", "all", "load average at the start", round(os.getloadavg()[0], 2), "")


def measure_all(
    device: str, clock: DeviceClock | None, quick: bool, rounds: int
) -> Iterator[list[Row]]:
    """Every figure; a section that fails is a row that says so, and the others go on."""
    headlines = cases.headline(device, quick)
    # Before anything is profiled, which can make every later launch slower.
    yield from guarded("tiny", host_times(device, rounds))
    for case in headlines:
        yield from guarded(case.name, headline(case, everything(device), device, clock, rounds))
    if clock is None:
        yield from guarded("peak memory", peak_memory(quick))
    few = max(5, rounds // 4)
    for axis, points in cases.growth(device, quick).items():
        yield from guarded(axis, grow(points, device, clock, few))
    steps = 3 if quick else max(15, rounds // 8)
    yield from guarded("training step", measure_steps(device, quick, steps), grad=True)
    for case in headlines:
        yield from guarded(case.name, count(case, everything(device), device, clock))
    slow = compiled(device, quick)
    names = {candidate.name for candidate in slow}
    for case in headlines:
        # Among all the others again, which leave the caches as they did.
        chosen = [*everything(device), *slow]
        yield from guarded(case.name, headline(case, chosen, device, clock, rounds, names))
        yield from guarded(case.name, count(case, slow, device, clock))


def guarded(section: str, measured: Iterable[list[Row]], grad: bool = False) -> Iterator[list[Row]]:
    """What it yields, up to where it fails and a row that says so."""
    try:
        with torch.set_grad_enabled(grad):
            yield from measured
    except Exception as error:
        print(f"{section}: not measured, {reason(error)}")
        yield [absent(section, "", "all", "all", reason(error))]
    gc.collect()
    with contextlib.suppress(RuntimeError):  # of a device that a kernel has brought down
        torch.cuda.empty_cache()


class Prepared:
    """The candidates of a case that run here, and why the others do not."""

    def __init__(self, case: Case, candidates: Iterable[Candidate], device: str) -> None:
        self.case, self.device = case, device
        self.absent: dict[str, str] = {}
        self.absent_on_device: dict[str, str] = {}
        self.candidates: list[Candidate] = []
        self.calls: dict[str, Call] = {}
        data = make_data(case, device)
        for candidate in candidates:
            try:
                call = candidate.build(case, data)
                call()
                measure.synchronize()  # a kernel's failure shows here, not at some later candidate
            except Exception as error:
                self.absent[candidate.name] = reason(error)
                continue
            self.calls[candidate.name] = call
            self.candidates.append(candidate)

    def wall_times(self, rounds: int) -> Samples:
        timed = {name: Timed(call) for name, call in self.calls.items()}
        return interleave(timed, rounds, measure.wall, self.case.name, self.absent)

    def device_times(self, clock: DeviceClock, rounds: int) -> tuple[Samples, dict[str, str]]:
        """And how each was timed."""
        floor = floor_bytes(self.case)
        warm = "" if clock.cold(floor) else ", which the L2 may hold"
        inputs = [
            make_data(self.case, self.device, seed_on_device=True) for _ in range(clock.sets(floor))
        ]
        timed, notes = {}, {}
        for candidate in self.candidates:
            name = candidate.name
            if name in self.absent:
                continue
            try:
                calls = [candidate.build(self.case, data) for data in inputs]
                if measure.count_syncs(calls[0]):
                    self.absent_on_device[name] = WAITS
                    continue
                timed[name], how = clock.prepare(calls, candidate.capturable)
                notes[name] = how + warm
            except Exception as error:
                self.absent_on_device[name] = reason(error)
        title = f"{self.case.name}, device"
        return interleave(timed, rounds, clock, title, self.absent_on_device), notes

    def absent_rows(self, shown: Collection[str]) -> list[Row]:
        return [
            absent(self.case.name, self.case.shape, name, figure, why)
            for figure, names in ((TIME, self.absent), (DEVICE_TIME, self.absent_on_device))
            for name, why in names.items()
            if name in shown
        ]


def headline(
    case: Case,
    candidates: list[Candidate],
    device: str,
    clock: DeviceClock | None,
    rounds: int,
    shown: Collection[str] = (),
) -> Iterator[list[Row]]:
    """Ratios, times and rates on one case, of the candidates ``shown``: of all, by default."""
    shown = shown or {candidate.name for candidate in candidates}
    prepared = Prepared(case, candidates, device)
    candidates = [candidate for candidate in prepared.candidates if candidate.name in shown]
    host = prepared.wall_times(rounds)
    yield [Row(case.name, case.shape, "floor", "bytes", floor_bytes(case), "B")]
    yield time_rows(case, candidates, host, TIME, {})
    if clock is None:
        yield ratio_rows(case, host, device, shown)
    else:
        waits = {name: Timed(prepared.calls[name]) for name in host}
        enqueued = interleave(waits, max(5, rounds // 4), measure.host, "host", prepared.absent)
        yield [
            row_of(case.name, case.shape, name, HOST_TIME, values / 1e3, "us")
            for name, values in enqueued.items()
            if name in shown
        ]
        decisive, notes = prepared.device_times(clock, rounds)
        yield time_rows(case, candidates, decisive, DEVICE_TIME, notes)
        yield over_the_floor(case, candidates, decisive, copy_bandwidth(clock))
        yield ratio_rows(case, decisive, device, shown)
        yield ratio_rows(case, host, device, shown - decisive.keys(), f"wall times: {WAITS}")
    yield prepared.absent_rows(shown)


def time_rows(
    case: Case,
    candidates: list[Candidate],
    samples: Samples,
    figure: str,
    notes: dict[str, str],
) -> list[Row]:
    """Times, and where the floor of the bytes applies, the rate they amount to."""
    rows = []
    for candidate in candidates:
        if candidate.name not in samples:
            continue
        values, where = samples[candidate.name], (case.name, case.shape, candidate.name)
        rows.append(row_of(*where, figure, values / 1e6, "ms", notes.get(candidate.name, "")))
        if candidate.traffic is not None:
            rate = candidate.traffic(case) / values
            rows.append(row_of(*where, "floor bytes / " + figure, rate, "GB/s"))
    return rows


def denominators(device: str) -> dict[str, list[str]]:
    """Whose time is divided by which of ours: those that do the same work."""
    theirs: dict[str, list[str]] = {}
    for backend in own_backends(device):
        fresh, out, targets = f"{backend}", f"{backend}, out=", f"{backend}, targets"
        for name in (EAGER.name, "compiled reference", "compiled reference, max-autotune"):
            theirs.setdefault(name, []).append(fresh)
        for candidate in peers():
            theirs.setdefault(candidate.name, []).append(targets)
        theirs.setdefault("clone of the images", []).append(fresh)
        theirs.setdefault(COPY, []).extend([out, fresh])
        map_given, saliency = f"{backend}, out=, map given", f"{backend} channel_saliency"
        theirs.setdefault("copy_ of the images", []).append(map_given)
        theirs.setdefault("sum of the features", []).append(saliency)
        theirs.setdefault("two launches of one element", []).append(fresh)
    return theirs


def ratio_rows(
    case: Case, samples: Samples, device: str, shown: Collection[str], note: str = ""
) -> list[Row]:
    """Above 1 where ours is the faster. Of the copy it is the share of the copy's bandwidth."""
    rows = []
    for name, own in denominators(device).items():
        for mine in own:
            if name not in shown or name not in samples or mine not in samples:
                continue
            ratio = samples[name] / samples[mine]
            rows.append(row_of(case.name, case.shape, name, f"time / {mine}", ratio, "x", note))
            if name == COPY:
                where = (case.name, case.shape, mine)
                rows.append(row_of(*where, "time / copy_ of the same bytes", 1 / ratio, "x"))
                rows.append(row_of(*where, "share of the copy bandwidth", 100 * ratio, "%"))
    return rows


def copy_bandwidth(clock: DeviceClock) -> np.ndarray:
    """Bytes a nanosecond of a copy that no cache helps, read and written."""
    source = torch.rand_like(clock.ballast)
    # Several, so that what the events take does not count.
    copies = [partial(clock.ballast.copy_, source)] * 8
    copy = Timed(lambda: [copy() for copy in copies], len(copies), busy=2)
    times = np.array([clock(copy) for _ in range(15)][5:])
    clock.ballast.fill_(1.0)
    return 2 * source.numel() * source.element_size() / times


def over_the_floor(
    case: Case, candidates: list[Candidate], samples: Samples, bandwidth: np.ndarray
) -> list[Row]:
    """Times over what the floor's bytes take at the copy's bandwidth, and over what two launches
    take where that is more."""
    rows = [row_of(case.name, case.shape, "a large copy_", "bandwidth", bandwidth, "GB/s")]
    floor = floor_bytes(case) / float(np.median(bandwidth))
    launches = samples.get(two_launches().name, np.array(np.nan))
    for candidate in candidates:
        if candidate.traffic is floor_bytes and candidate.name in samples:
            where, times = (case.name, case.shape, candidate.name), samples[candidate.name]
            rows.append(row_of(*where, OVER_FLOOR, times / floor, "x"))
            rows.append(row_of(*where, OVER_LARGER_FLOOR, times / np.maximum(launches, floor), "x"))
    return rows


def count(
    case: Case, candidates: list[Candidate], device: str, clock: DeviceClock | None
) -> Iterator[list[Row]]:
    """What does not depend on a clock."""
    prepared = Prepared(case, candidates, device)
    on_device: list[tuple[str, str, Callable[[Call], int]]] = []
    if clock is not None:
        on_device = [
            ("launches per call", "", measure.count_launches),
            ("host syncs per call", "", measure.count_syncs),
            ("peak memory beyond the outputs", "B", measure.device_memory_peak),
        ]
    for candidate in prepared.candidates:
        rows = []
        operators = (
            measure.count_operators_profiled if candidate.compiled else measure.count_operators
        )
        for figure, unit, counted in [("operators per call", "", operators), *on_device]:
            where = (case.name, case.shape, candidate.name, figure)
            try:
                rows.append(Row(*where, counted(prepared.calls[candidate.name]), unit))
            except Exception as error:
                rows.append(absent(*where, reason(error)))
        yield rows


def host_times(device: str, rounds: int) -> Iterator[list[Row]]:
    """Calls on images so small that only the way to the kernels and back is left."""
    case = cases.TINY
    data = make_data(case, device)
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for backend in (*own_backends(device), "reference"):
        try:
            # What the function hands to its operator, less the checks before it.
            operator = ops.overload("saliency_graft", backend)
            arguments = operator_arguments(case, data, device)
            module = sg_kernels.SaliencyGraft(backend=backend).to(device)
            function = partial(
                sg_kernels.saliency_graft, data.images, data.features, backend=backend
            )
            function()
        except Exception as error:
            missing[f"{backend} function"] = reason(error)
            continue
        calls[f"{backend} function"] = function
        calls[f"{backend} raw operator"] = partial(operator, *arguments)
        calls[f"{backend} module"] = partial(module, data.images, features=data.features)
    timed = {}
    for name, call in calls.items():
        try:
            timed[name] = measure.repeated(call, AT_LEAST_NS)
        except Exception as error:
            missing[name] = reason(error)
    samples = interleave(timed, rounds, measure.host, "host time", missing)
    rows = [
        row_of(case.name, case.shape, name, HOST_TIME, values / 1e3, "us")
        for name, values in samples.items()
    ]
    rows += [absent(case.name, case.shape, name, HOST_TIME, why) for name, why in missing.items()]
    for name, call in calls.items():
        operators = measure.count_operators(call)
        rows.append(Row(case.name, case.shape, name, "operators per call", operators, ""))
    yield rows


def operator_arguments(case: Case, data: cases.Data, device: str) -> tuple[object, ...]:
    quantiles = sg_kernels.rng.beta_quantiles(1.0).to(device)
    (h, w), seed = case.map_size, ops.draw_seed().to(device)
    draws = (None, None, None, seed, None, 0, quantiles, 0.0)
    selection = ((h, w), 0.2, "max", 1 / (h * w), None)
    return (data.images, data.features, *draws, *selection, "l1", 1.0, 1, False, 0, 0.0)


def grow(
    points: list[tuple[int, Case]], device: str, clock: DeviceClock | None, rounds: int
) -> Iterator[list[Row]]:
    """Ours, the reference and the floor along one axis."""
    figure = TIME if clock is None else DEVICE_TIME
    own = [candidate for backend in own_backends(device) for candidate in ours(backend)[:2]]
    for _, case in points:
        repeated = {c.name: n_calls_of_one(c) for c in (*own, EAGER) if case.augmentations > 1}
        prepared = Prepared(case, [*own, EAGER, copies()[0], *repeated.values()], device)
        if clock is None:
            samples, notes = prepared.wall_times(rounds), {}
        else:
            samples, notes = prepared.device_times(clock, rounds)
        once = [candidate for candidate in prepared.candidates if candidate.traffic is not None]
        rows = time_rows(case, once, samples, figure, notes)
        for name, several in repeated.items():
            if name in samples and several.name in samples:
                ratio = samples[name] / samples[several.name]
                rows.append(row_of(case.name, case.shape, name, N_CALLS, ratio, "x"))
        yield rows + prepared.absent_rows([*prepared.absent, *prepared.absent_on_device])


def n_calls_of_one(candidate: Candidate) -> Candidate:
    """Instead of a call with n augmentations."""

    def build(case: Case, data: cases.Data) -> Call:
        one = candidate.build(case._replace(augmentations=1), data)

        def call() -> None:
            for _ in range(case.augmentations):
                one()

        return call

    return Candidate(f"{candidate.name}, n calls of one", build, capturable=candidate.capturable)


if __name__ == "__main__":
    main()
