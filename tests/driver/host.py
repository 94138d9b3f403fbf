"""The host's time of a call with Triton's own launcher, on the driver that records.

    PYTHONPATH=tests python -m driver.host

Prints the CPU time of the thread per call on tiny images, in microseconds: the median, and the 20th
and 80th percentile. A real driver adds the time of its own launch, and the images' seed is taken to
lie on their device.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import driver
import sg_kernels
from sg_kernels import backends, ops
from sg_kernels.backends.triton import launch

ROUNDS = 101
CALLS = 100
"""Calls that are timed together, to hide the clock's own cost."""


@contextmanager
def on_cpu(name: str) -> Iterator[None]:
    """The Triton backend takes tensors of the CPU for one operator."""
    with torch.library._scoped_library("sg_kernels", "IMPL") as library:
        library.impl(f"{name}.triton", ops._triton(name), "CPU")
        with mock.patch.dict(backends.DEVICES, triton=("cuda", "cpu")):
            yield


def calls_of() -> dict[str, Callable[[], Any]]:
    images, features = torch.rand(2, 3, 8, 8), torch.rand(2, 16, 4, 4)
    function = partial(sg_kernels.saliency_graft, images, features, backend="triton")
    raw = ops.overload("saliency_graft", "triton")
    with mock.patch.object(ops, "overload") as overload:
        overload.return_value.side_effect = raw
        function()
        arguments = overload.return_value.call_args.args
    undispatched = ops._triton_operators().saliency_graft
    return {
        "function": function,
        "raw operator": partial(raw, *arguments),
        "undispatched": partial(undispatched, *arguments),
    }


def time_calls(calls: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Microseconds per call, once a round. The calls take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()  # a collection would be charged to whoever runs just then
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            samples[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    gc.enable()
    return {name: np.array(values) for name, values in samples.items()}


def main() -> None:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        driver.installed(Path(folder)),
        mock.patch.object(launch, "_compiled", {}),
        on_cpu("saliency_graft"),
        torch.no_grad(),
    ):
        for name, values in time_calls(calls_of()).items():
            low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
            print(f"{name:<16}{middle:>8.1f} us  ({low:.1f} .. {high:.1f})")


if __name__ == "__main__":
    main()
