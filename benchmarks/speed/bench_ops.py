"""Every public operator on every backend that runs here, at the shapes of the paper.

pytest benchmarks/bench_ops.py
pytest benchmarks/bench_ops.py -k "saliency_graft and resnet50"
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sg_kernels
from benchmarks import cases
from benchmarks.candidates import empty_rows
from benchmarks.cases import Case, Data, fill, make_data
from benchmarks.measure import synchronize
from sg_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN_HERE = [name for name in sg_kernels.available_backends() if DEVICE in backends.DEVICES[name]]
CASES = [*cases.paper(DEVICE, quick=True), *cases.paper(DEVICE, quick=False)]

pytestmark = [
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name, scope="module"),
    pytest.mark.parametrize("backend", RUN_HERE),
]


@pytest.fixture(scope="module")
def data(case: Case) -> Data:
    torch.manual_seed(0)
    return make_data(case, DEVICE)


@pytest.fixture
def timed(benchmark: Any, case: Case) -> Callable[..., Any]:
    """Times a call until its result exists."""
    benchmark.group = case.name
    benchmark.extra_info["shape"] = case.shape

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def call() -> Any:
            result = function(*args, **options)
            synchronize()
            return result

        with torch.set_grad_enabled(options.pop("grad", False)):
            return benchmark(call)

    return run


def graft(case: Case, data: Data, backend: str, **more: Any) -> sg_kernels.GraftResult:
    return sg_kernels.saliency_graft(
        data.images, data.features, backend=backend, **case.options, **more
    )


def test_saliency_graft(timed, case, data, backend):
    timed(graft, case, data, backend)


def test_saliency_graft_out(timed, case, data, backend):
    timed(graft, case, data, backend, out=empty_rows(case, data))


def test_saliency_graft_targets(timed, case, data, backend):
    timed(graft, case, data, backend, targets=data.labels, num_classes=case.num_classes)


def test_saliency_graft_backward(timed, case, data, backend):
    if not data.images.is_floating_point():
        pytest.skip("integers have no gradient")
    images = data.images.detach().requires_grad_()
    with torch.enable_grad():
        grafted = graft(case, data._replace(images=images), backend).images
    # Its own strides: what a convolution behind it would hand back.
    gradient = fill(torch.empty_like(grafted))
    timed(torch.autograd.grad, grafted, images, gradient, retain_graph=True, grad=True)


def test_channel_saliency(timed, case, data, backend):
    tokens = {"token_grid": case.token_grid, "prefix_tokens": case.prefix_tokens}
    timed(sg_kernels.channel_saliency, data.features, backend=backend, **tokens)


def test_graft(timed, case, data, backend):
    mask = torch.rand(len(data.images), *case.map_size, device=DEVICE) < 0.5
    index = torch.randperm(len(data.images), device=DEVICE)
    timed(sg_kernels.graft, data.images, mask, index, backend=backend)


def test_mix_targets(timed, case, data, backend):
    lam = torch.rand(len(data.labels), device=DEVICE)
    index = torch.randperm(len(data.labels), device=DEVICE)
    timed(sg_kernels.mix_targets, data.labels, lam, index, case.num_classes, backend=backend)


def test_mix_criterion(timed, case, data, backend):
    result = graft(case, data, backend)
    logits = torch.randn(len(data.labels), case.num_classes, device=DEVICE)

    def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    timed(sg_kernels.mix_criterion, criterion, logits, data.labels, result)


def test_module(timed, case, data, backend):
    module = sg_kernels.SaliencyGraft(num_classes=case.num_classes, backend=backend, **case.options)
    timed(module.to(DEVICE), data.images, data.labels, features=data.features)
