"""The methods, by name: each makes a loss of a batch, and says what that costs.

The cost is counted in forward passes an image of the batch: a forward pass 1, a backward pass 2, so
plain training costs 3. A pass at half of the resolution counts a quarter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.data import Batch
from sg_kernels import SaliencyGraft, graft, mix_targets

PLAIN = 3.0
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From images and class ids to mixed images and soft targets."""


class Trained(NamedTuple):
    """What a method is made for."""

    network: nn.Module
    num_classes: int
    seed: int


class Method(NamedTuple):
    loss: Callable[[Batch], Tensor]
    cost: float
    """The expected cost of a step, in forward passes an image."""


def cost_of(*, mixed: float = 1.0, clean: float = 0.0) -> float:
    """Of a step that trains on ``mixed`` batches and makes ``clean`` forward passes."""
    return PLAIN * mixed + clean


# --- without saliency


def vanilla(to: Trained) -> Method:
    return Method(lambda batch: F.cross_entropy(to.network(batch.images), batch.labels), PLAIN)


def mixing(to: Trained, mix: Mix, prob: float) -> Method:
    """Mixes a share ``prob`` of the batches."""

    def loss(batch: Batch) -> Tensor:
        if torch.rand(()).item() >= prob:
            return F.cross_entropy(to.network(batch.images), batch.labels)
        images, targets = mix(batch.images, batch.labels)
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, PLAIN)


def grafted(images: Tensor, labels: Tensor, mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Grafts by a given mask, on another image of the batch; the labels mixed by area."""
    index = torch.randperm(len(images)).to(images.device)
    lam = mask.float().mean((1, 2))
    targets = mix_targets(labels, lam, index, num_classes)
    return graft(images, mask, index), targets


def cutmix_mix(num_classes: int, alpha: float) -> Mix:
    """Yun et al., ICCV 2019: one box for the whole batch, its area drawn from Beta(alpha, alpha)."""
    beta = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha))

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        box = random_box(*images.shape[2:], share=1 - beta.sample().item())
        mask = ~box.expand(len(images), -1, -1).to(images.device)
        return grafted(images, labels, mask, num_classes)

    return mix


def random_box(height: int, width: int, share: float) -> Tensor:
    """True in a box of that share of the area around a random pixel, clipped at the border."""
    cut_height, cut_width = int(height * share**0.5), int(width * share**0.5)
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    box = torch.zeros(height, width, dtype=torch.bool)
    top, left = max(y - cut_height // 2, 0), max(x - cut_width // 2, 0)
    box[top : y + cut_height // 2, left : x + cut_width // 2] = True
    return box


def cutmix(to: Trained, prob: float = 0.5, alpha: float = 1.0) -> Method:
    return mixing(to, cutmix_mix(to.num_classes, alpha), prob)


def mixup(to: Trained, prob: float = 1.0, alpha: float = 1.0) -> Method:
    """Zhang et al., ICLR 2018; one weight for the whole batch, as in the authors' code."""
    beta = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha))

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        index, lam = torch.randperm(len(images)).to(images.device), beta.sample().item()
        weights = torch.full((len(images),), lam, device=images.device)
        mixed = lam * images + (1 - lam) * images[index]
        return mixed, mix_targets(labels, weights, index, to.num_classes)

    return mixing(to, mix, prob)


def clean_and_cutmix(to: Trained, alpha: float = 1.0) -> Method:
    """The clean images and their CutMix, as the paper trains on the clean images and the grafts."""
    mix = cutmix_mix(to.num_classes, alpha)

    def loss(batch: Batch) -> Tensor:
        images, targets = mix(batch.images, batch.labels)
        clean = F.cross_entropy(to.network(batch.images), batch.labels)
        return (clean + F.cross_entropy(to.network(images), targets)) / 2

    return Method(loss, cost_of(mixed=2))


# --- Saliency Grafting


def tapped(to: Trained, pass_scale: float = 1.0) -> nn.Module:
    """The layer whose map has a quarter of the image's side, in a pass at ``pass_scale``."""
    return to.network.stages[1 if pass_scale > 0.5 else 0]


def graft_module(to: Trained, pass_scale: float = 1.0, **options: Any) -> SaliencyGraft:
    layer = tapped(to, pass_scale)
    return SaliencyGraft(layer, num_classes=to.num_classes, seed=to.seed, **options).to(
        next(to.network.parameters()).device
    )


