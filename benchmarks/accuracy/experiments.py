"""The experiments, by name: which methods are trained on what, small for a CPU, full for a GPU."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.accuracy.train import Run


class Setting(NamedTuple):
    """What all methods share. The rate is the one, of three, that suits CutMix at p = 0.5."""

    data: str
    train_images: int
    network: str
    steps: int
    batch: int
    rate: float


SMALL = {
    "fashion": Setting("fashion", 1000, "small", 800, 50, 0.2),
    "clutter": Setting("clutter", 2000, "small", 800, 50, 0.1),
}
# Fewer images for more steps: five and four times as many epochs.
LONG = {
    "fashion": Setting("fashion", 400, "small", 1600, 50, 0.1),
    "clutter": Setting("clutter", 1000, "small", 1600, 50, 0.1),
}
# Sizes as they are usual for these data; the rates are not searched.
FULL = {
    "fashion": Setting("fashion", 60_000, "resnet18", 46_800, 128, 0.1),
    "clutter": Setting("clutter", 60_000, "resnet18", 46_800, 128, 0.1),
    "cifar10": Setting("cifar10", 50_000, "wrn-28-10", 78_000, 128, 0.1),
    "cifar100": Setting("cifar100", 50_000, "wrn-28-10", 78_000, 128, 0.1),
    "tiny-imagenet": Setting("tiny-imagenet", 100_000, "resnet18", 156_000, 128, 0.1),
    "imagenet": Setting("imagenet", 1_281_167, "resnet50", 500_000, 256, 0.1),
}
SIZES = {"small": SMALL, "long": LONG, "full": FULL}

BASELINE = "cutmix"
RECIPES = ["half", "half pass_scale=0.5", "sobel", "another-map", "paper"]
EXPERIMENTS: dict[str, list[str]] = {
    # The comparison that decides, first; then all recipes.
    "key": [BASELINE, "vanilla", *RECIPES],
    "recipes": [
        *(BASELINE, "vanilla", *RECIPES),
        *("half mode=train", "half mode=train pass_scale=0.5", "always", "streamed", "cached"),
        *("cutmix prob=1.0", "clean+cutmix"),
    ],
    "classification": [
        *(BASELINE, "vanilla", "cutout", "dropblock", "mixup", "manifold-mixup"),
        *("attentive", "saliencymix", "puzzlemix", "augmix", "half", "always", "paper"),
    ],
    "shakedrop": ["vanilla", BASELINE, "half"],
    "diversity": [BASELINE, *(f"always augmentations={n}" for n in range(1, 7))],
    "scarcity": [
        *(BASELINE, "vanilla", "mixup", "saliencymix"),
        *("half", "half pass_scale=0.5", "sobel", "paper"),
    ],
    "occlusion": [BASELINE, "vanilla", "cutout", "mixup", "half", "paper"],
    "ablations": [
        *(BASELINE, "half", "half label=area"),
        *("half selection=topk k=3", "half selection=topk k=3 label=area", "backward"),
        *("box-labels", "box-labels pass_scale=0.5"),
    ],
    "threshold": [
        *(BASELINE, "half"),
        *(f"half threshold={sigma}" for sigma in (0.0, 0.03, 0.045, 0.075, 0.09, 0.12)),
    ],
    "softmax": [
        *(BASELINE, "half"),
        *(f"half temperature={T}" for T in (0.1, 0.5, 1.0)),
        *(f"half normalize=mean temperature={T}" for T in (0.2, 0.5, 1.0)),
        *(f"half normalize=none temperature={T}" for T in (1.0, 5.0, 25.0)),
    ],
    "sampling": [
        *(BASELINE, "half"),
        *(
            "half stage=1",
            "half stage=0",
            "half grid_size=(7,7)",
            "half grid_size=((2,2),(4,4),(7,7))",
        ),
        *(f"half alpha={alpha}" for alpha in (0.2, 0.5, 2.0)),
        *(f"half warmup_epochs={epochs}" for epochs in (2, 5)),
        *(f"half norm={norm}" for norm in ("l2", "l2sq")),
    ],
}
SHARES = (0.1, 0.2, 0.5)
"""Of the training images, for the experiment ``scarcity``; the number of steps stays the same."""


def settings_of(experiment: str, setting: Setting) -> list[Setting]:
    if experiment == "scarcity":
        counts = [round(share * setting.train_images) for share in SHARES]
        return [setting._replace(train_images=count) for count in counts]
    if experiment == "shakedrop":
        return [setting._replace(network=f"{setting.network}-shakedrop")]
    return [setting]


def runs_of(
    experiment: str,
    settings: list[Setting],
    seeds: Iterable[int],
    budget: str = "cost",
    methods: list[str] | None = None,
) -> Iterator[Run]:
    """Seed by seed, so that what has ended at any time compares all methods on equal terms."""
    test = "occlusion" if experiment == "occlusion" else "plain"
    for seed in seeds:
        for given in settings:
            for setting in settings_of(experiment, given):
                for method in methods or EXPERIMENTS[experiment]:
                    data, images, network, *sizes = setting
                    yield Run(data, images, network, method, budget, *sizes, test, seed)
