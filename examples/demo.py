"""Saliency Grafting in two minutes.

    python examples/demo.py [--epochs 100] [--seeds 5] [--batch-norm] [--output build/demo.png]

Trains a small network with and without grafting, compares the backends (do they agree, how long do
they take?), and draws grafted images.
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
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sg_kernels import (
    GraftResult,
    SaliencyGraft,
    available_backends,
    saliency_graft,
    unavailable_backends,
)

ROOT = Path(__file__).parents[1]
TRAIN_IMAGES = 300
BATCH = 50
PROB = 0.5
LEARNING_RATE = 3e-3

SOURCE, DESTINATION = "#e4572e", "#2e6f95"
CELLS = ("#d5e3ec", "#f6cdbf", SOURCE)


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

    The backends take turns, so that a slow spell of the machine meets all of them.
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
    """A batch and its grafts; the picture has a row for each of ``sources``."""

    images: Tensor
    names: list[str]
    sources: list[int]
    evidence: str
    salient: Tensor
    result: GraftResult


def panel(
    images: Tensor,
    features: Tensor,
    evidence: str,
    names: list[str],
    sources: list[int],
    index: list[int],
) -> Panel:
    """Grafts the batch. ``salient`` marks the cells that could have been drawn."""
    result, every = (
        saliency_graft(images, features, index=torch.tensor(index), keep_prob=p, seed=0)
        for p in (0.7, 1.0)
    )
    return Panel(images, names, sources, evidence, every.mask, result)


def photographs() -> Panel:
    """Three crops of scikit-learn's two sample photographs, (3, 3, 240, 240) uint8."""
    china, flower = (torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images)
    images = torch.stack(
        [flower[:, 60:360, 158:458], china[:, 20:320, 55:355], china[:, 127:427, 330:630]]
    )
    images = F.interpolate(images.float(), size=(240, 240), mode="area").round().byte()
    names = ["dahlia", "temple", "lake"]
    return panel(images, edges(images), "of edge filters", names, [0, 1, 2], [1, 2, 0])


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
    with torch.no_grad():
        maps = features(images[chosen])
    names = [str(int(c)) for c in classes[chosen]]
    return panel(images[chosen], maps, "of the network", names, [0, 2], [1, 0, 3, 2])


def show(axes: Axes, image: Tensor) -> None:
    if image.shape[0] == 1:
        axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axes.imshow(image.permute(1, 2, 0))


def draw_row(row: list[Axes], shown: Panel, i: int) -> None:
    result, j = shown.result, int(shown.result.index[i])
    show(row[0], shown.images[i])
    show(row[1], shown.images[j])
    row[2].imshow(result.saliency[i], cmap="magma", vmin=0)
    row[3].imshow(
        shown.salient[i].int() + result.mask[i].int(), cmap=ListedColormap(CELLS), vmin=0, vmax=2
    )
    show(row[4], result.images[i])
    for axes, colour, width in zip(row, (SOURCE, DESTINATION, *["0.8"] * 3), (2.5, 2.5, 1, 1, 1)):
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=width)
    lam = result.lam[i].item()
    bars = row[5]
    bars.barh([1, 0], [lam, 1 - lam], color=[SOURCE, DESTINATION], height=0.36)
    for y, k, symbol, weight in ((1, i, r"\lambda", lam), (0, j, r"1-\lambda", 1 - lam)):
        text = f"{shown.names[k]}   ${symbol} = {weight:.2f}$"
        bars.text(0.0, y + 0.25, text, va="bottom", fontsize=11)
    bars.set(xlim=(-0.05, 1.0), ylim=(-0.5, 1.8), box_aspect=1)
    bars.axis("off")


def draw(panels: list[Panel], output: Path) -> None:
    """Draws the picture and writes it to ``output``."""
    rows = [(shown, i) for shown in panels for i in shown.sources]
    figure, grid = plt.subplots(
        len(rows), 6, figsize=(10.5, 1.75 * len(rows) + 0.9), squeeze=False, layout="constrained"
    )
    for axes, (shown, i) in zip(grid, rows):
        draw_row(list(axes), shown, i)
        if i == shown.sources[0]:
            axes[2].set_title(f"saliency\n{shown.evidence}", fontsize=12)
    titles = ("source $i$", "destination $j$", None, "mask $M$", "graft")
    for axes, title in zip(grid[0], titles):
        if title:
            axes.set_title(title, fontsize=12)
    grid[0, 5].set_title("target", fontsize=12, loc="left", x=0.05)
    labels = ("destination", "salient but not drawn: destination", "salient and drawn: source")
    patches = [Patch(color=colour, label=label) for colour, label in zip(CELLS, labels)]
    figure.legend(handles=patches[::-1], loc="outside lower center", ncols=3, frameon=False)
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
