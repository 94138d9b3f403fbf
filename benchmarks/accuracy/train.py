"""One run: a network, trained by a method on a data set at a given cost, and its test error."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy import data, methods, networks


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
    seed: int
    """Decides the training images, the weights, the order, the crops, and the method's draws."""


class Outcome(NamedTuple):
    """What a run measured."""

    error: float
    """On the test set, in percent."""
    cost: float
    """Of a step, in forward passes an image of the batch: 3 is plain training."""
    steps_done: int
    seconds: float


def steps_of(run: Run, cost: float) -> int:
    return run.steps if run.budget == "steps" else round(run.steps * methods.PLAIN / cost)


def train(run: Run, device: str, progress: Callable[[float], Any] = lambda passes: None) -> Outcome:
    """Trains and tests; calls ``progress`` with the cost of each step, in plain steps."""
    started = time.perf_counter()
    arrays = data.load(run.data, run.seed, run.train_images)
    torch.manual_seed(run.seed)  # the weights: the same for every method
    network = networks.make(run.network, arrays.images.shape[1], arrays.num_classes)
    network = network.to(device, memory_format=torch.channels_last)
    torch.manual_seed(run.seed + 1)  # the method's own draws
    np.random.seed(run.seed + 1)
    to = methods.Trained(network, arrays.num_classes, len(arrays.images), run.seed, device)
    method = methods.make(run.method, to)
    steps = steps_of(run, method.cost)
    optimizer, schedule = optimizer_of(network, run.rate, steps)
    network.train()
    for _, batch in zip(range(steps), arrays.batches(run.batch, run.seed, device)):
        loss = method.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(method.cost / methods.PLAIN)
    error = test_error(network, arrays, device)
    return Outcome(error, method.cost, steps, time.perf_counter() - started)


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
def test_error(network: nn.Module, arrays: data.Arrays, device: str) -> float:
    network.eval()
    wrong = total = 0
    for images, labels in arrays.tests(500, device):
        wrong += int((network(images).argmax(1) != labels).sum())
        total += len(labels)
    return 100 * wrong / total
