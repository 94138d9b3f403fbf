"""The host's time of a call, on images so small that nothing else is left.

    python -m benchmarks.speed.host

measures the Triton backend without a GPU: its operators take CPU tensors under TRITON_INTERPRET=1,
which this sets, and a stub replaces its launcher. So Triton's own part of a launch and the driver's
are missing. Writes benchmarks/results/host.csv.
"""

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

import sg_kernels
from benchmarks.speed import measure, results
from benchmarks.speed.candidates import Run, operator_call
from benchmarks.speed.cases import TINY, make_data
from benchmarks.speed.results import Row, absent, row_of
from sg_kernels import ops

HOST_TIME, OPERATORS = "host time", "operators per call"
STUBBED = ", launcher stubbed"


def calls_of(backend: str, device: str) -> dict[str, Run]:
    data, seed = make_data(TINY, device), ops.draw_seed()
    call = operator_call(TINY, data.images, data.features, seed.to(device))
    graft = partial(sg_kernels.saliency_graft, data.images, data.features, backend=backend)
    module = sg_kernels.SaliencyGraft(backend=backend).to(device)
    return {
        f"{backend} function": graft,
        f"{backend} function, seed given": partial(graft, seed=seed),
        f"{backend} function, out=": partial(graft, out=torch.empty_like(data.images)),
        f"{backend} module": partial(module, data.images, features=data.features),
        f"{backend} raw operator": partial(ops.overload("saliency_graft", backend), *call),
    }


def host_times(backends: Iterable[str], device: str, rounds: int) -> Iterator[list[Row]]:
    calls: dict[str, Run] = {}
    for backend in backends:
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


_found: dict[tuple[Any, ...], None] = {}


def launch_stub(
    function: Any, programs: int, threads: int, arguments: tuple[Any, ...], *constants: Any
) -> None:
    """Looks a launch up, as the launcher does, and launches nothing."""
    missing = tuple([memory is None for memory in arguments[0]])
    _found.setdefault((function, 0, threads, constants, missing))


@torch.no_grad()
def main() -> None:
    from sg_kernels.backends.triton import operators

    operators.launch = launch_stub  # type: ignore[assignment]
    torch.set_num_threads(1)
    calls = calls_of("triton", "cpu")
    arguments = calls["triton raw operator"].args
    calls["triton raw operator, undispatched"] = partial(operators.saliency_graft, *arguments)
    calls = {name + STUBBED: call for name, call in calls.items()}
    rows = [row for more in time_calls(calls, rounds=101) for row in more]
    for row in rows:
        print(f"{row.candidate:<52}{row.value:>8.1f} us  ({row.p20:.1f} .. {row.p80:.1f})")
    results.write(results.RESULTS / "host.csv", results.describe_run("cpu"), rows)


if __name__ == "__main__":
    main()
