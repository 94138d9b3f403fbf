"""One training step of a ResNet: plain, with CutMix and with Saliency Grafting.

The recipe half makes its clean pass, at half the resolution, before every other step. A step of it
counts as the mean of one that does and a plain one.

On CUDA under torch.autocast to bfloat16: weights and images stay float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from time import perf_counter_ns
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, cuda, nn
from torch.nn import functional as F
from tqdm import tqdm

import sg_kernels
from benchmarks.rivals import import_library
from benchmarks.speed.candidates import own_backends
from benchmarks.speed.measure import reason, synchronize
from benchmarks.speed.results import Row, Where, absent, row_of

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CUTMIX = "CutMix (timm, batch)"
STEP, OVER_CUTMIX = "training step", "step / CutMix's"
HALF = "the recipe half, at half the resolution ({})"
"""With the backend's name."""


def setting(device: str, quick: bool) -> tuple[str, str, nn.Module, Tensor, Tensor]:
    """The name, the shape, the network, images and labels."""
    timm, on_cuda = import_library("timm"), device == "cuda"
    if on_cuda and not quick:
        name, batch, size, classes = "ResNet-50", 256, 224, 1000
        model = timm.create_model("resnet50", num_classes=classes)
    else:
        name, batch, size, classes = "ResNet-18", 2 if quick else 32, 32, 100
        model = timm.create_model("resnet18", num_classes=classes)
        # The stem that is usual for 32x32 images: it keeps their resolution.
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    memory_format = torch.channels_last if on_cuda else torch.contiguous_format
    images = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(classes, (batch,), device=device)
    kind = " channels_last, autocast to bfloat16" if on_cuda else ""
    model = model.to(device=device, memory_format=memory_format)
    return name, f"{batch}x3x{size}x{size} float32{kind}", model, images, labels


def mark(device: str) -> Any:
    """A point in time: the host's, or on the device's stream."""
    if device != "cuda":
        return perf_counter_ns()
    event = cuda.Event(enable_timing=True)
    event.record()
    return event


def nanoseconds(before: Any, after: Any) -> float:
    return before.elapsed_time(after) * 1e6 if isinstance(before, cuda.Event) else after - before


@torch.no_grad()
def clean_pass(model: nn.Module, images: Tensor) -> None:
    """Shows the images to the layer that is tapped."""
    model(images)


def autocast(device: str) -> torch.autocast:
    """To be entered anew for each pass: it would keep the weights that the clean pass casts."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def all_mixes(device: str, model: nn.Module) -> dict[str, Mix | None]:
    options: dict[str, Any] = {"num_classes": model.num_classes, "label_smoothing": 0.0}
    timm = import_library("timm.data").Mixup(0.0, 1.0, **options)
    mixes: dict[str, Mix | None] = {"plain": None, CUTMIX: lambda x, y: timm(x.clone(), y)}
    # The steps of the others pass through the tapped layer too, so that every pass counts.
    options["mixed_pass"] = False
    for backend in own_backends(device):
        graft = sg_kernels.SaliencyGraft(model.layer4, **options, backend=backend)
        mixes[f"Saliency Grafting ({backend})"] = graft.to(device)
        small = {"network": model, "pass_scale": 0.5}
        graft = sg_kernels.SaliencyGraft(model.layer3, **small, **options, backend=backend)
        mixes[HALF.format(backend)] = partial(with_pass, graft.to(device))
    return mixes


def with_pass(graft: sg_kernels.SaliencyGraft, images: Tensor, labels: Tensor) -> Any:
    """Grafts after a clean pass of its own."""
    graft.reset()  # of the passes of the others
    with autocast(images.device.type):
        return graft(images, labels)


def measure_steps(device: str, quick: bool, rounds: int) -> Iterator[list[Row]]:
    case, shape, model, images, labels = setting(device, quick)
    mixes = all_mixes(device, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    ballast = torch.ones(1 << 28 if device == "cuda" else 1, device=device)

    def step(mix: Mix | None) -> list[float]:
        for _ in range(4):  # keeps a GPU busy while the host gets ahead
            ballast.neg_()
        marks = [mark(device)]
        if isinstance(mix, sg_kernels.SaliencyGraft):
            with autocast(device):
                clean_pass(model, images)
        marks.append(mark(device))
        mixed, targets = (images, labels) if mix is None else mix(images, labels)
        marks.append(mark(device))
        with autocast(device):
            loss = F.cross_entropy(model(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        marks.append(mark(device))
        synchronize()
        return [nanoseconds(before, after) for before, after in pairwise(marks)]

    for name in list(mixes):
        try:
            step(mixes[name])
        except Exception as error:
            yield [absent((case, shape, name), STEP, reason(error))]
            del mixes[name]
    times, orders = {name: np.empty((rounds, 3)) for name in mixes}, np.random.default_rng(0)
    for i in tqdm(range(rounds), desc=STEP, leave=False):
        for name in orders.permutation(list(mixes)).tolist():
            times[name][i] = step(mixes[name])
    whole = {name: pd.Series(laps.sum(1)) for name, laps in times.items()}
    for name, laps in times.items():
        if name.startswith(HALF.partition("(")[0]):
            half = (whole[name] + whole["plain"]) / 2
            yield [row_of((case, shape, name), OVER_CUTMIX, half / whole[CUTMIX], "x")]
        else:
            yield rows_of((case, shape, name), laps, whole["plain"])


def rows_of(where: Where, times: np.ndarray, plain: pd.Series) -> list[Row]:
    clean, mixing, rest = (pd.Series(lap) for lap in times.T)
    whole = clean + mixing + rest
    rows = [row_of(where, STEP, whole / 1e6, "ms")]
    if where[2] != "plain":
        rows.append(row_of(where, "step / plain", whole / plain, "x"))
        rows.append(row_of(where, "mixing, share of the step", 100 * mixing / whole, "%"))
    if where[2] not in ("plain", CUTMIX):
        share = 100 * clean / whole
        rows.append(row_of(where, "clean forward, share of the step", share, "%"))
    return rows
