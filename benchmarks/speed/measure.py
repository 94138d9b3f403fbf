"""The clocks and counters.

Whoever is compared runs in turn, round by round, in an order drawn anew for each, on data made
alike; a ratio is the median of the rounds' own ratios. So a slow spell of the machine, a warm cache
and a clock that ramps up meet all sides. What a call returns is freed outside of the timing.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import cuda
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from tqdm import tqdm
except ImportError:  # no bar, then

    def tqdm(rounds: Iterable[Any], **_: Any) -> Iterable[Any]:
        return rounds


Call = Callable[[], Any]
Samples = dict[str, np.ndarray]
"""Nanoseconds a call, by candidate and round; NaN in a round that a slow one sat out."""

ON_CUDA = cuda.is_available()  # asking takes longer than some of what is timed

SLOW_NS = 30e6
FEWEST_SAMPLES = 7


class Timed(NamedTuple):
    """What a clock is put around."""

    run: Call
    calls: int = 1
    """Of the candidate in one run."""
    busy: int = 1
    """On CUDA: how much is queued before it, so that the host is ahead of the device."""
    held: Any = None
    """What must live as long as it."""


def reason(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


def wall(timed: Timed) -> float:
    """From the call until its result exists."""
    synchronize()
    start = perf_counter_ns()
    for _ in range(timed.calls):
        kept = timed.run()
    synchronize()
    elapsed = perf_counter_ns() - start
    del kept
    return elapsed / timed.calls


def host(timed: Timed) -> float:
    """Until the call returns, whatever the device still has to do."""
    synchronize()
    start = perf_counter_ns()
    for _ in range(timed.calls):
        kept = timed.run()
    elapsed = perf_counter_ns() - start
    synchronize()
    del kept
    return elapsed / timed.calls


def synchronize() -> None:
    if ON_CUDA:
        cuda.synchronize()


def interleave(
    candidates: Mapping[str, Timed],
    rounds: int,
    clock: Callable[[Timed], float],
    title: str,
    absent: dict[str, str],
) -> Samples:
    """Times all of them in turn. One that raises is dropped, and ``absent`` says why."""
    strides: dict[str, int] = {}
    for name, timed in candidates.items():
        try:
            clock(timed)
            estimate = clock(timed)
        except Exception as error:
            absent[name] = reason(error)
            continue
        most = max(1, rounds // FEWEST_SAMPLES)
        strides[name] = max(1, min(most, math.ceil(estimate * timed.calls / SLOW_NS)))
    warmup = max(2, rounds // 10)
    samples = {name: np.full(warmup + rounds, np.nan) for name in strides}
    names = list(strides)
    # Drawn, so that nobody runs after the same neighbour always; seeded, so that runs are alike.
    orders = np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land on whichever candidate runs just then
    try:
        for i in tqdm(range(warmup + rounds), desc=title, leave=False):
            for name in [names[j] for j in orders.permutation(len(names))]:
                if name in absent or i % strides[name]:
                    continue
                try:
                    samples[name][i] = clock(candidates[name])
                except Exception as error:
                    absent[name] = reason(error)
    finally:
        if collecting:
            gc.enable()
    return {name: values[warmup:] for name, values in samples.items() if name not in absent}


def repeated(call: Call, at_least_ns: float) -> Timed:
    """So many calls that the clock's own cost does not show."""
    call()
    calls = 1
    while calls < 1000 and (spent := wall(Timed(call, calls)) * calls) < at_least_ns:
        calls = min(1000, math.ceil(calls * max(2.0, min(10.0, at_least_ns / spent))))
    return Timed(call, calls)


