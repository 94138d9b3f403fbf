"""The experiments, by name: which methods are trained on what, small for a CPU, full for a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.accuracy.train import Run


class Setting(NamedTuple):
    """What all methods of an experiment share. The rate is the best of CutMix, by ``tuning``."""

    data: str
    train_images: int
    network: str
    steps: int
    batch: int
    rate: float


FASHION = Setting("fashion", 2000, "small", 800, 50, 0.2)
CLUTTER = Setting("clutter", 2000, "small", 800, 50, 0.1)

KEY = ["cutmix", "half", "vanilla", "half pass_scale=0.5", "sobel", "another-map", "paper"]

EXPERIMENTS: dict[str, list[str]] = {
    "key": KEY,
    "recipes": [
        *KEY,
        "half mode=train",
        "cutmix prob=1.0",
        "clean+cutmix",
        "always",
        "streamed",
        "mixup",
    ],
}


def runs_of(experiment: str, settings: list[Setting], seeds: int) -> Iterator[Run]:
    """Seed by seed, so that a part of the runs compares all methods on equal terms."""
    for seed in range(seeds):
        for setting in settings:
            for method in EXPERIMENTS[experiment]:
                data, images, network, steps, batch, rate = setting
                yield Run(data, images, network, method, "cost", steps, batch, rate, seed)
