"""The methods, by name: each makes the loss of a batch, and says what a step costs.

The cost is counted in forward passes an image of the batch: a forward pass is 1, a backward pass 2,
half of which are the gradients of the weights. Plain training costs 3; a forward pass at half of
the resolution a quarter.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import rivals
from benchmarks.accuracy.data import Batch
from benchmarks.rivals import import_library
from sg_kernels import SaliencyGraft, channel_saliency, graft, mix_targets

PLAIN = 3.0
PROB = 0.5
"""The share of the batches that is mixed, where a method leaves it open."""
Mix = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a batch to mixed images and soft targets."""


class Trained(NamedTuple):
    """What a method is made for."""

    network: nn.Module
    num_classes: int
    train_images: int
    seed: int
    device: str


class Method(NamedTuple):
    loss: Callable[[Batch], Tensor]
    cost: float
    """The expected cost of a step."""


def vanilla(to: Trained) -> Method:
    return Method(lambda batch: F.cross_entropy(to.network(batch.images), batch.labels), PLAIN)


def mixing(to: Trained, mix: Mix, prob: float, extra: float = 0.0) -> Method:
    """Mixes a share ``prob`` of the batches, which costs ``extra`` for each that is mixed."""

    def loss(batch: Batch) -> Tensor:
        if torch.rand(()).item() >= prob:
            return F.cross_entropy(to.network(batch.images), batch.labels)
        images, targets = mix(batch)
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, PLAIN + prob * extra)


def clean_and(to: Trained, mix: Mix) -> Method:
    """Trains on each batch twice, clean and mixed."""

    def loss(batch: Batch) -> Tensor:
        clean = F.cross_entropy(to.network(batch.images), batch.labels)
        images, targets = mix(batch)
        return (clean + F.cross_entropy(to.network(images), targets)) / 2

    return Method(loss, 2 * PLAIN)


# Without a network's saliency. A box or a set of cells goes through sg_kernels.graft.


