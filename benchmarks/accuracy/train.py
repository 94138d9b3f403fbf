"""One run: a network, trained by a method on a data set at a given cost, and its test error."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import data, methods, networks
from sg_kernels import channel_saliency

OCCLUDED = (0.1, 0.2, 0.4)
"""The shares of the cells that the test ``occlusion`` hides, the most salient first."""


class Run(NamedTuple):
    """All that decides a run: the key of its row in the CSV."""

    data: str
    train_images: int
    network: str
    method: str
    budget: str
    """``cost``: as many steps as cost what ``steps`` of plain training cost; or ``steps``."""
    steps: int
    batch: int
    rate: float
    """The highest learning rate of the schedule."""
    test: str
    """``plain``, or ``occlusion``, which also tests images whose most salient cells are hidden."""
    seed: int
    """Decides the training images, the weights, the order, the crops, and the method's draws."""


class Outcome(NamedTuple):
    """What a run measured. Errors are on the test set, in percent."""

    error: float
    occluded: str
    """The error with each share of :data:`OCCLUDED` hidden, separated by spaces."""
    cost: float
    """Of a step, in forward passes an image of the batch: 3 is plain training."""
    steps_done: int
    seconds: float


def train(
    run: Run, root: Path | None, device: str, progress: Callable[[float], Any] = lambda steps: None
) -> Outcome:
    """Trains and tests; tells ``progress`` what each step costs, in steps of plain training."""
    started = time.perf_counter()
    source = data.load(run.data, root, run.seed, run.train_images)
    torch.manual_seed(run.seed)  # the weights: the same for every method
    network = networks.make(run.network, source.channels, source.num_classes)
    network = network.to(device, memory_format=torch.channels_last)
    torch.manual_seed(run.seed + 1)  # the method's own draws
    np.random.seed(run.seed + 1)
    to = methods.Trained(network, source.num_classes, len(source), run.seed, device)
    method = methods.make(run.method, to)
    steps = run.steps
    if run.budget == "cost":
        steps = round(steps * methods.PLAIN / method.cost)
    optimizer, schedule = optimizer_of(network, run.rate, steps)
    network.train()
    for _, batch in zip(range(steps), source.batches(run.batch, run.seed, device)):
        loss = method.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(method.cost / methods.PLAIN)
    shares = OCCLUDED if run.test == "occlusion" else ()
    error, *occluded = test_errors(network, source, device, shares)
    texts = " ".join(f"{each:.2f}" for each in occluded)
    seconds = round(time.perf_counter() - started, 1)
    return Outcome(error, texts, method.cost, steps, seconds)


def optimizer_of(
    network: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with Nesterov momentum, a rate that rises over a tenth of the steps and falls to 0."""
    optimizer = torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule


@torch.no_grad()
def test_errors(
    network: nn.Module, source: Any, device: str, shares: tuple[float, ...]
) -> list[float]:
    """In percent: of the images as they are, then with each share of their cells hidden."""
    network.eval()
    wrong, total = torch.zeros(1 + len(shares), dtype=torch.float64), 0
    for images, labels in source.tests(500, device):
        views = [images, *(occlude(network, images, share) for share in shares)]
        wrong += torch.tensor([int((network(each).argmax(1) != labels).sum()) for each in views])
        total += len(labels)
    return (100 * wrong / total).tolist()


def occlude(network: nn.Module, images: Tensor, share: float) -> Tensor:
    """Hides that share of the cells, the most salient by the network's own map, with the mean."""
    saliency = channel_saliency(methods.features_of(network, images))
    count = round(share * saliency[0].numel())
    hidden = torch.zeros_like(saliency, dtype=torch.bool).flatten(1)
    hidden.scatter_(1, saliency.flatten(1).topk(count).indices, True)
    hidden = hidden.view(-1, 1, *saliency.shape[1:]).float()
    mask = nn.functional.interpolate(hidden, images.shape[2:], mode="nearest").bool()
    return images.masked_fill(mask, 0)
