"""Whole runs of the benchmarks, the regression check, the tables of figures, and `make gpu`."""

import os
import re
import subprocess
import sys
import tarfile
import time
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_shards

import sg_kernels
from benchmarks import gpu
from benchmarks.speed import candidates, cases, check, compare, memory, readme, results
from benchmarks.speed.results import Row

ROOT = Path(__file__).parents[2]
IGNORING = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = dict.fromkeys(results.RUN, "2026-01-02") | {"device": "a machine", "versions": "torch 2.13.0"}


def row(case="cifar", candidate="eager reference", figure="time", value=1.0, unit="ms", **more):
    return Row(case, "1x1", candidate, figure, value, unit, **more)


def written(path, *rows):
    results.write(path, RUN, rows)
    return results.read(path)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A whole run on tiny shapes, in which one installed library does not import."""
    directory = tmp_path_factory.mktemp("quick")
    broken = directory / "broken" / "kornia" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('planted')")
    path = [str(broken.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "benchmarks.speed.compare", "--quick", "--results", directory]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(directory.glob("*.csv")), run.stdout


def test_a_run_measures_every_section(quick_run):
    rows = results.read(quick_run[0])
    valued = rows.dropna(subset="value")
    measured = set(zip(valued.case, valued.figure))
    time = "device time" if DEVICE == "cuda" else "time"
    for case in ("cifar", "imagenet", "batch=4", "channels=64", "grid=2", "augmentations=2"):
        assert (case, time) in measured
    assert ("tiny", "host time") in measured
    assert ("imagenet, standardised", compare.OVER_STANDARDIZING) in measured
    first = valued[valued.candidate == "standardising, then cpp"]
    assert (first.figure == "time / cpp").any()
    assert ("imagenet, four augmentations", compare.N_CALLS) in measured
    for candidate in ("cpp", "eager reference", "compiled reference"):
        assert results.find(rows, "imagenet", candidate, "operators per call") is not None
    for candidate in ("copy_", "reference", "compiled reference") if DEVICE == "cpu" else ():
        assert results.find(rows, "imagenet", candidate, memory.LATER_PEAK) is not None
    # No section failed, unless timm is missing, which brings the network of the training step.
    failed = rows[rows.figure == "all"].note.str.contains("No module named 'timm'")
    assert failed.all()
    assert len(failed) == (("ResNet-18", "training step") not in measured)


def test_what_cannot_run_is_absent_with_the_reason_and_never_zero(quick_run):
    rows = results.read(quick_run[0])
    kornia = rows[rows.candidate.str.startswith("kornia")]
    assert len(kornia)
    assert kornia.value.isna().all()
    assert (kornia.note == "ImportError: planted").all()
    assert rows[rows.value.isna()].note.ne("").all()
    assert rows[rows.unit.isin(["ms", "us", "x", "GB/s"])].value.ne(0).all()
    assert "ImportError: planted" in quick_run[1]


def test_a_run_draws_its_plots_and_a_stopped_one_can_be_drawn(quick_run, tmp_path):
    for picture in (".png", "-growth.png"):
        assert quick_run[0].with_name(quick_run[0].stem + picture).stat().st_size > 10_000
    rows = results.read(quick_run[0])
    rows[~rows.case.str.contains("=")].to_csv(tmp_path / "part.csv")
    command = [sys.executable, "-m", "benchmarks.speed.plots", tmp_path / "part.csv"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "part.png").stat().st_size > 10_000


@pytest.fixture
def quick_main(tmp_path, monkeypatch):
    """compare.main on parts of which each yields the rows given for it, or raises."""

    def run(*arguments, **parts):
        def part(device, clock, quick, rounds, measured):
            for each in measured:
                if isinstance(each, BaseException):
                    raise each
                yield [each]

        parts = {name: partial(part, measured=measured) for name, measured in parts.items()}
        monkeypatch.setattr(compare, "PARTS", parts)
        monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
        monkeypatch.setattr(sys, "argv", ["compare", "--quick", *arguments])
        threads = torch.get_num_threads()
        try:
            compare.main()
        finally:
            torch.set_num_threads(threads)
            assert not results.RESULTS.exists()
        return written_rows()

    def written_rows():
        return results.read(next((tmp_path / "build" / "quick").glob("*.csv")))

    run.written_rows = written_rows
    return run


def test_a_run_that_is_killed_keeps_its_rows_and_a_quick_one_touches_no_results(quick_main):
    with pytest.raises(KeyboardInterrupt):
        quick_main(deciding=[row(), KeyboardInterrupt()], rest=[])
    assert quick_main.written_rows().candidate.tolist() == ["all", "eager reference"]


def test_the_rest_of_a_run_adds_to_what_the_first_part_measured(quick_main):
    first = [row(candidate="cpp"), row(candidate="triton")]
    parts = {"deciding": first, "rest": [row(candidate="triton", value=2.0)]}
    assert quick_main("--part", "deciding", **parts).value.tolist()[1:] == [1.0, 1.0]
    rows = quick_main("--part", "rest", **parts).set_index("candidate").value
    assert rows[["cpp", "triton"]].tolist() == [1.0, 2.0]  # what is measured anew is replaced
    rows = quick_main("--part", "deciding", **parts)
    assert rows.candidate.tolist() == ["all", "cpp", "triton"]
    assert quick_main(**parts).candidate.tolist() == ["all", "cpp", "triton", "triton"]


def test_a_csv_gives_back_its_rows(tmp_path):
    rows = [
        row(value=0.123456, p20=0.1, p80=0.2, rounds=7, note="graph, of 8"),
        row(value=102760448, unit="B"),
        results.absent(("cifar", "1x1", "kornia"), "time", 'no "module"'),
    ]
    found = written(tmp_path / "a.csv", *rows)
    back = found[list(Row._fields)].astype(object)
    assert [Row(*each) for each in back.where(back.notna(), None).to_numpy()] == rows
    assert found[list(RUN)].drop_duplicates().to_dict("records") == [RUN]
    assert results.find(found, "cifar", "kornia", "time") is None


MACHINE = [
    row(candidate="floor", figure="bytes", value=8, unit="B"),
    row(figure="time / cpp", value=7.48, unit="x", rounds=9),
    row(candidate="timm", figure="time / cpp, targets", value=0.52, unit="x"),
    row(candidate=candidates.COPY, figure="time / cpp", value=3.0, unit="x"),
    row(candidate="cpp", value=1.0763),
]


def test_the_table_of_figures_holds_speed_ups_and_then_times(tmp_path):
    written(tmp_path / "m.csv", *MACHINE)
    written(tmp_path / "m-check.csv", row(figure="time / cpp", value=9.0, unit="x"))
    old = "prose 9x\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nmore\n"
    text = readme.rewritten(old, tmp_path)
    assert text.startswith("prose 9x\n<!-- benchmarks -->\n`cpp` on a machine, torch 2.13.0,")
    assert text.endswith("<!-- /benchmarks -->\nmore\n")
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines()]
    assert [line for line in lines if line][2:] == [
        ["eager reference", "7.5x"],
        ["timm", "0.52x"],
        ["**Time of a call (lower is better)**", ""],
        ["`cpp`", "1.08 ms"],
    ]
    assert readme.rewritten(text, tmp_path) == text


@pytest.mark.parametrize(
    ("sense", "bound", "cases", "met"),
    [
        ("at most", 2, "ab", "no"),
        ("at most", 3, "ab", "yes"),
        ("at least", 1, "ab", "yes"),
        ("at least", 2, "ab", "no"),
        ("at most", 9, "ac", "not measured"),
    ],
)
def test_a_target_is_met_in_all_of_its_cases(tmp_path, monkeypatch, sense, bound, cases, met):
    written(tmp_path / "m.csv", row("a", "cpp"), row("b", "cpp", value=3.0))
    target = readme.Target("fast", sense, bound, ("m", *cases), "cpp", "time", "ms")
    monkeypatch.setattr(readme, "TARGETS", [target])
    last = readme.targets(tmp_path).splitlines()[-1]
    name, limit, measured, *_, verdict = [cell.strip() for cell in last.split("|")[1:-1]]
    assert (name, limit, verdict) == ("fast", f"{sense} {bound} ms", met)
    assert measured == "a: 1.00 ms" + ", b: 3.00 ms" * ("b" in cases)


def test_a_target_of_a_machine_without_results_is_not_measured(tmp_path, monkeypatch):
    target = readme.Target("fast", "at most", 1.1, ("gpu", "a"), "triton", "time / copy")
    monkeypatch.setattr(readme, "TARGETS", [target])
    last = readme.targets(tmp_path).splitlines()[-1]
    cells = [cell.strip() for cell in last.split("|")[1:-1]]
    assert cells == ["fast", "at most 1.1x", "", "", "", "not measured"]


def test_the_targets_of_a_gpu_are_figures_of_a_run_on_one():
    """Each by the name that a run gives it."""
    device = {case.name for case in [*cases.headline("cuda", quick=False), cases.TINY]}
    device |= {case("cuda", False).name for case in (cases.several, cases.standardized)}
    device |= {case.name for axis in cases.growth(quick=False).values() for case in axis}
    device |= {"ResNet-50"}
    for target in readme.TARGETS:
        if target.where[0] == "gpu":
            assert device >= {*target.where[1:]}, target.words


def test_the_fastest_backend_of_each_case_is_named():
    def pair(case, triton, cuda, figure="device time"):
        times = {"triton": triton, "cuda": cuda, candidates.IN_TURN: 0.1}
        return [
            row(case, name, figure, value, p20=0.9 * value, p80=1.1 * value)
            for name, value in times.items()
        ]

    alone = row("alone", "triton", "device time", p20=1.0, p80=1.0)
    rows = [*pair("a", 1.0, 2.0), *pair("b", 2.0, 1.0, "time"), *pair("c", 1.0, 1.1), alone]
    lines = compare.fastest(pd.DataFrame(rows)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["case", "shape", "in ms", "triton", "cuda", candidates.IN_TURN, "fastest"]
    assert [(line[0], line[2], line[-1]) for line in cells[2:]] == [
        ("a", "device time", "triton"),
        ("b", "time", "cuda"),
        ("c", "device time", "triton or cuda"),
    ]


def test_the_tables_of_the_readme_and_the_docs_are_what_the_results_say():
    texts = [path.read_text() for path in readme.FILES]
    for name in readme.TABLES:
        assert sum(text.count(f"<!-- {name} -->\n") for text in texts) == 1
        assert sum(text.count(f"<!-- /{name} -->\n") for text in texts) == 1
    assert [readme.rewritten(text, results.RESULTS) for text in texts] == texts


def test_a_check_accepts_what_its_calibration_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "compiled", lambda device, quick: [])
    measured = written(tmp_path / "once.csv", *check.measure(DEVICE, quick=True, rounds=2))
    assert {*measured.case} == {"cifar", "imagenet"}
    monkeypatch.setattr(check, "fresh_process", lambda rounds: measured)
    command = ["check", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--calibrate", "2"])
    check.main()
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 0
    assert "FALLEN" not in capsys.readouterr().out


def test_a_check_of_unchanged_ratios_fails_once_in_a_hundred_times():
    """Ten ratios whose runs differ by a tenth, checked as often as shows the share of failures."""
    runs = np.exp(0.1 * np.random.default_rng(0).standard_normal((2000, 10, 9)))
    chance = check.FALSE_ALARMS / 10
    failures = sum(
        any(today < check.least_accepted(kept, chance) for *kept, today in ratios)
        for ratios in runs
    )
    assert 0.004 < failures / 2000 < 0.018


def calibrated(tmp_path, *values):
    """What is kept of a ratio that so many runs measured."""
    runs = [pd.DataFrame([row(figure="time / cpp", value=value, unit="x")]) for value in values]
    return written(tmp_path / "kept.csv", *check.calibration(runs))


@pytest.mark.parametrize(("today", "verdict"), [(9.0, ""), (3.3, ""), (2.8, "FALLEN")])
def test_a_ratio_has_fallen_when_chance_does_not_explain_it(tmp_path, today, verdict):
    kept = calibrated(tmp_path, 4.0, 5.0, 4.4, 4.5)
    assert kept.value[0] == pytest.approx(4.45)
    found = check.verdicts(kept, pd.DataFrame([row(figure="time / cpp", value=today, unit="x")]))
    assert found.verdict.tolist() == [verdict]


def test_a_library_that_is_absent_is_listed_and_a_ratio_that_is_gone_has_fallen(tmp_path):
    kept = calibrated(tmp_path, 4.0, 5.0)
    other = row("imagenet", "cpp", "time / copy", 1.0, "x")
    absent = results.absent(("cifar", "1x1", "eager reference"), "time", "no module")
    found = check.verdicts(kept, pd.DataFrame([other, absent]))
    assert found.verdict.tolist() == ["absent: no module"]
    assert check.verdicts(kept, pd.DataFrame([other])).verdict.tolist() == ["FALLEN"]


def test_a_check_refuses_the_calibration_of_another_machine(tmp_path, monkeypatch):
    written(tmp_path / f"{results.file_name(DEVICE)}-check.csv", row())
    monkeypatch.setattr(sys, "argv", ["check", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="is of a machine, this is"):
        check.main()


def test_every_operator_is_benchmarked(capsys):
    options = ["-k", "tiny", "--benchmark-disable", "-p", "no:cacheprovider"]
    assert pytest.main([str(ROOT / "benchmarks" / "speed" / "bench_ops.py"), *options]) == 0
    operators, inputs, without_gradient = 9, 3, 1
    devices = [sg_kernels.backends.DEVICES[name] for name in sg_kernels.available_backends()]
    backends = sum(DEVICE in those for those in devices)
    passed = (operators * inputs - without_gradient) * backends
    assert f"{passed} passed" in capsys.readouterr().out


def test_make_gpu_survives_what_fails_and_what_hangs(tmp_path):
    python = [sys.executable, "-c"]
    alive = tmp_path / "alive"
    forks = f"trap '' INT; sleep 3; touch {alive}"  # a process that a hanging one has started
    hangs = f"import subprocess; print('so far'); subprocess.run(['sh', '-c', {forks!r}])"
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('3 failed')"
    parts = [
        gpu.Part("fine", [*python, "print('first'); print('last')"]),
        gpu.Part("failing", [*python, "import sys; print('alas'); sys.exit(3)"]),
        gpu.Part("missing", ["no-such-program"]),
        gpu.Part("asking", [*python, "import os; print(os.environ['X'])"], {"X": "answer"}),
        gpu.Part("hanging, long", [*python, f"import signal; {IGNORING}; {hangs}"]),
        gpu.Part("slow", [*python, interrupted]),
    ]
    started = time.monotonic()
    with mock.patch.multiple(gpu, GRACE=0.5, AT_ONCE=6):
        ended = {o.part.name: o for o in gpu.run(parts, tmp_path, started + 2)}
    assert ended["fine"].result == ended["asking"].result == "passed"
    assert ended["fine"].lines == ["first", "last"]
    assert ended["asking"].lines == ["answer"]
    assert (ended["failing"].result, ended["failing"].lines) == ("failed (3)", ["alas"])
    assert ended["missing"].result == "did not start"
    assert ended["slow"].result.startswith("ended after ")
    assert ended["slow"].lines == ["3 failed"]
    assert ended["hanging, long"].result.startswith("ended after ")
    assert (tmp_path / "hanging-long.log").read_text() == "so far\n"
    text = gpu.summary(list(ended.values()), tmp_path)
    assert "---- failing: failed (3)\nalas\n" in text
    assert "---- fine" not in text
    time.sleep(max(0.0, started + 5 - time.monotonic()))
    assert not alive.exists()


def test_make_gpu_ends_by_its_deadline_and_says_what_it_did_not_start(tmp_path):
    long = [sys.executable, "-c", "import time; time.sleep(60)"]
    parts = [gpu.Part(name, long) for name in "ab"]
    with mock.patch.object(gpu, "AT_ONCE", 1):
        ended = {o.part.name: o.result for o in gpu.run(parts, tmp_path, time.monotonic() + 1)}
    assert ended["a"].startswith("ended after ")
    assert ended["b"] == "not started in time"


def small_plan():
    return [
        gpu.Step("build", 30, [gpu.Part("probe", ["false"]), gpu.Part("library", ["true"])]),
        gpu.Step(
            "suites",
            30,
            [
                gpu.Part("sanitizer", ["true"], needs="probe"),
                gpu.Part("suite", ["true"], needs="library"),
            ],
        ),
    ]


def results_of(tmp_path, *chosen):
    ended = list(gpu.run_all(small_plan(), tmp_path, time.monotonic() + 60, chosen))
    assert all(o.failed == (o.part.name == "probe") for o in ended)
    return {o.part.name: o.result for o in ended}


def test_make_gpu_leaves_out_what_needs_a_part_that_failed(tmp_path):
    assert results_of(tmp_path, "build", "suites") == {
        "probe": "failed (1)",
        "library": "passed",
        "sanitizer": "left out",
        "suite": "passed",
    }


def test_a_second_call_of_make_gpu_does_the_steps_that_are_left(tmp_path):
    assert results_of(tmp_path, "suites") == {"sanitizer": "passed", "suite": "passed"}


def test_a_step_of_make_gpu_has_the_time_that_earlier_ones_left(tmp_path):
    waits = gpu.Part("waits", ["sleep", "1"])
    steps = [gpu.Step("build", 5, []), gpu.Step("tests", 0.1, [waits])]
    [ended] = gpu.run_all(steps, tmp_path, time.monotonic() + 60)
    assert ended.result == "passed"
    [ended] = gpu.run_all(steps, tmp_path, time.monotonic() + 0.1)
    assert ended.result.startswith("ended after ")


def test_make_gpu_decides_within_seven_minutes_and_ends_within_nine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    real, rehearsed = (gpu.plan(tmp_path, dry) for dry in (False, True))
    assert gpu.SECONDS + gpu.GRACE < 530
    assert tuple(step.name for step in real) == gpu.STEPS
    assert sum(step.seconds for step in real[:3]) < 7 * 60
    assert gpu.SECONDS - sum(step.seconds for step in real[:-1]) >= 60
    assert all(longer.seconds > step.seconds for step, longer in zip(real, rehearsed))
    parts, dry = (
        {part.name: part for step in steps for part in step.parts} for steps in (real, rehearsed)
    )
    kinds, of_dry = (
        {re.sub(r" \d of \d|, \w+check$", "", name) for name in names} for names in (parts, dry)
    )
    assert of_dry - kinds == {"emulation"}
    assert kinds <= of_dry
    shards = [name for name in dry if name.startswith("gpu tests")]
    assert shards == ["gpu tests 1 of 2", "gpu tests 2 of 2"]  # all that can be rehearsed
    assert parts["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert parts["build"].environment == dry["build"].environment
    assert parts["sanitizer, racecheck"].command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    logs = len(parts) * gpu.MOST_OF_A_LOG
    assert logs < 12 << 20, "with the CSV and the plots, 16 MiB"
    alone = [step.parts for step in real if step.name in ("decide", "rest")]
    assert all(len(parts) == 1 for parts in alone), "nothing runs beside what is timed"


def test_shards_hold_every_case_once_and_whole_tests():
    sizes = {"a": 1, "b": 8, "c": 2, "d": 4, "e": 3}
    cases = [SimpleNamespace(nodeid=f"{name}[{i}]") for name in sizes for i in range(sizes[name])]
    found = [[case.nodeid for case in shard] for shard in in_shards(cases, 3)]
    assert sorted(chain(*found)) == sorted(case.nodeid for case in cases)
    tests = [{name.partition("[")[0] for name in shard} for shard in found]
    assert sum(map(len, tests)) == len(sizes)
    assert [len(shard) for shard in found] == [8, 5, 5]


def test_every_test_that_make_gpu_leaves_out_exists():
    for ignored in gpu.NOT_OF_A_BACKEND:
        assert list(ROOT.glob(ignored.partition("=")[2])), ignored


def test_the_result_of_make_gpu_is_one_file_and_one_pack_of_bounded_size(tmp_path):
    work, results_ = tmp_path / "work", tmp_path / "results"
    (work / "logs").mkdir(parents=True)
    results_.mkdir()
    noise = np.random.default_rng(0).integers(32, 127, 3 << 20, np.uint8).tobytes()
    (work / "logs" / "suite.log").write_bytes(b"first" + noise + b"last")
    (work / "triton").mkdir()
    (work / "triton" / "kernel.cubin").write_bytes(noise)
    written(
        work / "gpu.csv",
        row("grid=8", "triton", "device time", 1.0, p20=0.9, p80=1.1),
        row("grid=8", "cuda", "device time", 3.0, p20=2.9, p80=3.1),
    )
    shown = gpu.Outcome(gpu.Part("machine", [], shown=True), "passed", 1.0, ["an H100"])
    gpu.write([shown], work, results_)
    assert {path.name for path in results_.iterdir()} == {"gpu.txt", "gpu-log.tar.gz"}
    text = (results_ / "gpu.txt").read_text()
    assert "---- machine: passed\nan H100\n" in text
    assert f"---- gpu.csv\n{(work / 'gpu.csv').read_text()}" in text
    assert "| grid=8" in text
    with tarfile.open(results_ / "gpu-log.tar.gz") as pack:
        assert pack.getnames() == ["gpu.csv", "logs/suite.log"]
        log = pack.extractfile("logs/suite.log").read()
    assert log.startswith(b"first")
    assert log.endswith(b"last")
    assert len(log) < gpu.MOST_OF_A_LOG + 100
    gpu.write([shown._replace(lines=["x" * 99] * (1 << 15))], work, results_)
    assert (results_ / "gpu.txt").stat().st_size <= gpu.MOST == 1 << 20