def paste(to: Trained, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Grafts where the mask (B, gh, gw) is True, and mixes the labels by its area."""
    index = torch.randperm(len(mask)).to(to.device)
    targets = mix_targets(batch.labels, mask.float().mean((1, 2)), index, to.num_classes)
    return graft(batch.images, mask, index), targets


def beta(alpha: float) -> float:
    return torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)).sample().item()


def box(height: int, width: int, share: float, y: int, x: int) -> Tensor:
    """True in a box of that share of the area around a pixel, clipped at the border."""
    tall, broad = int(height * share**0.5) // 2, int(width * share**0.5) // 2
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[max(y - tall, 0) : y + tall, max(x - broad, 0) : x + broad] = True
    return inside


def random_pixel(height: int, width: int) -> tuple[int, int]:
    return int(torch.randint(height, ())), int(torch.randint(width, ()))


def cutmix_of(to: Trained, alpha: float) -> Mix:
    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        return paste(to, batch, one_box(to, batch, alpha))

    return mix


def one_box(to: Trained, batch: Batch, alpha: float) -> Tensor:
    """CutMix's mask, (B, H, W), True outside of a box that is the same for the whole batch."""
    size = batch.images.shape[2:]
    pasted = box(*size, 1 - beta(alpha), *random_pixel(*size))
    return ~pasted.to(to.device).expand(len(batch.images), -1, -1)


def cutmix(to: Trained, prob: float = PROB, alpha: float = 1.0) -> Method:
    """Yun et al., ICCV 2019: one box for the whole batch."""
    return mixing(to, cutmix_of(to, alpha), prob)


def clean_and_cutmix(to: Trained, alpha: float = 1.0) -> Method:
    return clean_and(to, cutmix_of(to, alpha))


def saliencymix(to: Trained, prob: float = PROB, alpha: float = 1.0) -> Method:
    """Uddin et al., ICLR 2021: CutMix's box around the most salient pixel of one image."""

    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images
        first = images[0].expand(3, -1, -1)
        grey_levels = 255 * (first - first.min()) / (first.max() - first.min()).clamp(min=1e-6)
        pixels = grey_levels.byte().flip(0).permute(1, 2, 0).cpu().numpy()  # BGR
        saliency = torch.from_numpy(rivals.fine_grained_saliency(pixels))
        y, x = divmod(int(saliency.argmax()), images.shape[3])
        kept = ~box(*images.shape[2:], 1 - beta(alpha), y, x)
        return paste(to, batch, kept.expand(len(images), -1, -1).to(to.device))

    return mixing(to, mix, prob)


def mixup(to: Trained, prob: float = 1.0, alpha: float = 1.0) -> Method:
    """Zhang et al., ICLR 2018, by torchvision: one weight for the whole batch."""
    transforms = import_library("torchvision.transforms.v2")
    mix = transforms.MixUp(alpha=alpha, num_classes=to.num_classes)
    return mixing(to, lambda batch: mix(batch.images, batch.labels), prob)


def manifold_mixup(to: Trained, alpha: float = 2.0) -> Method:
    """Verma et al., ICML 2019: mixup of the images or of what a random early stage receives."""
    places = [to.network, *to.network.stages[1:3]]

    def loss(batch: Batch) -> Tensor:
        index = torch.randperm(len(batch.images)).to(to.device)
        lam = beta(alpha)

        def mix(module: nn.Module, args: tuple[Tensor]) -> Tensor:
            return lam * args[0] + (1 - lam) * args[0][index]

        handle = places[int(torch.randint(len(places), ()))].register_forward_pre_hook(mix)
        logits = to.network(batch.images)
        handle.remove()
        weights = torch.full((len(index),), lam, device=to.device)
        targets = mix_targets(batch.labels, weights, index, to.num_classes)
        return F.cross_entropy(logits, targets)

    return Method(loss, PLAIN)


def cutout(to: Trained, side: float = 0.5) -> Method:
    """DeVries & Taylor, 2017: a square of half of the image's side is blank, here the mean."""

    def loss(batch: Batch) -> Tensor:
        size = batch.images.shape[2:]
        holes = [box(*size, side**2, *random_pixel(*size)) for _ in batch.images]
        images = batch.images.masked_fill(torch.stack(holes)[:, None].to(to.device), 0)
        return F.cross_entropy(to.network(images), batch.labels)

    return Method(loss, PLAIN)


def dropblock(to: Trained, drop: float = 0.1, block: int = 3) -> Method:
    """Ghiasi et al., NeurIPS 2018, by timm, after the last two stages."""
    layer = import_library("timm.layers").DropBlock2d(drop, block)

    def drop_blocks(stage: nn.Module, args: Any, output: Tensor) -> Tensor:
        return layer(output) if stage.training else output

    for stage in to.network.stages[-2:]:
        stage.register_forward_hook(drop_blocks)
    return vanilla(to)


def augmix(to: Trained, weight: float = 12.0) -> Method:
    """Hendrycks et al., ICLR 2020, by torchvision: a clean and two augmented views, and the
    Jensen-Shannon divergence of what the network says of them."""
    transform = import_library("torchvision.transforms.v2").AugMix()

    def augmented(images: Tensor) -> Tensor:
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        spread = (high - low).clamp(min=1e-6)
        pixels = (255 * (images - low) / spread).byte().cpu()
        views = torch.stack([transform(image) for image in pixels]).to(images)
        return views / 255 * spread + low

    def loss(batch: Batch) -> Tensor:
        views = [batch.images, augmented(batch.images), augmented(batch.images)]
        logits = to.network(torch.cat(views))
        chances = logits.softmax(1).chunk(3)
        mean = torch.stack(chances).mean(0).clamp(1e-7, 1).log()
        divergence = sum(F.kl_div(mean, each, reduction="batchmean") for each in chances) / 3
        return F.cross_entropy(logits[: len(batch.labels)], batch.labels) + weight * divergence

    return Method(loss, 3 * PLAIN)


# Saliency Grafting, and what else looks at a network's saliency.


def mixer_of(to: Trained, layer: nn.Module | None = None, **options: Any) -> SaliencyGraft:
    given = {"num_classes": to.num_classes, "seed": to.seed, **options}
    return SaliencyGraft(layer, **given).to(to.device)


def layer_of(to: Trained, stage: int | None, scale: float = 1.0) -> nn.Module:
    """The stage to tap, if none is named the network's own. In a pass at half of the resolution the
    stage before has a map of the same size."""
    return to.network.stages[to.network.tapped - (scale <= 0.5) if stage is None else stage]


def half(
    to: Trained,
    prob: float = PROB,
    pass_scale: float = 1.0,
    mode: str = "eval",
    stage: int | None = None,
    **options: Any,
) -> Method:
    """Grafts a share of the batches, for which alone a clean pass is made.

    ``mode`` is the network's in that pass; ``train`` leaves BatchNorm's statistics alone too. The
    cost is that after the warm-up.
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be eval or train; got {mode!r}")
    if mode == "eval":
        options |= {"network": to.network, "pass_scale": pass_scale}
    mixer = mixer_of(to, layer_of(to, stage, pass_scale), prob=prob, **options)

    def loss(batch: Batch) -> Tensor:
        mixer.set_epoch(batch.epoch)
        if mode == "train" and mixer.needs_pass():
            with torch.no_grad(), statistics_kept(to.network):
                to.network(at_scale(batch.images, pass_scale))
        images, targets = mixer(batch.images, batch.labels)
        return F.cross_entropy(to.network(images), targets)

    augmentations = options.get("augmentations", 1)
    passes = 1 - (1 - prob) ** augmentations  # one serves all of them
    return Method(loss, PLAIN * augmentations + passes * pass_scale**2)


def at_scale(images: Tensor, scale: float) -> Tensor:
    return F.interpolate(images, scale_factor=scale, mode="area") if scale < 1 else images


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but does not learn from it."""
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def another_map(to: Trained, **options: Any) -> Method:
    """A control: ``half`` by the map of the batch's next image, at the same price."""
    return half(to, to_features=lambda features: features.roll(-1, 0), **options)


def attentive(to: Trained, k: int = 6, **options: Any) -> Method:
    """Walawalkar et al., ICASSP 2020: the k most attended cells, labels by area. The attention is
    the network's own; the authors run a second, pretrained one."""
    return half(to, selection="topk", k=k, label="area", **options)


def paper(to: Trained, stage: int | None = None, **options: Any) -> Method:
    """One clean pass, which trains, and whose features give the saliency."""
    mixer = mixer_of(to, layer_of(to, stage), **options)
    return clean_and(to, lambda batch: mixer(batch.images, batch.labels))


def streamed(to: Trained, stage: int | None = None, **options: Any) -> Method:
    """One pass over this step's clean images and the grafts of the last step's."""
    last: list[Batch] = []
    rows = 0
    clean_rows = {"mixed_pass": False, "to_features": lambda features: features[:rows]}
    mixer = mixer_of(to, layer_of(to, stage), **clean_rows, **options)

    def loss(batch: Batch) -> Tensor:
        nonlocal rows
        grafts = [mixer(each.images, each.labels) for each in last]
        rows, last[:] = len(batch.images), [batch]
        logits = to.network(torch.cat([batch.images, *(images for images, _ in grafts)]))
        losses = [F.cross_entropy(logits[:rows], batch.labels)]
        losses += [F.cross_entropy(logits[rows:], targets) for _, targets in grafts]
        return torch.stack(losses).mean()

    return Method(loss, 2 * PLAIN)


def cached(to: Trained, every: int = 5, prob: float = PROB, **options: Any) -> Method:
    """Saliency kept per image, warped as the image is, and made anew after so many epochs."""
    mixer = mixer_of(to, **options)
    due = torch.zeros(to.train_images, dtype=torch.int64)
    maps: list[Tensor | None] = [None] * to.train_images

    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.warp is None:
            raise ValueError("method cached needs data in memory, not image folders")
        ids = batch.ids.tolist()
        stale = [row for row, each in enumerate(ids) if due[each] <= batch.epoch]
        if stale:
            made = channel_saliency(features_of(to.network, batch.originals[stale]))
            for row, saliency in zip(stale, made):
                maps[ids[row]], due[ids[row]] = saliency, batch.epoch + every
        saliency = torch.stack([maps[each] for each in ids])[:, None]
        size = saliency.shape[2:]
        on_pixels = F.interpolate(saliency, batch.images.shape[2:], mode="nearest")
        warped = F.adaptive_avg_pool2d(batch.warp(on_pixels), size)[:, 0]
        return mixer(batch.images, batch.labels, saliency=warped)

    # After it is due, an image waits for a batch that is mixed: 1 / prob epochs, of which 1 counts.
    return mixing(to, mix, prob)._replace(cost=PLAIN + 1 / (every - 1 + 1 / prob))


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """The tapped stage's output in a pass in eval mode, without gradient."""
    kept: list[Tensor] = []
    stage, training = network.stages[network.tapped], network.training
    handle = stage.register_forward_hook(lambda stage, args, output: kept.append(output))
    network.eval()
    with torch.no_grad():
        network(images)
    handle.remove()
    network.train(training)
    return kept[0]


def sobel(to: Trained, prob: float = PROB, **options: Any) -> Method:
    """Grafts by the edges of the images, without a pass, on a grid of a quarter of their side."""
    mixer = mixer_of(to, prob=prob, **options)

    def loss(batch: Batch) -> Tensor:
        edges = F.avg_pool2d(edge_strength(batch.images), 4)
        images, targets = mixer(batch.images, batch.labels, saliency=edges)
        return F.cross_entropy(to.network(images), targets)

    return Method(loss, PLAIN)


def box_labels(
    to: Trained, prob: float = PROB, alpha: float = 1.0, pass_scale: float = 0.0, **options: Any
) -> Method:
    """CutMix's boxes, with labels by saliency instead of area: by the network's, in a clean pass at
    ``pass_scale``, or at 0 by that of the edges."""
    if pass_scale:
        layer, network = layer_of(to, None, pass_scale), to.network
        options |= {"layer": layer, "network": network, "pass_scale": pass_scale}
    mixer = mixer_of(to, **options)

    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        saliency = None if pass_scale else edge_strength(batch.images)
        mask = one_box(to, batch, alpha)
        return mixer(batch.images, batch.labels, saliency=saliency, mask=mask)

    return mixing(to, mix, prob, extra=pass_scale**2)


def edge_strength(images: Tensor) -> Tensor:
    """The length of Sobel's gradient of the mean channel, (B, H, W)."""
    across = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    grey = F.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")
    return F.conv2d(grey, torch.stack([across, across.T])[:, None]).square().sum(1).sqrt()


def loss_gradient(to: Trained, batch: Batch) -> Tensor:
    """The size of the loss's gradient by each pixel, (B, H, W); costs a forward pass and the half
    of a backward pass. The network is in eval mode for it."""
    images = batch.images.clone().requires_grad_()
    to.network.eval()
    loss = F.cross_entropy(to.network(images), batch.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    to.network.train()
    return gradient.square().mean(1).sqrt()


def backward(to: Trained, prob: float = PROB, **options: Any) -> Method:
    """The paper's ablation: the loss's gradient by the pixels as saliency."""
    mixer = mixer_of(to, **options)

    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        saliency = F.avg_pool2d(loss_gradient(to, batch), 4)
        return mixer(batch.images, batch.labels, saliency=saliency)

    return mixing(to, mix, prob, extra=2)


def puzzlemix(to: Trained, prob: float = PROB) -> Method:
    """Kim et al., ICML 2020, as benchmarks/rivals.py has it; blocks of 4x4 pixels."""

    def mix(batch: Batch) -> tuple[Tensor, Tensor]:
        blocks = batch.images.shape[3] // 4
        given = batch.images, loss_gradient(to, batch), batch.labels, to.num_classes, blocks
        return rivals.puzzlemix(*given)

    return mixing(to, mix, prob, extra=2)


METHODS: dict[str, Callable[..., Method]] = {
    "vanilla": vanilla,
    "cutout": cutout,
    "dropblock": dropblock,
    "augmix": augmix,
    "mixup": mixup,
    "manifold-mixup": manifold_mixup,
    "cutmix": cutmix,
    "clean+cutmix": clean_and_cutmix,
    "saliencymix": saliencymix,
    "puzzlemix": puzzlemix,
    "attentive": attentive,
    "half": half,
    "always": partial(half, prob=1.0),
    "paper": paper,
    "streamed": streamed,
    "cached": cached,
    "sobel": sobel,
    "box-labels": box_labels,
    "another-map": another_map,
    "backward": backward,
}


def make(words: str, to: Trained) -> Method:
    """``half pass_scale=0.5 norm=l2``: the method's name, then its options."""
    name, *pairs = words.split()
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    options = dict(pair.split("=", 1) for pair in pairs)
    return METHODS[name](to, **{key: value_of(text) for key, text in options.items()})


def value_of(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a bare word
        return text
