"""Builds, tests and measures everything on this machine's GPU, offline, within nine minutes.

    python -m benchmarks.gpu [--steps STEP ...] [--seconds N] [--results DIR] [--dry]

In this order, so that what is cut off matters least:

    build    the compiled backends, for this GPU alone
    tests    the tests of the GPU
    decide   times and ratios: Triton beside CUDA at every size, launches in turn, other tiles
    suites   the whole suite on both backends, the comparison with the reference, compute-sanitizer
    rest     training steps, counters, and the compiled reference

A step, or a part of it, that fails or hangs does not keep the others from running. A second call
with ``--steps`` does what the first has left, on what that has built and measured.

DIR, build/gpu unless given, gets two files, rewritten after every part: gpu.txt says how each part
ended and on which machine, and holds the tables and the CSV of the benchmarks; gpu-log.tar.gz holds
all that was printed, the CSV and the plots. ``--dry`` rehearses the same steps without a GPU:
Triton's kernels interpreted, CUDA's compiled and emulated, two shards of each suite, a few cases
and tiny shapes, and more time.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
EMULATION = "build/emulation/libsg_kernels_cuda.so"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MACHINE = "nvidia-smi; nvcc --version; lscpu | head -20; free -g"
PROBE = "import torch; assert torch.ones(9, device='{}').sum().item() == 9; print('it runs')"
NOT_OF_A_BACKEND = [
    f"--ignore-glob=tests/{name}"
    for name in (
        *("benchmarks", "habits", "test_triton*", "test_driver.py", "test_gpu.py"),
        *("test_distribution.py", "test_docs.py", "test_examples.py", "test_setup.py"),
        "test_timm.py",
    )
]
AT_ONCE = (os.cpu_count() or 1) + 2
"""Parts of a step that run side by side; some of them wait for the GPU."""
SECONDS = 510.0
"""After these whatever still runs is interrupted, and what has not begun is left out."""
GRACE = 8.0
"""Seconds in which what was interrupted may say what it has, before it is killed."""
PATIENCE = 6
"""So many times as long may a rehearsal take, on two processors that others use too."""
STEPS = ("build", "tests", "decide", "suites", "rest")
TAIL = 40
"""Lines of a log that gpu.txt repeats where a part failed."""
RULE = "---- "
"""Begins what gpu.txt holds below its tables."""
MOST, MOST_OF_A_LOG = 1 << 20, 1 << 18
"""Bytes of gpu.txt; of each log in the pack, so that four dozen stay below 16 MiB."""


class Part(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str] | None = None
    needs: str | None = None
    """The part of an earlier step without which this one is left out, if that was tried."""
    shown: bool = False
    """Whether gpu.txt repeats all that it prints."""


class Step(NamedTuple):
    """Parts that run at the same time."""

    name: str
    seconds: float
    """To which those add that earlier steps have left of theirs."""
    parts: list[Part]


class Outcome(NamedTuple):
    part: Part
    result: str
    seconds: float
    lines: list[str]
    """What it printed."""

    @property
    def failed(self) -> bool:
        return self.result not in ("passed", "left out")


def plan(work: Path, dry: bool) -> list[Step]:
    """The steps, one after the other."""
    device, patience = ("cpu", PATIENCE) if dry else ("cuda", 1)
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    building = {"SG_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    build = [PYTHON, "setup.py", "build_ext", "--inplace", "--force", "--parallel", "2"]
    emulation = [Part("emulation", [PYTHON, "tests/emulation/build.py", EMULATION])]
    probe = [*under("memcheck", dry), PYTHON, "-c", PROBE.format(device)]
    package = [PYTHON, "-m", "sg_kernels"]
    first, more = suites(dry)
    verify = Part("verify", [*package, "verify", "--device", device], shown=True)
    built = [
        Part("build", build, building),
        *emulation[: int(dry)],
        Part("sanitizer probe", probe),
        Part("machine", ["sh", "-c", MACHINE], shown=True),
    ]
    environment = Part("environment", [*package, "info"], rehearsal(dry), shown=True)
    steps = [
        Step("build", 100, built),
        Step("tests", 110, [environment, *first]),
        Step("decide", 140, [compared("deciding", work, dry)]),
        Step("suites", 100, [verify, *more]),
        Step("rest", SECONDS, [compared("rest", work, dry)]),
    ]
    return [step._replace(seconds=step.seconds * patience) for step in steps]


def rehearsal(dry: bool) -> dict[str, str]:
    """The environment in which kernels run without a GPU."""
    return {"TRITON_INTERPRET": "1", "SG_KERNELS_EMULATION": EMULATION} if dry else {}


def compared(part: str, work: Path, dry: bool) -> Part:
    """A part of the benchmarks, beside which nothing else may run."""
    command = [PYTHON, "-m", "benchmarks.speed.compare", "--part", part, "--results", str(work)]
    rounds = ["--quick"] if dry else ["--rounds", "31"]
    environment = {**rehearsal(dry), "TQDM_DISABLE": "1"}
    return Part(f"benchmarks, {part}", [*command, *rounds], environment)


def under(tool: str, dry: bool) -> list[str]:
    """The command of compute-sanitizer. PyTorch makes calls that fail, and handles them: memcheck
    alone looks at them, and has an option to let them pass.
    """
    tolerant = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [] if dry else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tolerant]


def suites(dry: bool) -> tuple[list[Part], list[Part]]:
    """The tests of the GPU, then all others: in shards, as compiling Triton's kernels takes most of
    the time. Each is a process: a kernel that brings the device down fails the tests that come
    after it in its own shard only.
    """
    few, quick = (["--cases", "1"], ["-m", "not slow"]) if dry else ([], [])
    # A test that hangs says where. Only the tests' own plugins, whatever is installed.
    pytest = [PYTHON, "-m", "pytest", "-vv", "-ra", "-p", "no:cacheprovider"]
    pytest += ["-o", f"faulthandler_timeout={60 * (PATIENCE if dry else 1)}"]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"NCCL_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= rehearsal(dry)

    def shards(name: str, count: int, *arguments: str, needs: str | None = None) -> list[Part]:
        command = [*pytest, *arguments, *quick, "--shard"]
        return [
            Part(f"{name} {i + 1} of {count}", [*command, f"{i}/{count}"], environment, needs)
            for i in range(count)
        ]

    def sanitized(tool: str) -> Part:
        marks = "sanitize and not slow" if dry else "sanitize"
        small = [*under(tool, dry), *pytest, "tests/test_gpu.py", "-m", marks, "-x", *few]
        uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(f"sanitizer, {tool}", small, uncached, needs="sanitizer probe")

    first = shards("gpu tests", 2 if dry else 8, "tests/test_gpu.py", *few)
    several = few or ["--cases", "8"]
    triton = shards("suite, triton", 8, *NOT_OF_A_BACKEND, "-k", "triton", *several)
    cuda = shards("suite, cuda", 4, *NOT_OF_A_BACKEND, "-k", "cuda", *few, needs="build")
    some, one = (2, 1) if dry else (None, None)  # interpreting all takes too long: `make test` does
    return first, [*triton[:some], *cuda[:some], *map(sanitized, TOOLS[:one])]


class Running(NamedTuple):
    part: Part
    log: Path
    process: "subprocess.Popen[bytes]"
    start: float

    @classmethod
    def begin(cls, part: Part, logs: Path) -> "Running":
        log = logs / f"{part.name.replace(',', '').replace(' ', '-')}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                part.command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(part.environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(part, log, process, time.monotonic())

    def send(self, number: int) -> None:
        """To it and to everything that it has started."""
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def outcome(self, late: bool) -> Outcome:
        seconds, code = time.monotonic() - self.start, self.process.returncode
        result = f"ended after {seconds:.1f} s" if late else f"failed ({code})" * bool(code)
        lines = self.log.read_text(errors="replace").splitlines()
        printed = [line for line in lines if line.strip()]
        return Outcome(self.part, result or "passed", seconds, printed)


def run(parts: list[Part], logs: Path, end: float) -> Iterator[Outcome]:
    """Yields how each part ended, as they end, at the latest soon after the time ``end``."""
    waiting, running, interrupted = list(parts), list[Running](), False
    try:
        while waiting or running:
            if not interrupted and time.monotonic() > end:
                # As Ctrl-C would: pytest then shows the failures so far.
                interrupted = True
                for each in running:
                    each.send(signal.SIGINT)
                yield from (Outcome(part, "not started in time", 0.0, []) for part in waiting)
                waiting.clear()
            while waiting and len(running) < AT_ONCE:
                part = waiting.pop(0)
                try:
                    running.append(Running.begin(part, logs))
                except OSError as error:
                    yield Outcome(part, "did not start", 0.0, [str(error)])
            time.sleep(0.1)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                yield each.outcome(late=interrupted)
            if time.monotonic() > end + GRACE:
                for each in running:
                    each.stop()
    finally:
        for each in running:
            each.stop()


def run_all(
    planned: Iterable[Step], logs: Path, deadline: float, chosen: Iterable[str] = STEPS
) -> Iterator[Outcome]:
    """The steps ``chosen``, without the parts that need what failed."""
    passed: set[str | None] = {None}
    end = time.monotonic()
    for step in planned:
        if step.name not in chosen:  # done by an earlier call
            passed |= {part.name for part in step.parts}
            continue
        wanted = [part for part in step.parts if part.needs in passed]
        for part in step.parts:
            if part not in wanted:
                yield Outcome(part, "left out", 0.0, [f"{part.needs} did not pass"])
        print(f"{step.name}: " + "; ".join(part.name for part in wanted), flush=True)
        end += step.seconds
        for outcome in run(wanted, logs, min(end, deadline)):
            passed |= {outcome.part.name} if outcome.result == "passed" else set()
            yield outcome


def summary(outcomes: list[Outcome], work: Path) -> str:
    """All parts, the tables of the benchmarks, the last lines of what failed, and the CSV."""
    line = "{:<24}  {:<20}  {:>7}  {}".format
    rows = [
        line(o.part.name, o.result, f"{o.seconds:.0f}", "".join(o.lines[-1:])) for o in outcomes
    ]
    files = list(work.glob("*.csv"))
    sections = ["\n".join([line("part", "result", "seconds", "its last line"), *rows])]
    sections += map(tables, files)
    for part, result, _, lines in outcomes:
        if part.shown or result not in ("passed", "left out"):
            chosen = lines if part.shown else lines[-TAIL:]
            sections.append("\n".join([f"{RULE}{part.name}: {result}", *chosen]))
    sections += [f"{RULE}{csv.name}\n{csv.read_text()}" for csv in files]
    return "\n\n".join(sections).encode()[: MOST - 1].decode(errors="ignore") + "\n"


def tables(csv: Path) -> str:
    """Of the benchmarks, as far as they have come."""
    try:
        from benchmarks.speed import compare, results

        return compare.tables(results.read(csv))
    except Exception as error:  # the rest of the summary is worth having without
        return f"no tables: {type(error).__name__}: {error}"


def pack(work: Path, path: Path) -> None:
    """What the parts printed, the CSV and the plots. Of a long log the start and the end."""
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz") as archive:
        for file in sorted(work.rglob("*")):
            if file.suffix not in (".log", ".csv", ".png"):
                continue
            content = file.read_bytes()
            if file.suffix == ".log" and len(content) > MOST_OF_A_LOG:
                half = MOST_OF_A_LOG // 2
                content = content[:half] + b"\n[...]\n" + content[-half:]
            entry = tarfile.TarInfo(file.relative_to(work).as_posix())
            entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    unfinished.replace(path)


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="these alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"({SECONDS:.0f})")
    parser.add_argument("--results", type=Path, help="where gpu.txt and gpu-log.tar.gz go")
    parser.add_argument("--dry", action="store_true", help="rehearse it without a GPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("There is no CUDA device; --dry rehearses without one.")
    work = ROOT / "build" / ("gpu-dry" if options.dry else "gpu")
    results, logs = (options.results or work).resolve(), work / "logs"
    os.chdir(ROOT)
    if STEPS[0] in options.steps:
        shutil.rmtree(work, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    # CUDA is often installed without being on the PATH. What one part compiles, all others use.
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    os.environ["TRITON_CACHE_DIR"] = str(work / "triton")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    # In the background of a shell it is ignored, and the parts would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: list[Outcome] = []
    deadline = start + options.seconds * (PATIENCE if options.dry else 1)
    try:
        for outcome in run_all(plan(work, options.dry), logs, deadline, options.steps):
            outcomes.append(outcome)
            write(outcomes, work, results)
            print(f"{outcome.seconds:5.0f} s  {outcome.part.name}: {outcome.result}", flush=True)
    finally:  # where it is ended from outside, too
        write(outcomes, work, results)
    print(f"\n{(results / 'gpu.txt').read_text().partition(RULE)[0]}wrote {results}")
    sys.exit(any(outcome.failed for outcome in outcomes))


def write(outcomes: list[Outcome], work: Path, results: Path) -> None:
    (results / "gpu.txt").write_text(summary(outcomes, work))
    pack(work, results / "gpu-log.tar.gz")


if __name__ == "__main__":
    main()
