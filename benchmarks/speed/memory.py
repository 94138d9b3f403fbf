"""The peak of the resident set during a call on the CPU, over that before it and the call's own
outputs.

Each candidate has a process of its own, where the kernel keeps the peak (VmHWM) and restarts it
(clear_refs), so that whatever C++ allocates is seen. The kernel counts pages in batches: a reading
is good to 128 KiB a CPU. copy_, which allocates nothing, shows the noise, and the reference, eager
and compiled, that temporaries are seen.
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

import numpy as np
import torch

from benchmarks.candidates import Call, build_plain
from benchmarks.cases import Case, fill, headline, make_data
from benchmarks.measure import reason
from benchmarks.results import Row, absent, row_of
from sg_kernels import available_backends, saliency_graft

READINGS = 9
FIGURE = "peak memory beyond the outputs"
COMPILED = "compiled reference"


def peak_memory(quick: bool) -> Iterator[list[Row]]:
    case = headline("cpu", quick)[-1]
    names = ("copy_", *available_backends(), COMPILED)
    for name in names:
        where = (case.name, case.shape, name)
        try:
            # A quick run has no time for processes of their own.
            first, *later = probe(name, quick) if quick else fresh_process(name)
        except Exception as error:
            yield [absent(*where, FIGURE, reason(error))]
            continue
        yield [
            row_of(*where, f"{FIGURE}, {label}", np.array(readings, float), "KiB")
            for label, readings in (("first call", [first]), ("later calls", later))
            if (name, label) != (COMPILED, "first call")  # which compiles
        ]


def fresh_process(name: str) -> list[int]:
    # With glibc's moving threshold, memory freed by an earlier call would be used again unseen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", name, str(torch.get_num_threads())]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def probe(name: str, quick: bool) -> list[int]:
    """KiB beyond the outputs: of the first call at the shape, then of later ones."""

    def build(case: Case) -> Call:
        """A call that returns what it has made anew."""
        data = make_data(case, "cpu")
        if name == COMPILED:
            return build_plain(case, data, "quick" if quick else "default")
        out = fill(torch.empty_like(data.images))
        if name == "copy_":
            return lambda: [out.copy_(data.images)][1:]
        graft = partial(saliency_graft, data.images, data.features, out=out, backend=name)
        return lambda: graft()[1:]

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    warm, call = (build(case) for case in headline("cpu", quick))
    warm()  # starts the threads and pages the code in
    readings = []
    for _ in range(1 + READINGS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would not show
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        outputs = [output for output in call() if output is not None]
        returned = sum(output.numel() * output.element_size() for output in outputs)
        readings.append(peak() - before - returned // 1024)
        del outputs
    return readings


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(probe(sys.argv[1], quick=False)))
