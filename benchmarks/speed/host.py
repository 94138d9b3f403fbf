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
from benchmarks.speed.measure import reason
from benchmarks.speed.results import Row, absent, row_of
from sg_kernels import ops

ROUNDS = 101
HOST_TIME = "host time"
STUBBED = ", launcher stubbed"


def calls_of(backend: str, device: str) -> dict[str, Run]:
    data = make_data(TINY, device)
    seed = ops.draw_seed()
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
    calls, missing = {}, {}
    for backend in backends:
        try:
            own = calls_of(backend, device)
            for call in own.values():
                call()
            calls.update(own)
        except Exception as error:
            missing[f"{backend} function"] = reason(error)
    yield time_calls(calls, rounds)
    where = (TINY.name, TINY.shape)
    yield [absent((*where, name), HOST_TIME, why) for name, why in missing.items()]
    for name, call in calls.items():
        yield [Row(*where, name, "operators per call", measure.count_operators(call))]


def time_calls(calls: dict[str, Run], rounds: int) -> list[Row]:
    timed = {name: measure.repeated(call) for name, call in calls.items()}
    samples = measure.interleave(timed, rounds, measure.host, HOST_TIME, {})
    return [
        row_of((TINY.name, TINY.shape, name), HOST_TIME, values / 1e3, "us")
        for name, values in samples.items()
    ]


_found: dict[tuple[Any, ...], None] = {}


def launch_stub(
    function: Any, programs: int, threads: int, arguments: tuple[Any, ...], *constants: Any
) -> None:
    """Looks a launch up, as the launcher does, and launches nothing."""
    absent = tuple([argument is None for argument in arguments])
    _found.setdefault((function, 0, threads, constants, absent))


@torch.no_grad()
def main() -> None:
    from sg_kernels.backends.triton import operators

    operators.launch = launch_stub  # type: ignore[assignment]
    torch.set_num_threads(1)
    calls = calls_of("triton", "cpu")
    raw = calls["triton raw operator"]
    calls["triton raw operator, undispatched"] = partial(operators.saliency_graft, *raw.args)
    rows = time_calls({name + STUBBED: call for name, call in calls.items()}, ROUNDS)
    for row in rows:
        print(f"{row.candidate:<52}{row.value:>8.1f} us  ({row.p20:.1f} .. {row.p80:.1f})")
    results.write(results.RESULTS / "host.csv", results.describe_run("cpu"), rows)


if __name__ == "__main__":
    main()
