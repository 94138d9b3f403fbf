"""Saliency Grafting in two minutes.

    python examples/demo.py [--epochs 100] [--seeds 5] [--batch-norm] [--output build/demo.png]

Trains a small network with and without grafting, compares the results and the times of the
backends, and draws grafted images.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sg_kernels import (
    GraftResult,
    SaliencyGraft,
    available_backends,
    saliency_graft,
    show,
    unavailable_backends,
)

ROOT = Path(__file__).parents[1]
TRAIN_IMAGES = 300
BATCH = 50
PROB = 0.5
LEARNING_RATE = 3e-3


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, (N, 1, 8, 8) in [0, 1], and their classes."""
    data = load_digits()
    return torch.tensor(data.images[:, None], dtype=torch.float32) / 16, torch.tensor(data.target)


def network(batch_norm: bool) -> tuple[nn.Module, nn.Module]:
    """The layers that end in the feature map, 32 x 4 x 4, and the layers after them."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    return features, head


def train(
    seed: int, epochs: int, batch_norm: bool, grafting: bool, progress: tqdm
) -> tuple[float, nn.Module]:
    """The test error in percent, and the trained feature layers.

    ``seed`` decides the split, the initial weights and every draw, so that runs with and without
    grafting start alike.
    """
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, classes = images[order], classes[order]
    torch.manual_seed(seed)
    features, head = network(batch_norm)
    model = nn.Sequential(features, head)
    graft = SaliencyGraft(features, num_classes=10, prob=PROB, seed=seed) if grafting else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * TRAIN_IMAGES // BATCH
    )
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN_IMAGES).split(BATCH):
            batch, targets = images[rows], classes[rows]
            if graft is not None:
                with torch.no_grad():
                    features(batch)
                batch, targets = graft(batch, targets)
            loss = F.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.update()
    model.eval()
    with torch.no_grad():
        wrong = model(images[TRAIN_IMAGES:]).argmax(1) != classes[TRAIN_IMAGES:]
    return 100 * wrong.float().mean().item(), features


def compare_training(epochs: int, seeds: int, batch_norm: bool) -> nn.Module:
    """Prints the test errors with and without grafting; the feature layers of the last grafted
    run."""
    errors: dict[str, list[float]] = {"plain": [], f"Saliency Grafting, prob={PROB}": []}
    with tqdm(total=2 * seeds * epochs, unit="epoch", desc="training") as progress:
        for seed in range(seeds):
            for name, each in errors.items():
                error, features = train(seed, epochs, batch_norm, name != "plain", progress)
                each.append(error)
    print(
        f"\nTest error on scikit-learn's digits, {TRAIN_IMAGES} training images, {epochs} epochs, "
        f"{seeds} seeds, mean and standard deviation:"
    )
    for name, each in errors.items():
        spread = statistics.stdev(each) if seeds > 1 else 0.0
        values = " ".join(f"{error:.2f}" for error in each)
        print(f"  {name:<28}{statistics.mean(each):5.2f} % +- {spread:.2f}   ({values})")
    return features


def median_times(images: Tensor, features: Tensor, calls: int = 100) -> dict[str, float]:
    """Milliseconds per call of each available backend, with fresh outputs.

    The backends take turns, so that a slow phase of the machine affects all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in available_backends()}
    for seed in tqdm(range(calls), unit="round", desc="timing"):
        for name, each in times.items():
            start = time.perf_counter()
            result = saliency_graft(images, features, seed=seed, backend=name)
            each.append(time.perf_counter() - start)
            del result
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}


def compare_backends() -> None:
    """Prints the available backends, whether they agree, how long they take; and the others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 32, 32, generator=generator)
    features = torch.randn(128, 640, 8, 8, generator=generator)
    times = median_times(images, features)
    print(
        f"\nBackends on float32 images {tuple(images.shape)} and features "
        f"{tuple(features.shape)}, one thread, median of 100 calls:"
    )
    reference = saliency_graft(images, features, seed=0, backend="reference")
    for name, milliseconds in times.items():
        result = saliency_graft(images, features, seed=0, backend=name)
        agreement = "" if name == "reference" else differences(result, reference)
        print(f"  {name:<12}{milliseconds:8.3f} ms   {agreement}".rstrip())
    for name, reason in unavailable_backends().items():
        print(f"  {name:<12}cannot run: {reason}")


def differences(result: GraftResult, reference: GraftResult) -> str:
    """How a result differs from the reference's for the same seed."""
    parts = []
    for name in ("index", "mask", "images"):
        wrong = int((getattr(result, name) != getattr(reference, name)).sum())
        parts.append(f"{name} {f'differs in {wrong}' if wrong else 'identical'}")
    lam = (result.lam - reference.lam).abs().max().item()
    return ", ".join(parts) + f", lam within {lam:.1e} of reference"


class Panel(NamedTuple):
    """A batch to graft, and where its features come from."""

    images: Tensor
    features: Tensor
    evidence: str
    classes: Tensor
    names: list[str]
    index: list[int]
    rows: list[int]
    """The rows to draw."""


def photographs() -> Panel:
    """Three crops of scikit-learn's two sample photographs, (3, 3, 240, 240) uint8."""
    china, flower = (torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images)
    images = torch.stack(
        [flower[:, 60:360, 158:458], china[:, 20:320, 55:355], china[:, 127:427, 330:630]]
    )
    images = F.interpolate(images.float(), size=(240, 240), mode="area").round().byte()
    names, rows = ["dahlia", "temple", "lake"], [0, 1, 2]
    return Panel(images, edges(images), "of edge filters", torch.arange(3), names, [1, 2, 0], rows)


def edges(images: Tensor) -> Tensor:
    """Four edge filters per colour, averaged over 8 x 8 cells: a feature map without a network."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    diagonal = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    bank = torch.stack([sobel, sobel.T, diagonal, diagonal.flip(1)])[:, None].repeat(3, 1, 1, 1)
    response = F.conv2d(F.pad(images / 255, (1, 1, 1, 1), mode="replicate"), bank, groups=3)
    return F.adaptive_avg_pool2d(response.abs(), 8)


def handwriting(features: nn.Module) -> Panel:
    """Two pairs of digits, with the features of the network trained on grafts."""
    images, classes = digits()
    chosen = torch.tensor([int((classes == digit).nonzero()[0]) for digit in (3, 7, 8, 0)])
    images, classes = images[chosen], classes[chosen]
    with torch.no_grad():
        maps = features(images)
    names = [str(digit) for digit in range(10)]
    return Panel(images, maps, "of the network", classes, names, [1, 0, 3, 2], [0, 2])


def draw(panels: list[Panel], output: Path) -> None:
    """Grafts each panel, draws the picture and writes it to ``output``."""
    heights = [len(panel.rows) for panel in panels]
    figure = plt.figure(figsize=(10.5, 1.95 * sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), height_ratios=heights)
    for part, (images, features, evidence, classes, names, index, rows) in zip(parts, panels):
        result = saliency_graft(
            images,
            features,
            targets=classes,
            num_classes=len(names),
            index=torch.tensor(index),
            keep_prob=0.7,
            seed=0,
        )
        show(result, images, names, rows=rows, figure=part)
        part.axes[2].set_title(f"saliency\n{evidence}")
    figure.savefig(output, dpi=105)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-norm", action="store_true", help="in the trained network")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "demo.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine, waiting for other threads would dominate
    features = compare_training(options.epochs, options.seeds, options.batch_norm)
    compare_backends()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw([photographs(), handwriting(features)], options.output)
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
