"""The host's time of a call, on images so small that nothing else is left.

    make host

measures the Triton backend without a GPU, on a driver that records launches instead of making them.
Calls are repeated in C++ as on a GPU, or all made by Python, with Triton's own launcher. A real
driver adds the time of its own launch. Writes benchmarks/results/host.csv.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import sg_kernels
from benchmarks.speed import measure, results
from benchmarks.speed.candidates import Run, operator_call, replacing
from benchmarks.speed.cases import TINY, make_data
from benchmarks.speed.results import Row, absent, row_of
from sg_kernels import backends, ops

HOST_TIME, OPERATORS = "host time", "operators per call"
RECORDED, BY_PYTHON = ", on a driver that records", ", made by Python"


def calls_of(backend: str, device: str) -> dict[str, Run]:
    data, seed = make_data(TINY, device), ops.draw_seed()
    call = operator_call(TINY, data.images, data.features, seed.to(device))
    graft = partial(sg_kernels.saliency_graft, data.images, data.features, backend=backend)
    module = sg_kernels.SaliencyGraft(backend=backend).to(device)
    calls = {
        f"{backend} function": graft,
        f"{backend} function, seed given": partial(graft, seed=seed),
        f"{backend} function, out=": partial(graft, out=torch.empty_like(data.images)),
        f"{backend} module": partial(module, data.images, features=data.features),
        f"{backend} raw operator": partial(ops.overload("saliency_graft", backend), *call),
    }
    if backend == "triton":
        calls |= {name + BY_PYTHON: made_by_python(run) for name, run in calls.items()}
    return calls


def made_by_python(call: Run) -> Run:
    """A call that libsg_kernels_triton.so does not repeat."""
    from sg_kernels.backends.triton import repeat

    return replacing(repeat, "AVAILABLE", False, call)


def host_times(names: Iterable[str], device: str, rounds: int) -> Iterator[list[Row]]:
    calls: dict[str, Run] = {}
    for backend in names:
        try:
            calls |= calls_of(backend, device)
        except Exception as error:
            yield [absent(TINY.where(f"{backend} function"), HOST_TIME, measure.reason(error))]
    yield from time_calls(calls, rounds)
    for name, call in calls.items():
        yield [Row(*TINY.where(name), OPERATORS, measure.count_operators(call))]


def time_calls(calls: dict[str, Run], rounds: int) -> Iterator[list[Row]]:
    timed = {name: measure.repeated(call) for name, call in calls.items()}
    samples, failed = measure.interleave(timed, rounds, measure.host, HOST_TIME)
    for name, values in samples.items():
        yield [row_of(TINY.where(name), HOST_TIME, values / 1e3, "us")]
    yield [absent(TINY.where(name), HOST_TIME, why) for name, why in failed.items()]


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """The Triton backend takes tensors of the CPU, as if they lay on an H100."""
    from sg_kernels.backends.triton import launch, repeat
    from tests import driver

    def can_repeat(images: Tensor) -> bool:
        return repeat.AVAILABLE

    with (
        tempfile.TemporaryDirectory() as folder,
        driver.installed(Path(folder)),
        mock.patch.object(launch, "_compiled", {}),
        mock.patch.dict(backends.DEVICES, triton=("cuda", "cpu")),
        mock.patch.object(repeat, "can_repeat", can_repeat),
        torch.library._scoped_library("sg_kernels", "IMPL") as library,
    ):
        library.impl("saliency_graft.triton", ops._triton("saliency_graft"), "CPU")
        yield


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    with triton_on_cpu():
        calls = {name + RECORDED: call for name, call in calls_of("triton", "cpu").items()}
        rows = [row for more in time_calls(calls, rounds=101) for row in more]
    for row in rows:
        print(f"{row.candidate:<60}{row.value:>8.1f} us  ({row.p20:.1f} .. {row.p80:.1f})")
    results.write(results.RESULTS / "host.csv", results.describe_run("cpu"), rows)


if __name__ == "__main__":
    main()
