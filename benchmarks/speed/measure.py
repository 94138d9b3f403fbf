"""The clocks and counters.

Candidates take turns: every round runs each of them once, in a new random order, on data of the
same kind. A ratio is the median of the rounds' own ratios. So a slow spell of the machine, a cold
cache or a clock that ramps up meets every candidate alike. Results are freed after the clock stops.
"""

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import cycle
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import cuda
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

Run = Callable[[], Any]
ON_CUDA = cuda.is_available()  # asked once: asking takes longer than some of the calls
SLOW_NS, FEWEST_SAMPLES = 30e6, 7
"""Slower runs sit rounds out, so that a hundred rounds take three seconds; but not more than that
leaves so many samples."""
L2_TIMES = 3
"""The inputs together exceed the L2 this often, so that none of them is still there."""


class Timed(NamedTuple):
    """What a clock times."""

    run: Run
    calls: int = 1
    """Calls of the candidate per run."""
    busy: int = 1
    """On CUDA: how often the ballast is passed over before, so that the host gets ahead."""
    held: Any = None
    """What must stay alive while it runs."""


def reason(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


def synchronize() -> None:
    if ON_CUDA:
        cuda.synchronize()


def wall(timed: Timed, wait: bool = True) -> float:
    """Nanoseconds per call until the result exists; or, without ``wait``, until the call returns,
    whatever is left for the device to do."""
    synchronize()
    start = perf_counter_ns()
    for _ in range(timed.calls):
        kept = timed.run()
    if wait:
        synchronize()
    elapsed = perf_counter_ns() - start
    synchronize()
    del kept
    return elapsed / timed.calls


def host(timed: Timed) -> float:
    return wall(timed, wait=False)


def interleave(
    candidates: Mapping[str, Timed], rounds: int, clock: Callable[[Timed], float], title: str
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Nanoseconds per call, a column for each; NaN where one sat a round out. And why those that
    raised are missing."""
    strides, failed = {}, {}
    for name, timed in candidates.items():
        try:
            clock(timed)
            slowness = math.ceil(clock(timed) * timed.calls / SLOW_NS)
            strides[name] = max(1, min(slowness, rounds // FEWEST_SAMPLES))
        except Exception as error:
            failed[name] = reason(error)
    warmup, names = max(2, rounds // 10), list(strides)
    samples = np.full((warmup + rounds, len(names)), np.nan)
    # Random, so that nobody always follows the same neighbour; seeded, so that runs are alike.
    orders = np.random.default_rng(0)
    gc.disable()  # a collection would be charged to whichever candidate runs just then
    try:
        for i in tqdm(range(warmup + rounds), desc=title, leave=False):
            for column in orders.permutation(len(names)):
                name = names[column]
                if name not in failed and i % strides[name] == 0:
                    try:
                        samples[i, column] = clock(candidates[name])
                    except Exception as error:
                        failed[name] = reason(error)
    finally:
        gc.enable()
    return pd.DataFrame(samples[warmup:], columns=names).drop(
        columns=strides & failed.keys()
    ), failed


def repeated(run: Run, at_least_ns: float = 2e6) -> Timed:
    """Enough calls, at most 1024, to hide the clock's own cost."""
    run()
    timed = Timed(run)
    while timed.calls < 1024 and wall(timed) * timed.calls < at_least_ns:
        timed = Timed(run, 2 * timed.calls)
    return timed


class DeviceClock:
    """Device time on CUDA, with a cold L2.

    A candidate becomes a CUDA graph of several calls, and two events time its replay. The calls use
    several sets of inputs in turn, which together exceed the L2. What cannot be captured is timed
    call by call. Before either the ballast keeps the device busy, so that the host gets ahead and
    its own time does not lie between the events; ``caught_up`` says where the device overtook it.
    """

    CALLS = 8
    """At least so many in a graph, to hide what the events cost."""

    def __init__(self, device: str = "cuda") -> None:
        properties = cuda.get_device_properties(0)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self.ballast = torch.ones(max(4 * self.l2_bytes, 1 << 28) // 4, device=device)
        self.start, self.end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self.fill(4)
        self.fill_ns = max(1e3, self(Timed(lambda: self.fill(8), 8)))

    def fill(self, times: int) -> None:
        for _ in range(times):
            self.ballast.neg_()
        # Read last, so that no dirty line is written back while a candidate is timed.
        self.ballast.sum()

    def sets(self, bytes_per_call: int) -> int:
        """How many sets of inputs make the L2 cold: at most 64, see ``cold``."""
        return min(64, max(2, math.ceil(L2_TIMES * self.l2_bytes / max(1, bytes_per_call)) + 1))

    def cold(self, bytes_per_call: int) -> bool:
        """Whether they do; tiny inputs would need too many sets."""
        return self.sets(bytes_per_call) * bytes_per_call >= L2_TIMES * self.l2_bytes

    def prepare(self, calls: list[Run], capturable: bool) -> tuple[Timed, str]:
        """One candidate, a call for each set of inputs: what to time, and how that is done."""
        for call in calls:
            call()
        why = "it draws on the host, and a graph would repeat the draw"
        if capturable:
            try:
                # A capture that fails leaves its own stream current.
                with cuda.stream(cuda.current_stream()):
                    return self._capture(calls)
            except Exception as error:
                cuda.synchronize()
                why = reason(error)
        rotation = cycle(calls)
        one = Timed(lambda: next(rotation)())
        spent = max(host(one) for _ in range(3))
        one = one._replace(busy=min(256, math.ceil(2 * spent / self.fill_ns) + 1))
        self(one)
        waits = "at times the device waits for the host; " * self.caught_up
        return one, f"call by call: {waits}{why}"

    def _capture(self, calls: list[Run]) -> tuple[Timed, str]:
        sequence = calls * math.ceil(self.CALLS / len(calls))
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for call in calls:
                call()
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            # Kept alive: otherwise every call would reuse the output of the one before.
            outputs = [call() for call in sequence]
        words = f"graph of {len(sequence)} calls on {len(calls)} sets of inputs"
        return Timed(graph.replay, len(sequence), busy=2, held=outputs), words

    def __call__(self, timed: Timed) -> float:
        self.fill(timed.busy)
        self.start.record()
        kept = timed.run()
        # The driver queues about a thousand launches; beyond that the host cannot get ahead.
        self.caught_up = self.start.query()
        self.end.record()
        cuda.synchronize()
        del kept
        return self.start.elapsed_time(self.end) * 1e6 / timed.calls


class CountOps(TorchDispatchMode):
    """Counts operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operators(run: Run) -> int:
    run()
    with CountOps() as counted:
        run()
    return counted.count


def count_operators_profiled(run: Run) -> int:
    """The same of a compiled function, which CountOps would make run uncompiled."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    operators = [event for event in profiler.events() if "::" in event.name]
    # Without those that another operator calls.
    return sum(event.cpu_parent not in operators for event in operators)


def count_launches(run: Run) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    run()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def count_syncs(run: Run) -> int:
    """How often one call waits for the device, as far as torch notices."""
    run()
    cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def device_memory_peak(run: Run) -> int:
    """Bytes that a call holds at its peak beyond what it returns."""
    run()
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    kept = run()
    cuda.synchronize()
    outputs = cuda.memory_allocated() - before  # all that is still held
    del kept
    return cuda.max_memory_allocated() - before - outputs


DEVICE_COUNTERS = {
    "launches per call": count_launches,
    "host syncs per call": count_syncs,
    "peak memory beyond the outputs": device_memory_peak,
}
