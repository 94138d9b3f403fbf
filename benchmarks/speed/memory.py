"""The peak resident memory of a call on the CPU, beyond what was there before and its outputs.

Each candidate runs in a process of its own. The kernel keeps its peak (VmHWM) and resets it on
request (clear_refs), so memory that C++ allocates counts too. The kernel counts pages in batches: a
reading is exact to 128 KiB per CPU. copy_, which allocates nothing, shows the noise; the reference,
eager and compiled, shows that temporaries are seen.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks.speed.candidates import COMPILED, Run, build_plain
from benchmarks.speed.cases import Case, fill, headline, make_data
from benchmarks.speed.measure import reason
from benchmarks.speed.results import Row, absent, row_of
from sg_kernels import available_backends, saliency_graft

READINGS = 9
PEAK = "peak memory beyond the outputs"
FIRST_PEAK, LATER_PEAK = f"{PEAK}, first call", f"{PEAK}, later calls"


def peak_memory(quick: bool) -> Iterator[list[Row]]:
    case = headline("cpu", quick)[-1]
    for name in ("copy_", *available_backends(), COMPILED):
        try:
            # A quick run has no time to start processes.
            readings = pd.Series(probe(name, quick) if quick else fresh_process(name), dtype=float)
        except Exception as error:
            yield [absent(case.where(name), LATER_PEAK, reason(error))]
            continue
        yield [row_of(case.where(name), LATER_PEAK, readings[1:], "KiB")]
        if name != COMPILED:  # it compiles in the first call
            yield [row_of(case.where(name), FIRST_PEAK, readings[:1], "KiB")]


def fresh_process(name: str) -> list[int]:
    # glibc would raise its threshold and keep freed memory, whose reuse would not show.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.speed.memory", name, str(torch.get_num_threads())]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def build(name: str, case: Case, quick: bool) -> Run:
    """A call that returns only what it has allocated."""
    data = make_data(case, "cpu")
    if name == COMPILED:
        return build_plain(case, data, "quick" if quick else "default")
    out = fill(torch.empty_like(data.images))
    if name == "copy_":
        return lambda: [out.copy_(data.images)][1:]
    graft = partial(saliency_graft, data.images, data.features, out=out, backend=name)
    return lambda: graft()[1:]


def probe(name: str, quick: bool) -> list[int]:
    """KiB beyond the outputs: of the first call at the shape, then of later ones."""
    warm, run = (build(name, case, quick) for case in headline("cpu", quick))
    warm()  # starts the threads and loads the code
    readings = []
    for _ in range(1 + READINGS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory still resident would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        outputs = [output for output in run() if output is not None]
        readings.append(peak() - before - sum(output.nbytes for output in outputs) // 1024)
        del outputs
    return readings


def peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(probe(sys.argv[1], quick=False)))