class DeviceClock:
    """Device time on CUDA, with a cold L2.

    A candidate becomes a graph of several calls, which take turns with sets of inputs that together
    exceed the L2 three times over, and a replay is timed by a pair of events. Where it cannot be
    captured, as many calls are made. Before either, so much is queued that the host is ahead and no
    gap of its own lies between the events: ``caught_up`` tells where that failed.
    """

    CALLS = 8

    def __init__(self, device: str = "cuda") -> None:
        properties = cuda.get_device_properties(0)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self.ballast = torch.ones(max(4 * self.l2_bytes, 1 << 28) // 4, device=device)
        self.start, self.end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self.fill(4)
        self.start.record()
        self.fill(8)
        self.end.record()
        cuda.synchronize()
        self.fill_ns = max(1e3, self.start.elapsed_time(self.end) * 1e6 / 8)

    def fill(self, times: int) -> None:
        for _ in range(times):
            self.ballast.neg_()
        # Read last: no line is left to be written back while something else is timed.
        self.ballast.sum()

    def sets(self, bytes_per_call: int) -> int:
        """How many sets of inputs make the L2 cold; see ``cold``."""
        return min(64, max(2, math.ceil(3 * self.l2_bytes / max(1, bytes_per_call)) + 1))

    def cold(self, bytes_per_call: int) -> bool:
        """Whether they do: so many sets of what is tiny are not made."""
        return self.sets(bytes_per_call) * bytes_per_call >= 3 * self.l2_bytes

    def prepare(self, calls: list[Call], capturable: bool) -> tuple[Timed, str]:
        """One candidate on every set of inputs; how it will be timed, and in words."""
        for call in calls:
            call()
        why = "it draws on the host, which a graph would freeze"
        if capturable:
            try:
                # A capture that fails leaves its own stream the current one.
                with cuda.stream(cuda.current_stream()):
                    return self._capture(calls)
            except Exception as error:
                cuda.synchronize()
                why = reason(error)
        rotation = cycle(calls)
        for count, words in ((self.CALLS, f"{self.CALLS} calls"), (1, "1 call")):
            several = Timed(lambda n=count: [next(rotation)() for _ in range(n)], count)
            spent = count * max(host(several) for _ in range(3))
            timed = several._replace(busy=min(256, math.ceil(2 * spent / self.fill_ns) + 1))
            self(timed)
            if not self.caught_up:
                return timed, f"{words} behind a full queue: {why}"
        return timed, f"{words}, for which the device waits at times: {why}"

    def _capture(self, calls: list[Call]) -> tuple[Timed, str]:
        sequence = calls * math.ceil(self.CALLS / len(calls))
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for call in calls:
                call()
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            # Kept, or every call would write where the one before it did.
            outputs = [call() for call in sequence]
        words = f"graph of {len(sequence)} calls on {len(calls)} sets of inputs"
        return Timed(graph.replay, len(sequence), busy=2, held=outputs), words

    def __call__(self, timed: Timed) -> float:
        self.fill(timed.busy)
        self.start.record()
        kept = timed.run()
        # Of more launches than the driver queues, a thousand or so, the host gets no further ahead.
        self.caught_up = self.start.query()
        self.end.record()
        cuda.synchronize()
        del kept
        return self.start.elapsed_time(self.end) * 1e6 / timed.calls


class CountOps(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operators(call: Call) -> int:
    call()
    with CountOps() as counted:
        call()
    return counted.count


def count_operators_profiled(call: Call) -> int:
    """The same of what is compiled, and under CountOps would run, and then stay, uncompiled."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    operators = [event for event in profiler.events() if "::" in event.name]
    # Not those that an operator calls in turn.
    return sum(event.cpu_parent not in operators for event in operators)


def count_launches(call: Call) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    call()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def count_syncs(call: Call) -> int:
    """How often one call waits for the device, as torch notices it."""
    call()
    cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def device_memory_peak(call: Call) -> int:
    """Bytes that a call holds at its peak beyond what it returns."""
    call()
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    kept = call()
    cuda.synchronize()
    # What is still held when the call is over are its outputs.
    outputs = cuda.memory_allocated() - before
    del kept
    return cuda.max_memory_allocated() - before - outputs
