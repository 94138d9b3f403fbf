"""Builds, tests and measures everything on this machine's GPU, offline.

    python -m benchmarks.gpu [--results DIR] [--dry]

Runs every part whatever becomes of the others, and says in one table last how each ended; what a
part printed is in DIR/logs. ``--dry`` rehearses it without a GPU: Triton's kernels interpreted,
CUDA's emulated, a few cases and tiny shapes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

PYTHON = sys.executable
EMULATION = "build/emulation/libsg_kernels_cuda.so"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOT_OF_A_BACKEND = [
    f"--ignore=tests/{name}.py"
    for name in ("test_benchmarks", "test_distribution", "test_gpu", "test_triton")
]


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
    detail: str


def stages(results: Path, dry: bool) -> list[list[Part]]:
    """What runs when: the parts of a stage run at once."""
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]
    suite = [*pytest, *NOT_OF_A_BACKEND]
    compare = [PYTHON, "-m", "benchmarks.compare", "--results", str(results)]
    build = Part("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 170)
    if dry:
        emulated = {"SG_KERNELS_EMULATION": EMULATION}
        interpreted = {"TRITON_INTERPRET": "1"}
        few = ["-m", "not slow", "--cases"]
        return [
            [build],
            [Part("emulation", [PYTHON, "tests/emulation/build.py", EMULATION], 120)],
            [Part("gpu tests", [*pytest, "tests/test_gpu.py"], 120)],
            [
                Part("suite, triton", [*suite, "-k", "triton", *few, "1"], 300, interpreted),
                Part("suite, cuda", [*suite, "-k", "cuda", *few, "3"], 300, emulated),
            ],
            [Part("sanitized cases", [*pytest, "tests/test_gpu.py", "-m", "sanitize"], 60)],
            [Part("benchmarks", [*compare, "--quick"], 240)],
        ]
    major, minor = torch.cuda.get_device_capability()
    here = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX", "SG_KERNELS_CUDA": "1"}
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    sanitized = [*pytest, "tests/test_gpu.py", "-m", "sanitize", "-x"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        [build._replace(environment=here)],
        [Part("gpu tests", [*pytest, "tests/test_gpu.py", "-m", "not sanitize"], 120)],
        [
            Part("suite, triton", [*suite, "-k", "triton", "--cases", "8"], 150),
            Part("suite, cuda", [*suite, "-k", "cuda"], 150),
            *[
                Part(
                    f"sanitizer, {tool}",
                    [sanitizer, "--tool", tool, "--error-exitcode", "9", *sanitized],
                    150,
                    uncached,
                )
                for tool in TOOLS
            ],
        ],
        [Part("benchmarks", [*compare, "--rounds", "31"], 200)],
    ]


def run(part: Part, logs: Path) -> Outcome:
    start = time.monotonic()
    log = logs / f"{part.name.replace(', ', '-').replace(' ', '-')}.log"
    try:
        with log.open("w") as output:
            process = subprocess.run(
                part.command,
                env={**os.environ, **(part.environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=part.limit,
            )
        result = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        result = f"over {part.limit:g} s"
    except OSError as error:
        log.write_text(str(error))
        result = "did not start"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    detail = lines[-1].strip("= ") if lines else ""
    return Outcome(part.name, result, time.monotonic() - start, detail)


def table(outcomes: list[Outcome]) -> str:
    rows = [("part", "result", "seconds", "its last line")]
    rows += [(o.name, o.result, f"{o.seconds:.0f}", o.detail[:80]) for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {result:<{widths[1]}}  {seconds:>{widths[2]}}  {detail}"
        for name, result, seconds, detail in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry", action="store_true", help="rehearse it without a GPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("There is no CUDA device; --dry rehearses without one.")
    os.chdir(Path(__file__).parent.parent)
    results = options.results.resolve()
    logs = results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in stages(results, options.dry):
        print("running " + "; ".join(part.name for part in stage), flush=True)
        with ThreadPoolExecutor(len(stage)) as pool:
            outcomes += pool.map(lambda part: run(part, logs), stage)
    summary = table(outcomes)
    (results / "gpu.txt").write_text(summary + "\n")
    print(f"\n{summary}")
    sys.exit(any(outcome.result != "passed" for outcome in outcomes))


if __name__ == "__main__":
    main()
