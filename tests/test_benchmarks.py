"""The benchmarks run, count what they say they count, and back every figure of README.md."""

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import sg_kernels

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks is not installed

from benchmarks import (  # noqa: E402
    candidates,
    cases,
    check,
    compare,
    gpu,
    measure,
    memory,
    readme,
    report,
    results,
    rivals,
    step,
)
from benchmarks.measure import Timed  # noqa: E402
from benchmarks.results import Row, Run  # noqa: E402

RUN = Run("2026-01-02T03:04:05Z", "abc1234", "a machine", "1.2", "python 3.11; torch 2.13.0")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A whole run on tiny shapes, in which one installed library does not import."""
    directory = tmp_path_factory.mktemp("quick")
    broken = directory / "broken" / "kornia" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('planted')")
    path = [str(broken.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", "--results", str(directory)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return directory


def test_a_run_measures_every_section(quick_run):
    run, rows = results.read(next(quick_run.glob("*.csv")))
    assert run.date
    assert "torch " in run.versions
    valued = {(row.case, row.figure) for row in rows if row.value is not None}
    time = "device time" if torch.cuda.is_available() else "time"
    for case in ("cifar", "imagenet", "batch=2", "channels=8", "grid=2", "augmentations=2"):
        assert (case, time) in valued
    for candidate in ("cpp", "eager reference", "compiled reference"):
        assert results.find(rows, "imagenet", candidate, "operators per call")
    if not torch.cuda.is_available():
        for candidate in ("copy_", "reference", "compiled reference"):
            assert results.find(rows, "imagenet", candidate, f"{memory.FIGURE}, later calls")
    assert ("tiny", "host time") in valued
    assert ("tiny ResNet", "training step") in valued
    assert not [row for row in rows if row.figure == "all"]  # no section failed


def test_what_cannot_run_is_absent_with_the_reason_and_never_zero(quick_run):
    _, rows = results.read(next(quick_run.glob("*.csv")))
    kornia = [row for row in rows if row.candidate.startswith("kornia")]
    assert kornia
    assert all(row.value is None and row.note == "ImportError: planted" for row in kornia)
    assert all(row.note for row in rows if row.value is None)
    assert not [row for row in rows if row.unit in ("ms", "us", "x", "GB/s") and row.value == 0]
    assert "ImportError: planted" in next(quick_run.glob("*.md")).read_text()


def test_a_run_draws_its_plots(quick_run):
    for picture in ("*[!h].png", "*-growth.png"):
        assert next(quick_run.glob(picture)).stat().st_size > 10_000


def test_plots_are_drawn_anew_from_the_csv_of_a_run_that_was_stopped(quick_run, tmp_path):
    run, rows = results.read(next(quick_run.glob("*.csv")))
    so_far = [row for row in rows if "=" not in row.case]
    results.write(tmp_path / "part.csv", run, so_far)
    command = [sys.executable, "-m", "benchmarks.plots", str(tmp_path / "part.csv")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "part.png").stat().st_size > 10_000


def test_a_check_accepts_what_its_calibration_measured(tmp_path, monkeypatch, capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(check, "compiled", lambda device, quick: [candidates.EAGER])
    measured = check.measure(device, True, 2)
    assert {row.case for row in measured} == {"cifar", "imagenet"}
    monkeypatch.setattr(check, "fresh_process", lambda rounds, quick: measured)
    command = ["check", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--calibrate", "2"])
    check.main()
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 0
    assert "FALLEN" not in capsys.readouterr().out


def row(case="cifar", candidate="eager", figure="time", value=1.0, unit="ms", **more):
    return Row(case, "1x1", candidate, figure, value, unit, **more)


@pytest.mark.parametrize("augmentations", [1, 2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_floor_is_what_its_copy_moves(augmentations, channels_last):
    class Moved(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is torch.ops.aten.copy_.default
            self.total += 2 * args[1].numel() * args[1].itemsize
            return func(*args, **(kwargs or {}))

    case = cases.Case(
        "", (4, 3, 8, 8), (4, 16, 4, 4), augmentations=augmentations, channels_last=channels_last
    )
    floor = 4 * (4 * 16 * 4 * 4 + (1 + augmentations) * 4 * 3 * 8 * 8)
    assert cases.floor_bytes(case) == floor
    copy = candidates.copies()[0].build(case, cases.make_data(case, "cpu"))
    with Moved() as moved:
        copy()
    assert moved.total == floor


def test_the_floor_counts_images_and_features_in_their_own_dtypes():
    case = cases.Case("", (4, 3, 8, 8), (4, 16, 4, 4), **cases.UINT8)
    assert cases.floor_bytes(case) == 2 * 4 * 16 * 4 * 4 + 2 * 4 * 3 * 8 * 8
    assert case.shape == "4x3x8x8 uint8, 4x16x4x4 bfloat16"


def test_the_floor_leaves_out_skipped_tokens():
    case = cases.Case("", (2, 3, 8, 8), (2, 5, 7), token_grid=(2, 2), prefix_tokens=1)
    assert cases.features_bytes(case) == 4 * 2 * 4 * 7


def test_candidates_take_turns_and_each_runs_after_each():
    calls = []
    timed = {name: Timed(lambda name=name: calls.append(name)) for name in "abcd"}
    samples = measure.interleave(timed, 40, measure.wall, "", {})
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abcd", 40)
    rounds = ["".join(calls[i : i + 4]) for i in range(8, len(calls), 4)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abcd"}
    followed = Counter(pair for turn in rounds for pair in pairwise(turn))
    assert len(followed) == 4 * 3
    assert max(followed.values()) < 2 * len(rounds) * 3 / len(followed)


def test_a_candidate_that_fails_is_dropped_and_the_others_go_on():
    def sometimes():
        raise next(failures, None) or ZeroDivisionError("late")

    failures = iter(())
    fine, absent = Timed(lambda: None), {}
    countdown = iter([None] * 5)

    def fails_in_round_four():
        next(countdown)

    timed = {"fine": fine, "at once": Timed(sometimes), "late": Timed(fails_in_round_four)}
    samples = measure.interleave(timed, 5, measure.wall, "", absent)
    assert list(samples) == ["fine"]
    assert absent["at once"] == "ZeroDivisionError: late"
    assert absent["late"].startswith("StopIteration")


def test_a_slow_candidate_sits_out_rounds_and_leaves_no_number_there():
    clock = {"slow": 2 * measure.SLOW_NS, "quick": 1.0}
    timed = {name: Timed(lambda: None, held=name) for name in clock}
    samples = measure.interleave(timed, 28, lambda timed: clock[timed.held], "", {})
    assert np.isfinite(samples["quick"]).all()
    assert np.isfinite(samples["slow"]).sum() == 14
    ratio = results.row_of("", "", "slow", "time / quick", samples["slow"] / samples["quick"], "x")
    assert (ratio.value, ratio.rounds) == (2 * measure.SLOW_NS, 14)


class FakeCuda:
    """torch.cuda as far as the clocks use it, with a device clock that only kernels advance."""

    def __init__(self, capture_fails=False):
        self.now, self.log, self.capture_fails, self.captured = 0.0, [], capture_fails, None
        self.queue = 1024
        self.Event = lambda enable_timing: FakeEvent(self)
        self.CUDAGraph = SimpleNamespace
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = lambda stream: contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = 0.0
        yield
        # What launches nothing that this could see takes a microsecond a call.
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

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 20)

    def synchronize(self):
        self.log.append("synchronize")

    def is_available(self):
        return True

    def set_sync_debug_mode(self, mode):
        self.log.append(mode)

    def reset_peak_memory_stats(self):
        self.peak = 700

    def memory_allocated(self):
        self.allocated = 300 if hasattr(self, "allocated") else 100
        return self.allocated

    def max_memory_allocated(self):
        return self.peak


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now
        self.cuda.log.append("event")
        self.behind = len(self.cuda.log)

    def query(self):
        return len(self.cuda.log) - self.behind > self.cuda.queue

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch, request):
    fake = FakeCuda(**getattr(request, "param", {}))
    monkeypatch.setattr(measure, "cuda", fake)
    monkeypatch.setattr(step, "cuda", fake)
    # What cools the L2 takes a millisecond.
    monkeypatch.setattr(measure.DeviceClock, "fill", lambda self, n: fake.launch("fill", n))
    return fake


def copying(fake):
    """copy_ as a kernel of a millisecond."""
    copy = torch.Tensor.copy_

    def launch(tensor, source):
        fake.launch("copy", 1.0)
        return copy(tensor, source)

    return launch


def test_what_fills_the_queue_is_read_last(monkeypatch):
    clock = SimpleNamespace(ballast=Recorded(["neg_", "neg_", "sum"]))
    measure.DeviceClock.fill(clock, 2)
    assert clock.ballast.expected == []


class Recorded:
    """Takes calls of the methods ``expected``, in that order."""

    def __init__(self, expected):
        self.expected = expected

    def __getattr__(self, name):
        return lambda: self.expected.remove(name) if self.expected[0] == name else pytest.fail(name)


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
    assert words.endswith("RuntimeError: capture failed")
    fake_cuda.log.clear()
    assert clock(timed) == pytest.approx(2000)
    taken = ["fill", "event", *["a", "b"] * 4, "event", "synchronize"]
    assert fake_cuda.log in (taken, [*taken[:2], *["b", "a"] * 4, *taken[-2:]])
    fake_cuda.capture_fails = False
    timed, words = clock.prepare(calls, capturable=True)
    assert words == "graph of 8 calls on 2 sets of inputs"


def test_what_draws_on_the_host_is_not_captured(fake_cuda):
    clock = measure.DeviceClock("cpu")
    timed, words = clock.prepare([lambda: fake_cuda.launch("call", 2e-3)], capturable=False)
    assert (timed.calls, "which a graph would freeze" in words) == (8, True)
    assert not any(candidate.capturable for candidate in candidates.peers())


@pytest.mark.parametrize(
    ("queue", "taken", "words"),
    [(16, 8, "8 calls behind a full queue"), (15, 1, "1 call behind"), (1, 1, "waits at times")],
)
def test_what_overflows_the_queue_is_timed_by_itself_and_says_so(fake_cuda, queue, taken, words):
    clock = measure.DeviceClock("cpu")
    fake_cuda.queue = queue
    two_launches = [lambda: [fake_cuda.launch(name, 1e-3) for name in "ab"]]
    timed, how = clock.prepare(two_launches, capturable=False)
    assert (timed.calls, words in how) == (taken, True)
    assert clock(timed) == pytest.approx(2000)


def test_the_copy_that_others_are_measured_by_is_timed_several_times_at_once(
    fake_cuda, monkeypatch
):
    monkeypatch.setattr(torch.Tensor, "copy_", copying(fake_cuda))
    clock = measure.DeviceClock("cpu")
    fake_cuda.log.clear()
    bandwidth = compare.copy_bandwidth(clock)
    assert fake_cuda.log[:11] == ["fill", "event", *["copy"] * 8, "event"]
    np.testing.assert_allclose(bandwidth, 2 * clock.ballast.nbytes / 1e6)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_whole_run_under_the_device_clock(fake_cuda, monkeypatch):
    """What a machine without a GPU can show of a run with one: every line but the kernels."""
    chosen = [
        *candidates.ours("cpp"),
        candidates.EAGER,
        *candidates.copies(),
        candidates.two_launches(),
    ]
    monkeypatch.setattr(compare, "everything", lambda device: chosen)
    monkeypatch.setattr(compare, "measure_steps", lambda device, quick, rounds: [])
    monkeypatch.setattr(measure.DeviceClock, "sets", lambda self, size: 2)
    monkeypatch.setattr(torch.Tensor, "copy_", copying(fake_cuda))
    sections = compare.measure_all("cpu", measure.DeviceClock("cpu"), quick=True, rounds=2)
    rows = [row for section in sections for row in section]
    assert not [row for row in rows if row.figure == "all"]  # no section failed
    measured = {row.candidate for row in rows if row.figure == "device time"}
    compiled = candidates.compiled("cpu", quick=True)
    assert {candidate.name for candidate in [*chosen, *compiled]} == measured
    assert results.find(rows, "cifar", compiled[0].name, "time / cpp").value == 1.0
    assert results.find(rows, "cifar", candidates.EAGER.name, "time / cpp").value == 1.0
    assert results.find(rows, "augmentations=2", "cpp", "time / n calls of one").value == 1.0
    # 268 MB read and written in a millisecond, against 10 KB in one microsecond.
    bandwidth = results.find(rows, "cifar", "a large copy_", "bandwidth").value
    assert bandwidth == pytest.approx(2 * (1 << 28) / 1e6, rel=1e-4)
    over = results.find(rows, "cifar", "cpp", results.OVER_FLOOR).value
    assert over == pytest.approx(1000 / (10240 / bandwidth), rel=1e-4)
    counted = {row.figure for row in rows if row.candidate == "cpp" and row.value is not None}
    assert {"host time", "launches per call", "host syncs per call"} <= counted


def test_the_commit_is_marked_where_more_than_results_has_changed(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=x", "-c", "user.email=x")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    directory = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(results, "RESULTS", directory)
    directory.mkdir(parents=True)
    assert results.git_commit() == "unknown"
    for name in ("code.py", "benchmarks/results/cpu.csv"):
        (tmp_path / name).write_text("one")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message=x")
    commit = git("rev-parse", "--short", "HEAD")
    (directory / "cpu.csv").write_text("two")
    assert results.git_commit() == commit
    (tmp_path / "code.py").write_text("two")
    assert results.git_commit() == f"{commit}+"


def test_a_call_of_n_augmentations_is_held_against_n_calls_of_one():
    calls = []

    def build(case, data):
        return lambda: calls.append((case.augmentations, data))

    case = cases.TINY._replace(augmentations=3)
    several = compare.n_calls_of_one(candidates.Candidate("x", build))
    several.build(case, "data")()
    assert calls == [(1, "data")] * 3
    assert several.name == "x, n calls of one"


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_every_figure_of_a_case_follows_from_the_times(fake_cuda, monkeypatch):
    case, seen = cases.Case("x", (4, 3, 8, 8), (4, 16, 4, 4)), []

    def taking(name, microseconds, traffic=None, waits=False):
        def build(case, data):
            seen.append(data.images)

            def call():
                fake_cuda.launch(name, microseconds / 1e3)
                if waits:
                    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

            return call

        return candidates.Candidate(name, build, traffic)

    floor = cases.floor_bytes(case)
    peer = candidates.peers()[0].name
    chosen = [
        taking("cpp", 8.0, cases.floor_bytes),
        taking("cpp, out=", 5.0, cases.floor_bytes),
        taking("cpp, targets", 9.0),
        taking(candidates.EAGER.name, 40.0, cases.floor_bytes),
        taking(candidates.COPY, 4.0, cases.floor_bytes),
        taking(candidates.two_launches().name, 2.0),
        taking(peer, 90.0, waits=True),
    ]
    monkeypatch.setattr(torch.Tensor, "copy_", copying(fake_cuda))
    clock = measure.DeviceClock("cpu")
    rows = [row for rows in compare.headline(case, chosen, "cpu", clock, 3) for row in rows]

    def figure(candidate, name):
        return results.find(rows, "x", candidate, name).value

    assert figure("cpp", "device time") == pytest.approx(0.008)
    assert figure("cpp", "floor bytes / device time") == pytest.approx(floor / 8e3, rel=1e-5)
    assert figure(candidates.EAGER.name, "time / cpp") == pytest.approx(5)
    assert figure("cpp", "time / copy_ of the same bytes") == pytest.approx(2)
    assert figure("cpp, out=", "share of the copy bandwidth") == pytest.approx(80)
    # The copy that has the bandwidth takes the floor's 10 KB in 20 ns, two launches take longer.
    assert figure("cpp", results.OVER_LARGER_FLOOR) == pytest.approx(4)
    assert figure("cpp", results.OVER_FLOOR) > 300
    assert results.find(rows, "x", peer, "device time") is None
    assert results.find(rows, "x", peer, "time / cpp, targets").note.startswith("wall times")
    assert not [row for row in rows if row.candidate == "cpp" and row.note.startswith("wall")]

    sets = {images.data_ptr(): images for images in seen}
    assert len(sets) == 1 + clock.sets(floor)
    assert len({images.sum().item() for images in sets.values()}) == len(sets)
    assert all((images != 0).float().mean() > 0.9 for images in sets.values())


def test_the_host_is_timed_until_a_call_returns_and_the_wall_until_it_is_done(monkeypatch):
    now = SimpleNamespace(ns=0)

    def passes(ns):
        now.ns += ns

    monkeypatch.setattr(measure, "perf_counter_ns", lambda: now.ns)
    monkeypatch.setattr(measure, "synchronize", lambda: passes(1000))
    timed = Timed(lambda: passes(10), calls=5)
    assert (measure.host(timed), measure.wall(timed)) == (10, (5 * 10 + 1000) / 5)


def test_a_step_is_divided_into_its_laps(monkeypatch):
    now = SimpleNamespace(ns=0)

    def passing(ns, function):
        def run(*args, **options):
            now.ns += ns
            return function(*args, **options)

        return run

    monkeypatch.setattr(step, "perf_counter_ns", lambda: now.ns)
    monkeypatch.setattr(step.F, "cross_entropy", passing(50, step.F.cross_entropy))
    monkeypatch.setattr(step.Grafting, "look", passing(20, step.Grafting.look))
    monkeypatch.setattr(step.Grafting, "__call__", passing(30, step.Grafting.__call__))
    rows = [row for rows in step.measure_steps("cpu", True, 3) for row in rows]
    figures = {row.figure: row.value for row in rows if row.candidate.endswith("(cpp)")}
    assert figures == {
        "training step": 100e-6,
        "mixing": 30e-6,
        "mixing, share of the step": 30,
        "clean forward, share of the step": 20,
        "step / plain": 2,
    }


def test_a_run_that_is_killed_keeps_its_rows_and_a_quick_one_touches_no_results(
    tmp_path, monkeypatch
):
    def measured(*_):
        yield [row()]
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure_all", measured)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(sys, "argv", ["compare", "--quick"])
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    assert not results.RESULTS.exists()
    _, rows = results.read(next((tmp_path / "build" / "quick").glob("*.csv")))
    assert rows[1:] == [row()]


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


def test_laps_on_the_device(fake_cuda):
    laps = step.Laps("cuda", torch.ones(1))
    for milliseconds in (3, 5, 0):
        laps.mark()
        fake_cuda.launch("kernel", milliseconds)
    assert laps.read() == [3e6, 5e6]


@pytest.mark.parametrize(("deep", "bottleneck"), [((1, 1), True), ((2, 2, 2, 2), False)])
def test_the_network_is_a_resnet(deep, bottleneck):
    model = step.ResNet(deep, 8, bottleneck, True, 5)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    side = 16 >> (len(deep) - 1)
    assert model.features(torch.rand(2, 3, 64, 64)).shape[2:] == (side, side)


def test_resnet_50_has_its_parameters():
    with torch.device("meta"):
        model = step.ResNet((3, 4, 6, 3), 64, True, True, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032


def test_attentive_cutmix_pastes_the_most_attended_cells():
    images, labels = torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8), torch.arange(2)
    features = torch.zeros(2, 5, 4, 4)
    features[:, :, 1, 2] = -9
    for _ in range(20):
        given = images.clone()
        mixed, targets = rivals.attentive_cutmix(given, features, labels, 2, patches=1)
        if not mixed.equal(images):
            break
    assert mixed is given
    changed = (mixed != images).all(1)
    assert changed.sum() == 2 * 4
    assert changed[:, 2:4, 4:6].all()
    torch.testing.assert_close(targets, torch.tensor([[15 / 16, 1 / 16], [1 / 16, 15 / 16]]))


def test_saliencymix_centres_its_box_on_the_peak(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.75)
    images, labels = torch.arange(2.0)[:, None, None, None].expand(2, 3, 16, 16), torch.arange(2)

    def saliency(image):
        peak = np.zeros(image.shape[:2])
        peak[6, 9] = 1
        return peak

    for _ in range(20):
        given = images.clone()
        mixed, targets = rivals.saliencymix(given, labels, 2, saliency)
        if not mixed.equal(images):
            break
    assert mixed is given
    changed = (mixed != images).all(1)
    assert changed.sum() == 2 * 8 * 8
    assert changed[:, 2:10, 5:13].all()
    assert targets[0].tolist() == [0.75, 0.25]


def test_the_saliency_that_stands_in_for_opencv_ranks_pixels_alike():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "saliency"):
        pytest.skip("OpenCV without its contrib modules")
    y, x = np.mgrid[:96, :96][..., None]
    waves = 120 + 60 * np.sin(y / 7) + 60 * np.cos(x / (5, 9, 11))
    image = waves.astype(np.uint8)
    ours, theirs = rivals.fine_grained_saliency(image), rivals.opencv_saliency(image)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_puzzlemix_keeps_what_is_salient():
    pytest.importorskip("gco")
    torch.manual_seed(0)
    images, labels = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]), torch.arange(2)
    saliency = torch.full((2, 4, 4), 1e-3)
    saliency[0, :, :2] = 1
    saliency[1, :, 2:] = 1
    for _ in range(20):
        mixed, targets = rivals.puzzlemix(images, saliency, labels, 2)
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        if not mixed.equal(images):
            break
    assert mixed[0, 0, :, :8].mean() <= mixed[0, 0, :, 8:].mean()
    assert mixed[1, 0, :, :8].mean() <= mixed[1, 0, :, 8:].mean()


def test_puzzlemix_cuts_by_the_costs_of_its_authors(monkeypatch):
    """Of two by two blocks, each from one image: what is not seen, the prior, what joins badly."""
    given = []
    cut = SimpleNamespace(cut_grid_graph=lambda *args, **_: given.append(args) or np.zeros(4, int))
    monkeypatch.setitem(sys.modules, "gco", cut)
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.3)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor([1, 0]))
    # Large, so that how they join counts against what is lost when costs become integers.
    images, saliency = 50 * torch.rand(2, 3, 8, 8), torch.rand(2, 2, 2)
    mixed, targets = rivals.puzzlemix(images, saliency, torch.arange(2), 2, blocks=2)
    assert_same_bits(mixed, images)
    assert targets.tolist() == [[1, 0], [0, 1]]

    unary, disagreement, vertical, horizontal = given[0]
    share = saliency / saliency.sum((1, 2), keepdim=True)
    pooled = torch.nn.functional.avg_pool2d(images, 4)
    borders = [((0, x), (1, x)) for x in (0, 1)] + [((y, 0), (y, 1)) for y in (0, 1)]

    def cost(shown):
        of_blocks = sum(unary[y, x, 2 * z] for (y, x), z in shown.items())
        weights = [*vertical.ravel(), *horizontal.ravel()]
        return of_blocks + sum(
            w * disagreement[2 * shown[a], 2 * shown[b]] for w, (a, b) in zip(weights, borders)
        )

    def expected(shown):
        unseen = sum(share[(1 - z, *at)] for at, z in shown.items())
        prior = sum(-0.2 * np.log((0.3, 0.7)[z] ** 2) / 4 for z in shown.values())
        joints = 0.0
        for a, b in borders:
            difference = pooled[(shown[a], slice(None), *a)] - pooled[(shown[b], slice(None), *b)]
            joints += 1.2 / 32 * ((shown[a] != shown[b]) + 0.5 * difference.abs().mean())
        return 4000 * (unseen + prior + joints)

    choices = [dict(zip(product((0, 1), repeat=2), chosen)) for chosen in product((0, 1), repeat=4)]
    for shown in choices[1:]:
        difference = expected(shown) - expected(choices[0])
        assert cost(shown) - cost(choices[0]) == pytest.approx(float(difference), abs=8)


def test_random_data_is_never_flat():
    for options in ({}, {"features": (8, 17, 64), "token_grid": (4, 4), "prefix_tokens": 1}):
        case = cases.Case("", (8, 3, 8, 8), (8, 64, 4, 4), dtype=torch.uint8)._replace(
            features_dtype=torch.float32, **options
        )
        data = cases.make_data(case, "cpu")
        assert len(data.images.unique()) > 200
        tokens = {"token_grid": case.token_grid, "prefix_tokens": case.prefix_tokens}
        saliency = sg_kernels.channel_saliency(data.features, **tokens).flatten(1)
        assert (saliency.amax(1) > 2 * saliency.mean(1)).float().mean() > 0.7


def test_a_csv_gives_back_its_rows(tmp_path):
    rows = [
        row(value=0.123456, p20=0.1, p80=0.2, rounds=7, note="graph, of 8"),
        results.absent("cifar", "1x1", "kornia", "time", 'no "module"'),
    ]
    results.write(tmp_path / "a.csv", RUN, rows)
    assert results.read(tmp_path / "a.csv") == (RUN, rows)
    assert results.find(rows, "cifar", "kornia", "time") is None


def test_a_report_lists_ratios_first_and_what_is_absent():
    rows = [
        row(),
        row(figure="time / cpp", value=7.48, unit="x"),
        results.absent("cifar", "1x1", "kornia", "time", "not installed"),
    ]
    text = report.tables(RUN, rows)
    assert text.index("7.48 x") < text.index("1 ms")
    assert "| kornia | time | not installed | cifar |" in text


README = """# it

