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
from benchmarks.speed.candidates import Run, empty_rows
from benchmarks.speed.cases import Case, Data, fill, make_data
from benchmarks.speed.measure import synchronize
from sg_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN_HERE = [name for name in sg_kernels.available_backends() if DEVICE in backends.DEVICES[name]]


def saliency_graft(case: Case, data: Data, backend: str, **more: Any) -> Run:
    options = {"backend": backend, **case.options, **more}
    return partial(sg_kernels.saliency_graft, data.images, data.features, **options)


def saliency_graft_out(case: Case, data: Data, backend: str) -> Run:
    return saliency_graft(case, data, backend, out=empty_rows(case, data))


def saliency_graft_targets(case: Case, data: Data, backend: str) -> Run:
    labels = {"targets": data.labels, "num_classes": case.num_classes}
    return saliency_graft(case, data, backend, **labels)


def saliency_graft_backward(case: Case, data: Data, backend: str) -> Run:
    if not data.images.is_floating_point():
        pytest.skip("integers have no gradient")
    images = data.images.detach().requires_grad_()
    with torch.enable_grad():
        grafted = saliency_graft(case, data._replace(images=images), backend)().images
    # In the strides of the output, as a convolution after it would pass it back.
    gradient = fill(torch.empty_like(grafted))
    return partial(torch.autograd.grad, grafted, images, gradient, retain_graph=True)


def channel_saliency(case: Case, data: Data, backend: str) -> Run:
    tokens = {"token_grid": case.token_grid, "prefix_tokens": case.prefix_tokens}
    return partial(sg_kernels.channel_saliency, data.features, backend=backend, **tokens)


def graft(case: Case, data: Data, backend: str) -> Run:
    mask = torch.rand(len(data.images), *case.map_size, device=DEVICE) < 0.5
    index = torch.randperm(len(data.images), device=DEVICE)
    return partial(sg_kernels.graft, data.images, mask, index, backend=backend)


def mix_targets(case: Case, data: Data, backend: str) -> Run:
    lam = torch.rand(len(data.labels), device=DEVICE)
    index = torch.randperm(len(data.labels), device=DEVICE)
    given = data.labels, lam, index, case.num_classes
    return partial(sg_kernels.mix_targets, *given, backend=backend)


def mix_criterion(case: Case, data: Data, backend: str) -> Run:
    logits = torch.randn(len(data.labels), case.num_classes, device=DEVICE)
    criterion = partial(F.cross_entropy, reduction="none")
    result = saliency_graft(case, data, backend)()
    return partial(sg_kernels.mix_criterion, criterion, logits, data.labels, result)


def module(case: Case, data: Data, backend: str) -> Run:
    module = sg_kernels.SaliencyGraft(num_classes=case.num_classes, backend=backend, **case.options)
    return partial(module.to(DEVICE), data.images, data.labels, features=data.features)


OPERATORS = (
    *(saliency_graft, saliency_graft_out, saliency_graft_targets, saliency_graft_backward),
    *(channel_saliency, graft, mix_targets, mix_criterion, module),
)


@pytest.fixture(scope="module")
def data(case: Case) -> Data:
    torch.manual_seed(0)
    return make_data(case, DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("case", cases.paper(DEVICE), ids=lambda case: case.name, scope="module")
@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_speed(
    benchmark: Any, operator: Callable[..., Run], backend: str, case: Case, data: Data
) -> None:
    """Until the result exists."""
    benchmark.group = case.name
    benchmark.extra_info["shape"] = case.shape
    run = operator(case, data, backend)
    benchmark(lambda: (run(), synchronize()))
