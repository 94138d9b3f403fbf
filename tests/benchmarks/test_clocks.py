"""The clocks and counters of the benchmarks measure what they say."""

import contextlib
import os
import subprocess
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sg_kernels
from benchmarks import rivals
from benchmarks.speed import candidates, cases, compare, measure, results, step
from benchmarks.speed.candidates import COPY, EAGER, Candidate
from benchmarks.speed.cases import Case
from benchmarks.speed.measure import Timed

CASE = Case("x", (4, 3, 8, 8), (4, 16, 4, 4))


@pytest.mark.parametrize("augmentations", [1, 2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_floor_is_what_its_copy_moves(augmentations, channels_last):
    class Moved(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is torch.ops.aten.copy_.default
            self.total += 2 * args[1].numel() * args[1].itemsize
            return func(*args, **(kwargs or {}))

    case = CASE._replace(augmentations=augmentations, channels_last=channels_last)
    floor = 4 * (4 * 16 * 4 * 4 + (1 + augmentations) * 4 * 3 * 8 * 8)
    assert cases.floor_bytes(case) == floor
    copy = candidates.copies()[0].build(case, cases.make_data(case, "cpu"))
    with Moved() as moved:
        copy()
    assert moved.total == floor


def test_the_floor_counts_each_dtype_and_leaves_out_prefix_tokens():
    case = CASE._replace(**cases.UINT8)
    assert cases.floor_bytes(case) == 2 * 4 * 16 * 4 * 4 + 2 * 4 * 3 * 8 * 8
    assert case.shape == "4x3x8x8 uint8, 4x16x4x4 bfloat16"
    case = Case("", (2, 3, 8, 8), (2, 5, 7), token_grid=(2, 2), prefix_tokens=1)
    assert cases.features_bytes(case) == 4 * 2 * 4 * 7


def test_images_that_come_out_standardised_are_written_in_their_new_dtype():
    case = CASE._replace(**cases.UINT8, standardized=torch.float32)
    assert cases.floor_bytes(case) == 2 * 4 * 16 * 4 * 4 + (1 + 4) * 4 * 3 * 8 * 8
    data = cases.make_data(case, "cpu")
    grafted = candidates.ours("cpp")[0].build(case, data)().images
    alone = candidates.standardizing().build(case, data)()
    assert grafted.dtype == alone.dtype == torch.float32
    # A pixel of the graft is that of one of the images, but for the order of the roundings.
    distance = (grafted[:, None] - alone).abs().amax(2)
    assert (distance.amin(1) < 1e-4).all()
    data = data._replace(seed=torch.tensor([3]))
    at_once = candidates.ours("cpp")[0].build(case, data)()
    first = candidates.standardizing_first("cpp").build(case, data)()
    torch.testing.assert_close(first.images, at_once.images)


def test_the_other_tiles_give_the_same_graft():
    """In a process of its own, in which Triton interprets its kernels."""
    code = """
import torch
from benchmarks.speed import candidates, cases, tiles
from sg_kernels.backends.triton import operators
cifar, imagenet = cases.headline("cpu", quick=True)
seen, own = [], operators.launch
operators.launch = lambda given: (seen.append(given.function), own(given))
for case in (cifar, imagenet, imagenet._replace(images=(4, 3, 20, 16), channels_last=True)):
    data = cases.make_data(case, "cpu")
    grafts = []
    for candidate in candidates.tiles("cpu"):
        torch.manual_seed(1)
        grafts.append(candidate.build(case, data)().clone())
    assert torch.equal(*grafts)
    assert not torch.equal(grafts[0], data.images)
    assert seen[-1] is tiles.graft_kernel is not seen[-2], seen
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["in_turn", "both_overlap"])
def test_launches_overlap_as_a_candidate_says_and_then_as_before(monkeypatch, name):
    launch = pytest.importorskip("sg_kernels.backends.triton.launch")
    seen = []
    fake = Candidate("triton", lambda case, data: lambda: seen.append(launch.OVERLAP))
    monkeypatch.setattr(candidates, "ours", lambda backend: [fake])
    monkeypatch.setattr(candidates, "own_backends", lambda device: ["triton"])
    run = getattr(candidates, name)("cuda")[0].build(CASE, None)
    run()
    assert seen == [{"in_turn": 0, "both_overlap": 2}[name]]
    assert launch.OVERLAP == 1


def test_random_data_is_never_flat():
    for options in ({}, {"features": (8, 17, 64), "token_grid": (4, 4), "prefix_tokens": 1}):
        case = Case("", (8, 3, 8, 8), (8, 64, 4, 4), dtype=torch.uint8)
        case = case._replace(features_dtype=torch.float32, **options)
        data = cases.make_data(case, "cpu")
        assert len(data.images.unique()) > 200
        tokens = {"token_grid": case.token_grid, "prefix_tokens": case.prefix_tokens}
        saliency = sg_kernels.channel_saliency(data.features, **tokens).flatten(1)
        assert (saliency.amax(1) > 2 * saliency.mean(1)).float().mean() > 0.7


def test_candidates_take_turns_and_each_runs_after_each():
    calls = []
    timed = {name: Timed(lambda name=name: calls.append(name)) for name in "abcd"}
    samples, _ = measure.interleave(timed, 40, measure.wall, "")
    assert samples.shape == (40, 4)
    assert samples.notna().all(axis=None)
    rounds = ["".join(calls[i : i + 4]) for i in range(8, len(calls), 4)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abcd"}
    followed = Counter(pair for turn in rounds for pair in pairwise(turn))
    assert len(followed) == 4 * 3
    assert max(followed.values()) < 2 * len(rounds) * 3 / len(followed)


def test_a_candidate_that_fails_is_dropped_and_the_others_go_on():
    def fails_at_once():
        raise ZeroDivisionError("alas")

    countdown = iter([None] * 5)
    timed = {
        "fine": Timed(lambda: None),
        "at once": Timed(fails_at_once),
        "late": Timed(lambda: next(countdown)),
    }
    samples, failed = measure.interleave(timed, 5, measure.wall, "")
    assert list(samples) == ["fine"]
    assert failed == {
        "at once": "ZeroDivisionError: alas",
        "late": "StopIteration: no message",
    }


def test_a_slow_candidate_sits_out_rounds_and_leaves_no_number_there():
    clock = {"slow": 2 * measure.SLOW_NS, "quick": 1.0}
    timed = {name: Timed(lambda: None, held=name) for name in clock}
    samples, _ = measure.interleave(timed, 28, lambda timed: clock[timed.held], "")
    assert samples.count().to_dict() == {"slow": 14, "quick": 28}
    ratio = results.row_of(("", "", ""), "", samples.slow / samples.quick, "x")
    assert (ratio.value, ratio.rounds) == (2 * measure.SLOW_NS, 14)


def test_the_host_is_timed_until_a_call_returns_and_the_wall_until_it_is_done(monkeypatch):
    now = SimpleNamespace(ns=0)

    def passes(ns):
        now.ns += ns

    monkeypatch.setattr(measure, "perf_counter_ns", lambda: now.ns)
    monkeypatch.setattr(measure, "synchronize", lambda: passes(1000))
    timed = Timed(lambda: passes(10), calls=5)
    assert (measure.host(timed), measure.wall(timed)) == (10, (5 * 10 + 1000) / 5)


class FakeCuda:
    """torch.cuda as far as the clocks use it, with a device clock that only kernels advance."""

    def __init__(self, capture_fails=False):
        self.now, self.log, self.capture_fails, self.captured = 0.0, [], capture_fails, None
        self.queue = 1024
        self.CUDAGraph = SimpleNamespace
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = lambda stream: contextlib.nullcontext()
        self.is_available = lambda: True
        self.synchronize = lambda: self.log.append("synchronize")
        self.set_sync_debug_mode = self.log.append
        self.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=1 << 20)
        allocated = iter([100, 300])
        self.memory_allocated = lambda: next(allocated)
        self.reset_peak_memory_stats = lambda: None
        self.max_memory_allocated = lambda: 700
        fake = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = fake.now
                fake.log.append("event")
                self.behind = len(fake.log)

            def query(self):
                return len(fake.log) - self.behind > fake.queue

            def elapsed_time(self, other):
                return other.at - self.at

        self.Event = Event

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = 0.0
        yield
        # What launches nothing that this sees takes a microsecond a call.
        milliseconds, self.captured = self.captured or 8e-3, None
        graph.replay = lambda: self.launch("replay", milliseconds)
        if self.capture_fails:
            raise RuntimeError("capture failed")

    def launch(self, name, milliseconds):
        if self.captured is not None:
            self.captured += milliseconds
        else:
            self.log.append(name)
            self.now += milliseconds


@pytest.fixture
def fake_cuda(monkeypatch, request):
    fake, copy = FakeCuda(**getattr(request, "param", {})), torch.Tensor.copy_

    def copying(tensor, source):
        fake.launch("copy", 1.0)
        return copy(tensor, source) if tensor.nbytes < 1 << 20 else tensor  # less the ballast

    monkeypatch.setattr(measure, "cuda", fake)
    monkeypatch.setattr(step, "cuda", fake)
    # Passing over the ballast takes a millisecond, and so does copy_.
    monkeypatch.setattr(measure.DeviceClock, "fill", lambda self, n: fake.launch("fill", n))
    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    return fake


def test_the_ballast_is_read_last():
    called = []
    methods = {name: lambda name=name: called.append(name) for name in ("neg_", "sum")}
    measure.DeviceClock.fill(SimpleNamespace(ballast=SimpleNamespace(**methods)), 2)
    assert called == ["neg_", "neg_", "sum"]


def test_device_time_is_that_of_a_replay_behind_a_full_queue(fake_cuda):
    clock = measure.DeviceClock("cpu")
    calls = [lambda: fake_cuda.launch("a", 1e-3) or 1, lambda: fake_cuda.launch("b", 3e-3) or 2]
    timed, words = clock.prepare(calls, capturable=True)
    assert (timed.calls, timed.held) == (8, [1, 2] * 4)
    assert words == "graph of 8 calls on 2 sets of inputs"
    fake_cuda.log.clear()
    assert clock(timed) == pytest.approx(2000)
    assert fake_cuda.log == ["fill", "event", "replay", "event", "synchronize"]


def test_the_inputs_of_a_graph_exceed_the_l2_three_times_or_the_row_says_so(fake_cuda):
    clock = measure.DeviceClock("cpu")  # of an L2 of 1 MiB
    sets = {size: clock.sets(size) for size in (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 30)}
    assert list(sets.values()) == [64, 49, 13, 4, 2]
    assert [clock.cold(size) for size in sets] == [False, True, True, True, True]


@pytest.mark.parametrize("fake_cuda", [{"capture_fails": True}], indirect=True)
def test_what_cannot_be_captured_is_timed_call_by_call_and_says_so(fake_cuda):
    clock = measure.DeviceClock("cpu")
    calls = [lambda: fake_cuda.launch("a", 1e-3), lambda: fake_cuda.launch("b", 3e-3)]
    timed, words = clock.prepare(calls, capturable=True)
    assert words == "call by call: RuntimeError: capture failed"
    assert sorted(round(clock(timed)) for _ in range(4)) == [1000, 1000, 3000, 3000]
    fake_cuda.log.clear()
    clock(timed)
    assert [*fake_cuda.log[:2], *fake_cuda.log[3:]] == ["fill", "event", "event", "synchronize"]
    fake_cuda.capture_fails = False
    assert clock.prepare(calls, capturable=True)[1] == "graph of 8 calls on 2 sets of inputs"


def test_what_draws_on_the_host_is_not_captured(fake_cuda):
    clock = measure.DeviceClock("cpu")
    timed, words = clock.prepare([lambda: fake_cuda.launch("call", 2e-3)], capturable=False)
    assert (timed.calls, "a graph would repeat the draw" in words) == (1, True)
    assert not any(candidate.capturable for candidate in candidates.peers())


@pytest.mark.parametrize(("queue", "waits"), [(2, False), (1, True)])
def test_where_the_device_overtakes_the_host_the_row_says_so(fake_cuda, queue, waits):
    clock = measure.DeviceClock("cpu")
    fake_cuda.queue = queue
    two_launches = [lambda: [fake_cuda.launch(name, 1e-3) for name in "ab"]]
    timed, how = clock.prepare(two_launches, capturable=False)
    assert ("at times the device waits" in how) == waits
    assert clock(timed) == pytest.approx(2000)


def test_the_copy_whose_bandwidth_counts_is_timed_several_times_at_once(fake_cuda):
    clock = measure.DeviceClock("cpu")
    fake_cuda.log.clear()
    bandwidth = compare.copy_bandwidth(clock)
    assert fake_cuda.log[:11] == ["fill", "event", *["copy"] * 8, "event"]
    np.testing.assert_allclose(bandwidth, 2 * clock.ballast.nbytes / 1e6)


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:features .* one cell")
def test_a_whole_run_under_the_device_clock(fake_cuda, monkeypatch):
    """What a machine without a GPU can show of a run with one: every line but the kernels."""
    launches, copy = candidates.two_launches(), candidates.copies()[0]
    chosen = [*candidates.ours("cpp"), EAGER, copy, launches]
    monkeypatch.setattr(compare, "everything", lambda device: chosen)
    monkeypatch.setattr(compare, "measure_steps", lambda device, quick, rounds: [])
    monkeypatch.setattr(measure.DeviceClock, "sets", lambda self, size: 2)
    clock = measure.DeviceClock("cpu")
    parts = [part("cpu", clock, quick=True, rounds=2) for part in compare.PARTS.values()]
    rows = pd.DataFrame([row for part in parts for section in part for row in section])
    assert not (rows.figure == "all").any()  # no section failed
    measured = rows[(rows.figure == "device time") & rows.value.notna()]
    names = {candidates.COMPILED, *(each.name for each in chosen)}
    assert {*measured[measured.case == "cifar"].candidate} == names
    assert results.find(rows, "augmentations=2", "cpp", compare.N_CALLS).value == 1.0
    counted = {*rows[(rows.candidate == "cpp") & rows.value.notna()].figure}
    assert {"host time", "launches per call", "host syncs per call"} <= counted


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_every_figure_of_a_case_follows_from_the_times(fake_cuda):
    seen = []

    def taking(candidate, microseconds, waits=False):
        def build(case, data):
            seen.append(data.images)

            def run():
                fake_cuda.launch(candidate.name, microseconds / 1e3)
                if waits:
                    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

            return run

        return candidate._replace(build=build)

    own, peer = candidates.ours("cpp"), candidates.peers()[0]
    chosen = [taking(each, time) for each, time in zip(own, (8.0, 5.0, 9.0))]
    chosen += [taking(EAGER, 40.0), taking(candidates.copies()[0], 4.0)]
    chosen += [taking(candidates.two_launches(), 2.0), taking(peer, 90.0, waits=True)]
    clock = measure.DeviceClock("cpu")
    sections = compare.headline(CASE, chosen, "cpu", clock, 3)
    rows = pd.DataFrame([row for section in sections for row in section])

    def value(candidate, figure):
        return results.find(rows, "x", candidate, figure).value

    assert value("cpp", "device time") == pytest.approx(0.008)
    assert value(EAGER.name, "time / cpp") == pytest.approx(5)
    assert value("cpp", compare.OVER_COPY) == pytest.approx(2)
    assert value(COPY, "time / cpp, out=") == pytest.approx(0.8)
    # The copy that has the bandwidth takes the floor's 10 KB in 20 ns, two launches take longer.
    assert value("cpp", compare.OVER_LARGER_FLOOR) == pytest.approx(4)
    # It copies 268 MB, reading and writing, in a millisecond.
    bandwidth = value("a large copy_", "bandwidth")
    assert bandwidth == pytest.approx(2 * (1 << 28) / 1e6, rel=1e-4)
    floor = cases.floor_bytes(CASE) / bandwidth
    assert value("cpp", compare.OVER_FLOOR) == pytest.approx(8000 / floor, rel=1e-4)
    assert results.find(rows, "x", peer.name, "device time") is None
    by_wall = results.find(rows, "x", peer.name, "time / cpp, targets")
    assert by_wall.note == f"wall times: {compare.WAITS}"
    assert not rows[rows.candidate != peer.name].note.str.startswith("wall").any()

    sets = {images.data_ptr(): images for images in seen}
    assert len(sets) == 1 + clock.sets(cases.floor_bytes(CASE))
    assert len({images.sum().item() for images in sets.values()}) == len(sets)
    assert all((images != 0).float().mean() > 0.9 for images in sets.values())


def test_a_call_of_n_augmentations_is_held_against_n_calls_of_one():
    calls = []
    one = Candidate("x", lambda case, data: lambda: calls.append((case.augmentations, data)))
    several = compare.n_calls_of_one(one)
    several.build(CASE._replace(augmentations=3), "data")()
    assert calls == [(1, "data")] * 3
    assert several.name == "x, n calls of one"


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:called a synchronizing")
def test_counters(fake_cuda):
    x = torch.rand(4)
    assert measure.count_operators(lambda: x.add(1).mul_(2)) == 2
    # randint calls empty and random_, which are not counted.
    assert measure.count_operators_profiled(lambda: torch.randint(9, (4,)).add(1)) == 2
    assert measure.count_launches(lambda: x.add(1)) == 0
    assert measure.device_memory_peak(lambda: x) == 700 - 100 - 200

    def waits():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    assert measure.count_syncs(waits) == 1
    assert fake_cuda.log[-2:] == ["warn", "default"]


def test_a_step_is_divided_into_its_laps(monkeypatch):
    try:
        rivals.import_library("timm")
    except ImportError as error:
        pytest.skip(str(error))
    now = SimpleNamespace(ns=0)

    def passing(ns, function):
        def run(*args, **options):
            now.ns += ns
            return function(*args, **options)

        return run

    graft = sg_kernels.SaliencyGraft
    monkeypatch.setattr(step, "perf_counter_ns", lambda: now.ns)
    monkeypatch.setattr(step.F, "cross_entropy", passing(50, step.F.cross_entropy))
    monkeypatch.setattr(step, "clean_pass", passing(20, step.clean_pass))
    monkeypatch.setattr(graft, "forward", passing(30, graft.forward))
    rows = [row for rows in step.measure_steps("cpu", True, 3) for row in rows]
    figures = {row.figure: row.value for row in rows if row.candidate.endswith("(cpp)")}
    assert figures == {
        "training step": 100e-6,
        "mixing, share of the step": 30,
        "clean forward, share of the step": 20,
        "step / plain": 2,
        # Of the recipe half: every other step takes 30 + 50, the others 50, as all of CutMix's do.
        step.OVER_CUTMIX: 1.3,
    }


def test_laps_on_the_device(fake_cuda):
    marks = []
    for milliseconds in (3, 5, 0):
        marks.append(step.mark("cuda"))
        fake_cuda.launch("kernel", milliseconds)
    assert [step.nanoseconds(*pair) for pair in pairwise(marks)] == [3e6, 5e6]
