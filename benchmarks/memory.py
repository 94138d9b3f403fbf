"""The peak of the resident set during a call on the CPU, over that before it and the call's own
outputs.

Each candidate has a process of its own, where the kernel keeps the peak (VmHWM) and restarts it
(clear_refs), so that whatever C++ allocates is seen. The kernel counts pages in batches: a reading
is good to 128 KiB a CPU. copy_, which allocates nothing, shows the noise, and the reference that
temporaries are seen.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sg_kernels
from benchmarks.cases import Data, headline, make_data
from benchmarks.measure import reason
from benchmarks.results import Row, absent, row_of

READINGS = 9
FIGURE = "peak memory beyond the outputs"


def peak_memory(quick: bool) -> Iterator[list[Row]]:
    case = headline("cpu", quick)[-1]
    names = ("copy_", *sg_kernels.available_backends())
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
        ]


def fresh_process(name: str) -> list[int]:
    # With glibc's moving threshold, memory freed by an earlier call would be used again unseen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", name, str(torch.get_num_threads())]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def probe(name: str, quick: bool) -> list[int]:
    """KiB beyond the outputs: of the first call at the shape, then of later ones."""

    def call(data: Data, out: Tensor) -> tuple[Tensor | None, ...]:
        if name == "copy_":
            return (out.copy_(data.images),)
        return sg_kernels.saliency_graft(data.images, data.features, out=out, backend=name)

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    warm, measured = (make_data(case, "cpu") for case in headline("cpu", quick))
    call(warm, torch.rand_like(warm.images))  # starts the threads and pages the code in
    out = torch.rand_like(measured.images)
    readings = []
    for _ in range(1 + READINGS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would not show
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        outputs = [output for output in call(measured, out)[1:] if output is not None]
        returned = sum(output.numel() * output.element_size() for output in outputs)
        readings.append(peak() - before - returned // 1024)
        del outputs
    return readings


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(probe(sys.argv[1], quick=False)))
