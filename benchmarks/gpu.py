"""Builds, tests and measures everything on this machine's GPU, offline, within nine minutes.

    python -m benchmarks.gpu [--results DIR] [--dry]

A part that fails or hangs does not keep the others from running. DIR/gpu.txt lists how each ended,
with the last lines of those that failed; it is rewritten after every part. DIR/logs holds all that
they printed. ``--dry`` rehearses the same parts without a GPU, into build/dry: Triton's kernels
interpreted, CUDA's emulated, a few cases and tiny shapes.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
EMULATION = "build/emulation/libsg_kernels_cuda.so"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOT_OF_A_BACKEND = [
    f"--ignore-glob=tests/{name}"
    for name in (
        "benchmarks",
        "habits",
        "triton",
        "test_triton*",
        "test_distribution.py",
        "test_gpu.py",
    )
]
DEADLINE = 510
"""Seconds after the start at which whatever still runs is ended."""
TAIL = 40
"""Lines of a log that the summary repeats."""


class Part(NamedTuple):
    name: str
    command: list[str]
    limit: float
    """In seconds."""
    environment: dict[str, str] | None = None


class Outcome(NamedTuple):
    name: str
    result: str
    seconds: float
    lines: list[str]
    """What it printed."""


def stages(results: Path, dry: bool) -> list[list[Part]]:
    """The parts of a stage run at the same time, the stages one after the other."""
    if dry:
        building = {"SG_KERNELS_CUDA": "1" if shutil.which("nvcc") else "0"}
        testing = {"TRITON_INTERPRET": "1", "SG_KERNELS_EMULATION": EMULATION}
        emulation = [Part("emulation", [PYTHON, "tests/emulation/build.py", EMULATION], 100)]
        few, few_of_triton, quick = ["--cases", "1"], ["--cases", "1"], ["-m", "not slow"]
        measured, limit = ["--quick"], float(DEADLINE)
    else:
        major, minor = torch.cuda.get_device_capability()
        building = {"SG_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX"}
        testing, emulation = {}, []
        few, few_of_triton, quick = [], ["--cases", "8"], []
        measured, limit = ["--rounds", "31"], 150.0

    def tests(name: str, *arguments: str, under: tuple[str, ...] = (), **more: str) -> Part:
        # A test that hangs says where. Only the tests' own plugins, whatever is installed.
        pytest = [PYTHON, "-m", "pytest", "-vv", "-p", "no:cacheprovider"]
        command = [*under, *pytest, "-o", "faulthandler_timeout=60", *arguments]
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        return Part(name, command, limit, {**alone, **testing, **more})

    def suite(backend: str, count: int) -> list[Part]:
        these = ["-k", backend, *quick, *(few_of_triton if backend == "triton" else few)]
        return [
            tests(
                f"suite, {backend} {i + 1} of {count}",
                *(*NOT_OF_A_BACKEND, *these, "--shard", f"{i}/{count}"),
            )
            for i in range(1 if dry else count)
        ]

    def sanitized(tool: str) -> Part:
        # PyTorch itself makes calls that fail, and handles them.
        tolerant = ("--report-api-errors", "no", "--error-exitcode", "9")
        under = () if dry else ("compute-sanitizer", "--tool", tool, *tolerant)
        small = ["tests/test_gpu.py", "-m", "sanitize", "-x", *few]
        return tests(f"sanitizer, {tool}", *small, under=under, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    sanitizers = [sanitized(tool) for tool in TOOLS[: 1 if dry else None]]
    compare = [PYTHON, "-m", "benchmarks.speed.compare", "--results", str(results), *measured]
    gpu_tests = tests("gpu tests", "tests/test_gpu.py", *quick, *few)
    return [
        [Part("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 120, building), *emulation],
        # Six shards, since compiling Triton's kernels takes most of the time.
        [gpu_tests, *suite("triton", 6), *suite("cuda", 2), *sanitizers],
        [Part("benchmarks", compare, 400)],
    ]


def run(parts: list[Part], logs: Path, deadline: float) -> Iterator[Outcome]:
    """Yields how each ended, as they end. None outlives its limit, the deadline or this call."""
    running = {}
    start = time.monotonic()
    try:
        for part in parts:
            log = logs / f"{part.name.replace(',', '').replace(' ', '-')}.log"
            try:
                with log.open("w") as output:
                    process = subprocess.Popen(
                        part.command,
                        env={**os.environ, "PYTHONUNBUFFERED": "1", **(part.environment or {})},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            except OSError as error:
                yield Outcome(part.name, "did not start", 0.0, [str(error)])
            else:
                running[process] = part, log, min(start + part.limit, deadline)
        while running:
            time.sleep(0.1)
            for process, (part, log, end) in list(running.items()):
                late = process.poll() is None and time.monotonic() > end
                if late:
                    stop(process)
                if process.returncode is None:
                    continue
                del running[process]
                seconds = time.monotonic() - start
                failed = f"failed ({process.returncode})" if process.returncode else "passed"
                result = f"ended after {seconds:.1f} s" if late else failed
                lines = log.read_text(errors="replace").splitlines()
                yield Outcome(part.name, result, seconds, [line for line in lines if line.strip()])
    finally:
        for process in running:
            stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends it with everything that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(outcomes: list[Outcome]) -> str:
    """The last lines of the parts that failed, then a table of all."""
    failed = [outcome for outcome in outcomes if outcome.result != "passed"]
    ends = ["\n".join([f"---- {o.name}: {o.result}", *o.lines[-TAIL:]]) for o in failed]
    line = "{:<24}  {:<20}  {:>7}  {}".format
    rows = [line(o.name, o.result, f"{o.seconds:.0f}", "".join(o.lines[-1:])) for o in outcomes]
    header = line("part", "result", "seconds", "its last line")
    return "\n\n".join([*ends, "\n".join([header, *rows])]) + "\n"


def main() -> None:
    deadline = time.monotonic() + DEADLINE
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="where to write")
    parser.add_argument("--dry", action="store_true", help="rehearse it without a GPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("There is no CUDA device; --dry rehearses without one.")
    results = options.results or ROOT / ("build/dry" if options.dry else "benchmarks/results")
    results = results.resolve()
    os.chdir(ROOT)
    # CUDA is often installed without being on the PATH.
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    logs = results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    outcomes: list[Outcome] = []
    for stage in stages(results, options.dry):
        print("running " + "; ".join(part.name for part in stage), flush=True)
        for outcome in run(stage, logs, deadline):
            outcomes.append(outcome)
            (results / "gpu.txt").write_text(summary(outcomes))
            print(f"{outcome.seconds:5.0f} s  {outcome.name}: {outcome.result}", flush=True)
    print(f"\n{summary(outcomes)}")
    sys.exit(any(outcome.result != "passed" for outcome in outcomes))


if __name__ == "__main__":
    main()
