"""What a call of the Triton backend costs the host, less the driver: its launcher is stubbed.

    python -m benchmarks.host

Needs no GPU: the operators take CPU tensors under TRITON_INTERPRET=1, which this sets, and the stub
does all of a launch but Triton's own part. Writes benchmarks/results/host.csv.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from functools import partial
from typing import Any

import torch

import sg_kernels
from benchmarks import cases, measure, results
from benchmarks.cases import make_data
from benchmarks.compare import AT_LEAST_NS, HOST_TIME, operator_arguments
from benchmarks.results import row_of
from sg_kernels import ops
from sg_kernels.kernels import operators

ROUNDS = 101
_found: dict[tuple[Any, ...], None] = {}


def stub(
    function: Any, programs: int, threads: int, arguments: tuple[Any, ...], *constants: Any
) -> None:
    absent = tuple([argument is None for argument in arguments])
    _found.setdefault((function, 0, threads, constants, absent))


def main() -> None:
    operators.launch = stub  # type: ignore[assignment]
    torch.set_num_threads(1)
    case, device = cases.TINY, "cpu"
    data = make_data(case, device)
    out = torch.empty_like(data.images)
    function = partial(sg_kernels.saliency_graft, data.images, data.features, backend="triton")
    module = sg_kernels.SaliencyGraft(backend="triton")
    arguments = operator_arguments(case, data, device)
    calls = {
        "function": function,
        "function, seed given": partial(function, seed=torch.tensor([1])),
        "function, out=": partial(function, out=out),
        "module": partial(module, data.images, features=data.features),
        "raw operator": partial(ops.overload("saliency_graft", "triton"), *arguments),
        "raw operator, undispatched": partial(operators.saliency_graft, *arguments),
    }
    timed = {
        f"triton {name}, launcher stubbed": measure.repeated(call, AT_LEAST_NS)
        for name, call in calls.items()
    }
    with torch.no_grad():
        samples = measure.interleave(timed, ROUNDS, measure.host, "host time", {})
    rows = [
        row_of(case.name, case.shape, name, HOST_TIME, values / 1e3, "us")
        for name, values in samples.items()
    ]
    for row in rows:
        print(f"{row.candidate:<48}{row.value:>8.1f} us  ({row.p20:.1f} .. {row.p80:.1f})")
    results.write(results.RESULTS / "host.csv", results.describe_run(device), rows)


if __name__ == "__main__":
    main()
