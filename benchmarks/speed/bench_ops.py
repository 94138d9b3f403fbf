"""Every public operator on every backend that runs here, at the shapes of the paper.

pytest benchmarks/speed/bench_ops.py
pytest benchmarks/speed/bench_ops.py -k "saliency_graft and resnet50"
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sg_kernels
from benchmarks.speed import cases
from benchmarks.speed.candidates import empty_rows
from benchmarks.speed.cases import Case, Data, fill, make_data
from benchmarks.speed.measure import synchronize
from sg_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN_HERE = [name for name in sg_kernels.available_backends() if DEVICE in backends.DEVICES[name]]

pytestmark = [
    pytest.mark.parametrize(
        "case", cases.paper(DEVICE), ids=lambda case: case.name, scope="module"
    ),
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

    def run(function: Callable[..., Any], *args: Any, grad: bool = False, **options: Any) -> Any:
        def call() -> Any:
            result = function(*args, **options)
            synchronize()
            return result

        with torch.set_grad_enabled(grad):
            return benchmark(call)

    return run


@pytest.fixture
def graft(case: Case, data: Data, backend: str) -> Callable[..., sg_kernels.GraftResult]:
    options = {"backend": backend, **case.options}
    return partial(sg_kernels.saliency_graft, features=data.features, **options)


def test_saliency_graft(timed, graft, data):
    timed(graft, data.images)


def test_saliency_graft_out(timed, graft, case, data):
    timed(graft, data.images, out=empty_rows(case, data))


def test_saliency_graft_targets(timed, graft, case, data):
    timed(graft, data.images, targets=data.labels, num_classes=case.num_classes)


def test_saliency_graft_backward(timed, graft, data):
    if not data.images.is_floating_point():
        pytest.skip("integers have no gradient")
    images = data.images.detach().requires_grad_()
    grafted = graft(images).images
    # In the strides of the output: what a convolution behind it would pass back.
    gradient = fill(torch.empty_like(grafted, requires_grad=False))
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


def test_mix_criterion(timed, graft, case, data):
    logits = torch.randn(len(data.labels), case.num_classes, device=DEVICE)
    criterion = partial(F.cross_entropy, reduction="none")
    timed(sg_kernels.mix_criterion, criterion, logits, data.labels, graft(data.images))


def test_module(timed, case, data, backend):
    module = sg_kernels.SaliencyGraft(num_classes=case.num_classes, backend=backend, **case.options)
    timed(module.to(DEVICE), data.images, data.labels, features=data.features)