def half(
    to: Trained, prob: float = 0.5, pass_scale: float = 1.0, mode: str = "eval", **options: Any
) -> Method:
    """Grafts a share of the batches, for which alone a clean pass is made.

    ``mode`` is the network's in that pass; ``"train"`` leaves BatchNorm's statistics alone too.
    """
    if mode == "eval":
        given = {"network": to.network, "prob": prob, **options}
        mixer = SaliencyGraft(
            tapped(to, pass_scale), pass_scale=pass_scale, num_classes=to.num_classes,
            seed=to.seed, **given,
        )  # fmt: skip
    else:
        mixer = graft_module(to, pass_scale, prob=prob, **options)
    mixer = mixer.to(next(to.network.parameters()).device)

    def loss(batch: Batch) -> Tensor:
        if mode == "train" and mixer.needs_pass():
            with torch.no_grad(), statistics_kept(to.network):
                to.network(at_scale(batch.images, pass_scale))
        images, targets = mixer(batch.images, batch.labels)
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, cost_of(clean=prob * pass_scale**2))


def at_scale(images: Tensor, scale: float) -> Tensor:
    return F.interpolate(images, scale_factor=scale, mode="area") if scale < 1 else images


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, but does not learn from it."""
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def always(to: Trained, **options: Any) -> Method:
    return half(to, prob=1.0, **options)


def another_map(to: Trained, **options: Any) -> Method:
    """A control: ``half`` by the map of the batch's next image, at the same price."""
    return half(to, to_features=lambda features: features.roll(1, 0), **options)


def paper(to: Trained, **options: Any) -> Method:
    """One clean pass, which trains, and whose features give the saliency."""
    mixer = graft_module(to, **options)

    def loss(batch: Batch) -> Tensor:
        clean = F.cross_entropy(to.network(batch.images), batch.labels)
        images, targets = mixer(batch.images, batch.labels)
        return (clean + F.cross_entropy(to.network(images), targets)) / 2

    return Method(loss, cost_of(mixed=2))


def streamed(to: Trained, **options: Any) -> Method:
    """One pass over this step's clean images and the grafts of the last step's."""
    rows = 0
    mixer = graft_module(
        to, mixed_pass=False, to_features=lambda features: features[:rows], **options
    )
    last: list[Batch] = []

    def loss(batch: Batch) -> Tensor:
        nonlocal rows
        grafts = [mixer(each.images, each.labels) for each in last]
        rows = len(batch.images)
        last[:] = [batch]
        logits = to.network(torch.cat([batch.images, *(images for images, _ in grafts)]))
        clean = F.cross_entropy(logits[:rows], batch.labels)
        if not grafts:
            return clean
        return (clean + F.cross_entropy(logits[rows:], grafts[0][1])) / 2

    return Method(loss, cost_of(mixed=2))


def sobel(to: Trained, prob: float = 0.5, **options: Any) -> Method:
    """Grafts by the edges of the images, without a network's pass, on the grid that ``half`` has."""
    mixer = SaliencyGraft(num_classes=to.num_classes, seed=to.seed, prob=prob, **options)
    mixer = mixer.to(next(to.network.parameters()).device)

    def loss(batch: Batch) -> Tensor:
        edges = F.avg_pool2d(edge_strength(batch.images)[:, None], 4)[:, 0]
        images, targets = mixer(batch.images, batch.labels, saliency=edges)
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, PLAIN)


def edge_strength(images: Tensor) -> Tensor:
    """The length of Sobel's gradient of the mean channel, (B, H, W)."""
    across = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    filters = torch.stack([across, across.T])[:, None]
    grey = F.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")
    return F.conv2d(grey, filters).square().sum(1).sqrt()


METHODS: dict[str, Callable[..., Method]] = {
    "vanilla": vanilla,
    "cutmix": cutmix,
    "mixup": mixup,
    "clean+cutmix": clean_and_cutmix,
    "half": half,
    "always": always,
    "paper": paper,
    "streamed": streamed,
    "sobel": sobel,
    "another-map": another_map,
}


def options_of(text: str) -> tuple[str, dict[str, Any]]:
    """``half pass_scale=0.5 norm=l2`` -> the method's name and its options."""
    name, *pairs = text.split()
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return name, {key: value_of(value) for key, value in (pair.split("=") for pair in pairs)}


def value_of(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def make(text: str, to: Trained) -> Method:
    name, options = options_of(text)
    return METHODS[name](to, **options)