Needs 3 GB.

## Performance

<!-- benchmarks: m -->
<!-- /benchmarks -->

A call takes <!-- m | cifar | cpp | time -->0.0 ms<!-- / --> on 224x224.

<!-- targets -->
<!-- /targets -->

## Next

Of 8 KiB.
"""


@pytest.fixture
def committed(tmp_path, monkeypatch):
    rows = [
        row(candidate="floor", figure="bytes", value=8, unit="B"),
        row(candidate="eager reference", figure="time / cpp", value=7.48, unit="x", rounds=9),
        row(candidate="cpp", value=1.0763),
    ]
    results.write(tmp_path / "m.csv", RUN, rows)
    eager = "m | cifar | eager reference | time / cpp"
    targets = [
        readme.Target("fast", "at least", 7, eager),
        readme.Target("faster", "at least", 8, eager),
        readme.Target("short", "at most", 1, "m | cifar | cpp | time"),
    ]
    monkeypatch.setattr(readme, "TARGETS", targets)
    return tmp_path


def test_readme_says_of_each_target_whether_it_is_met(committed):
    text = readme.rewritten(README, committed)
    assert "| fast | at least 7x | cifar: 7.48x | met |" in text
    assert "| faster | at least 8x | cifar: 7.48x | short |" in text
    assert "| short | at most 1 ms | cifar: 1.08 ms | short |" in text


def test_a_target_of_several_cases_is_met_in_all_or_short(tmp_path):
    rows = [row(case, "cpp", "time", value, "ms") for case, value in (("a", 1.0), ("b", 3.0))]
    results.write(tmp_path / "m.csv", RUN, rows)

    def line(sense, bound, names):
        return readme.Target("t", sense, bound, f"m | {names} | cpp | time").line(tmp_path)

    assert line("at most", 2, "a and b") == "| t | at most 2 ms | a: 1.00 ms, b: 3.00 ms | short |"
    assert line("at most", 3, "a and b").endswith("| met |")
    assert line("at least", 1, "a and b").endswith("| met |")
    assert line("at least", 2, "a and b").endswith("| short |")
    assert readme.unbacked(line("at most", 2, "a and c")) != []


def test_readme_figures_come_from_their_rows(committed):
    text = readme.rewritten(README, committed)
    assert "| eager reference / `cpp` | 7.5x |" in text
    assert "| `cpp` | 1.08 ms |" in text
    assert "A call takes <!-- m | cifar | cpp | time -->1.1 ms<!-- / -->" in text
    assert readme.problems(text, committed) == []
    assert readme.rewritten(text, committed) == text


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("-->1.1 ms", "-->1.2 ms"),
        ("-->1.1 ms", "-->1.1 us"),
        ("| 7.5x |", "| 7.6x |"),
        ("| cpp | time -->", "| triton | time -->"),
        ("on 224x224.", "on 224x224, 3x faster."),
        ("on 224x224.", "on 224x224, in 33 us."),
        ("on 224x224.", "on 224x224, with 3 MB."),
        ("Needs 3 GB.", "Needs 3 s."),
        ("Of 8 KiB.", "Of 5 %."),
        ("| short |\n", "| met |\n"),
    ],
)
def test_a_readme_figure_without_a_row_that_rounds_to_it_is_found(committed, right, wrong):
    text = readme.rewritten(README, committed)
    assert right in text
    assert readme.problems(text.replace(right, wrong), committed) != []


def test_a_readme_figure_whose_row_is_gone_is_found_though_it_was_rewritten(committed):
    text = readme.rewritten(README.replace("| cpp | time -->", "| triton | time -->"), committed)
    assert readme.problems(text, committed) != []


def test_readme_states_no_figure_that_the_results_do_not():
    text = readme.README.read_text()
    assert "<!-- benchmarks: " in text
    assert "<!-- targets -->" in text
    assert readme.problems(text, results.RESULTS) == []


def test_a_check_of_unchanged_ratios_fails_once_in_a_hundred_times():
    """Ten ratios whose runs differ by a tenth, checked as often as shows the share of failures."""
    draw = np.random.default_rng(0)
    failures = 0
    for _ in range(2000):
        runs = np.exp(0.1 * draw.standard_normal((10, 9)))
        failures += any(
            today < check.least_accepted(list(kept), check.FALSE_ALARMS / 10)
            for *kept, today in runs
        )
    assert 0.004 < failures / 2000 < 0.018


def test_a_ratio_has_fallen_when_chance_does_not_explain_it(capsys):
    figure = "time / cpp"
    runs = [[row(figure=figure, value=value, unit="x")] for value in (4.0, 5.0, 4.4, 4.5)]
    kept = check.calibration(runs)
    assert kept[0].value == pytest.approx(4.45)
    for value, accepted in ((9.0, True), (3.3, True), (2.8, False)):
        fallen = check.verdicts(kept, [row(figure=figure, value=value, unit="x")])
        assert (fallen == []) == accepted
        assert ("FALLEN" in capsys.readouterr().out) != accepted


def test_a_library_that_is_absent_is_listed_and_one_of_ours_has_fallen(capsys):
    runs = [[row("cifar", "timm", "time / cpp", value, "x")] for value in (4.0, 5.0)]
    kept = check.calibration(runs)
    absent = results.absent("cifar", "1x1", "timm", "time", "No module named 'timm'")
    assert check.verdicts(kept, [absent]) == []
    assert "absent: No module named 'timm'" in capsys.readouterr().out
    assert check.verdicts(kept, []) == kept[:1]


def test_a_check_refuses_the_calibration_of_another_machine(tmp_path, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results.write(tmp_path / f"{results.file_name(device)}-check.csv", RUN, [row()])
    monkeypatch.setattr(sys, "argv", ["check", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="is of a machine, this is"):
        check.main()


def test_without_tqdm_the_clocks_still_run():
    code = (
        "import sys; sys.modules['tqdm'] = None\n"
        "from benchmarks import measure, step\n"
        "timed = {'a': measure.Timed(lambda: None)}\n"
        "print(len(measure.interleave(timed, 3, measure.wall, '', {})['a']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "3\n", run.stderr


def test_every_operator_is_benchmarked(capsys):
    options = ["-k", "tiny", "--benchmark-disable", "-p", "no:cacheprovider"]
    assert pytest.main([str(ROOT / "benchmarks" / "bench_ops.py"), *options]) == 0
    operators, inputs, without_gradient = 9, 3, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = [sg_kernels.backends.DEVICES[name] for name in sg_kernels.available_backends()]
    backends = sum(device in those for those in devices)
    passed = (operators * inputs - without_gradient) * backends
    assert f"{passed} passed" in capsys.readouterr().out


def test_make_gpu_survives_what_fails_and_what_hangs(tmp_path):
    python = [sys.executable, "-c"]
    alive = tmp_path / "alive"
    forks = f"sleep 3; touch {alive}"  # a process that a hanging one has started
    hangs = f"import subprocess; print('so far'); subprocess.run(['sh', '-c', {forks!r}])"
    parts = [
        gpu.Part("fine", [*python, "print('first'); print('last')"], 30),
        gpu.Part("failing", [*python, "import sys; print('alas'); sys.exit(3)"], 30),
        gpu.Part("hanging, long", [*python, hangs], 1),
        gpu.Part("missing", ["no-such-program"], 30),
        gpu.Part("asking", [*python, "import os; print(os.environ['X'])"], 30, {"X": "answer"}),
    ]
    started = time.monotonic()
    ended = {o.name: o for o in gpu.run(parts, tmp_path, started + 60)}
    assert ended["fine"].result == ended["asking"].result == "passed"
    assert ended["fine"].lines == ["first", "last"]
    assert ended["asking"].lines == ["answer"]
    assert (ended["failing"].result, ended["failing"].lines) == ("failed (3)", ["alas"])
    assert ended["missing"].result == "did not start"
    assert ended["hanging, long"].result.startswith("ended after 1.")
    assert (tmp_path / "hanging-long.log").read_text() == "so far\n"
    text = gpu.summary(list(ended.values()))
    assert "---- failing: failed (3)\nalas\n" in text
    assert "---- fine" not in text
    time.sleep(max(0.0, started + 4 - time.monotonic()))
    assert not alive.exists()


def test_make_gpu_ends_by_its_deadline(tmp_path):
    part = gpu.Part("long", [sys.executable, "-c", "import time; time.sleep(60)"], 30)
    started = time.monotonic()
    (outcome,) = gpu.run([part], tmp_path, started + 1)
    assert outcome.result.startswith("ended after 1.")


def test_make_gpu_leaves_the_benchmarks_half_of_nine_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    *before, (benchmarks,) = gpu.stages(tmp_path, dry=False)
    assert gpu.DEADLINE < 540
    assert gpu.DEADLINE - sum(max(part.limit for part in stage) for stage in before) >= 240
    rehearsed = {part.name for stage in gpu.stages(tmp_path, dry=True) for part in stage}
    real = {part.name for stage in [*before, [benchmarks]] for part in stage}
    assert rehearsed - real == {"emulation"}
    assert len(real - rehearsed) == 9  # more shards, more tools
