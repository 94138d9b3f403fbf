"""What a recipe costs in time: its training step over that of timm's CutMix, beside the count.

    python -m benchmarks.accuracy.price

CutMix mixes half of the batches, as the recipe ``half`` does. Steps that mix and a plain one take
turns, and who mixes half of the batches takes the mean of the two. Writes
benchmarks/results/price.csv, or price-gpu.csv, and on a CPU the table of docs/recipes.md.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy import methods, networks
from benchmarks.accuracy.data import Batch
from benchmarks.accuracy.methods import PLAIN, PROB, Method, Trained
from benchmarks.rivals import import_library
from benchmarks.speed import measure, results
from benchmarks.speed.measure import Timed
from benchmarks.speed.readme import between_markers, markdown
from benchmarks.speed.results import RESULTS, ROOT, Row, measured_on, row_of
from benchmarks.speed.step import OVER_CUTMIX

PAGE = ROOT / "docs" / "recipes.md"
COUNTED = "cost of a step"
CLASSES = 100
CUTMIX = "cutmix"
OF_HALF = ["half pass_scale=0.5", "half"]
"""The recipes that mix half of the batches."""
RECIPES = [*OF_HALF, "always", "paper"]


class Setting(NamedTuple):
    network: str
    batch: int
    side: int

    @property
    def shape(self) -> str:
        return f"{self.batch}x3x{self.side}x{self.side}"


SETTINGS = {
    "cpu": [Setting("resnet18", 32, 32), Setting("resnet50", 8, 224)],
    "cuda": [Setting("resnet18", 128, 32), Setting("resnet50", 128, 224)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=13)
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for setting in SETTINGS[device] for row in measure_steps(setting, device, rounds)]
    path = RESULTS / ("price.csv" if device == "cpu" else "price-gpu.csv")
    results.write(path, results.describe_run(device), rows)
    text = table_of(results.read(path))
    print(text)
    if device == "cpu":
        PAGE.write_text(between_markers(PAGE.read_text(), "price", text))


def measure_steps(setting: Setting, device: str, rounds: int) -> list[Row]:
    always_mixed = {recipe: f"{recipe} prob=1.0" for recipe in OF_HALF}
    words = {"plain": "vanilla", **dict(zip(RECIPES, RECIPES)), **always_mixed}
    makers = {name: partial(methods.make, each) for name, each in words.items()}
    makers[CUTMIX] = timm_cutmix
    steps = {name: Timed(step_of(make, setting, device)) for name, make in makers.items()}
    samples, failed = measure.interleave(steps, rounds, measure.wall, setting.network)
    if failed:
        raise RuntimeError(f"{setting.network}: {failed}")
    of_half = samples.mul(PROB).add((1 - PROB) * samples["plain"], axis=0)
    samples[OF_HALF] = of_half[OF_HALF]
    rows, to = [], trained(setting, device)
    for recipe in RECIPES:
        where = (setting.network, setting.shape, recipe)
        rows.append(row_of(where, OVER_CUTMIX, samples[recipe] / of_half[CUTMIX], "x"))
        rows.append(Row(*where, COUNTED, methods.make(recipe, to).cost / PLAIN, "x"))
    return rows


def trained(setting: Setting, device: str) -> Trained:
    network = networks.make(setting.network, 3, CLASSES)
    network = network.to(device, memory_format=torch.channels_last).train()
    return Trained(network, CLASSES, setting.batch, seed=0, device=device)


def step_of(make: Callable[[Trained], Method], setting: Setting, device: str) -> Callable[[], None]:
    """A step of a network of its own, as a method that taps it would be in the way of others."""
    to = trained(setting, device)
    method = make(to)
    optimizer = torch.optim.SGD(to.network.parameters(), 1e-4, momentum=0.9, nesterov=True)
    images = torch.randn(setting.batch, 3, setting.side, setting.side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.randint(CLASSES, (setting.batch,), device=device), epoch=0)

    def step() -> None:
        loss = method.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timm_cutmix(to: Trained) -> Method:
    mixup = import_library("timm.data").Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=CLASSES)

    def loss(batch: Batch) -> Tensor:
        images, targets = mixup(batch.images.clone(), batch.labels)  # it mixes in place
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, PLAIN)


def table_of(rows: pd.DataFrame) -> str:
    """A line for each recipe: what the count says, then what each network measured."""
    counted = rows[rows.figure == COUNTED].drop_duplicates("candidate").set_index("candidate").value
    columns = {"recipe": [f"`{recipe}`" for recipe in RECIPES]}
    columns["counted"] = [f"{counted[recipe]:.2f}" for recipe in RECIPES]
    for (network, shape), found in rows[rows.figure == OVER_CUTMIX].groupby(
        ["case", "shape"], sort=False
    ):
        measured = found.set_index("candidate")
        columns[f"{network}, {shape}"] = [
            f"{line.value:.2f} ({line.p20:.2f} .. {line.p80:.2f})"
            for line in (measured.loc[recipe] for recipe in RECIPES)
        ]
    medians = f"medians of {rows.rounds.max()} rounds, with the 20th and 80th percentile."
    caption = f"{measured_on(rows.iloc[0])}: {medians}"
    return f"{caption}\n\n{markdown(pd.DataFrame(columns))}"


if __name__ == "__main__":
    main()
