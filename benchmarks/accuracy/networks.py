"""The networks, by name. Each names its stages, and which of them Saliency Grafting taps."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rivals import import_library


class Network(nn.Module):
    """A stem, stages, a tail, global average pooling and a linear head."""

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], tail: nn.Module, width: int, classes: int
    ) -> None:
        super().__init__()
        self.stem, self.stages, self.tail = stem, nn.ModuleList(stages), tail
        self.fc = nn.Linear(width, classes)
        self.tapped = len(stages) - 1
        """The stage whose output is the feature map."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.tail(x).mean((2, 3)))


class Residual(nn.Module):
    """after(branch + shortcut); a shortcut of fewer channels is padded with zeros."""

    def __init__(
        self, before: nn.Module, branch: nn.Module, shortcut: nn.Module, after: nn.Module
    ) -> None:
        super().__init__()
        self.before, self.branch, self.shortcut, self.after = before, branch, shortcut, after
        self.drop = 0.0
        """The probability with which ShakeDrop drops the branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        branch, shortcut = self.branch(x), self.shortcut(x)
        if self.drop:
            branch = shakedrop(branch, self.drop, self.training)
        missing = branch.shape[1] - shortcut.shape[1]
        return self.after(branch + F.pad(shortcut, (0, 0, 0, 0, 0, missing)))


def shakedrop(branch: Tensor, drop: float, training: bool) -> Tensor:
    """Yamada et al., 2019: a dropped branch is scaled by alpha ~ U(-1, 1) per image, its gradient
    by beta ~ U(0, 1). Evaluation takes the mean, in which alpha is 0."""
    if not training:
        return branch * (1 - drop)
    if torch.rand(()).item() >= drop:
        return branch
    alpha, beta = (
        branch.new_empty(len(branch), 1, 1, 1).uniform_(least, 1) for least in (-1.0, 0.0)
    )
    # Forward the first term counts and the rest is 0; backward only the rest has a gradient.
    return (alpha * branch).detach() + beta * branch - (beta * branch).detach()


def conv(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)


def activated(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def small(channels: int, classes: int) -> Network:
    """A ResNet-8 in the manner of He et al., 2016, for one CPU core: its stem halves the side.

    Images of 28 or 32 pixels give maps of 14, 7 and 4 (16, 8 and 4) cells a side.
    """

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        branch = nn.Sequential(
            conv(inputs, outputs, 3, stride),
            activated(outputs),
            conv(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        return Residual(nn.Identity(), branch, shortcut, nn.ReLU())

    stem = nn.Sequential(conv(channels, 16, 3, 2), activated(16))
    stages: list[nn.Module] = [block(16, 16, 1), block(16, 48, 2), block(48, 96, 2)]
    return Network(stem, stages, nn.Identity(), 96, classes)


def wide(channels: int, classes: int, depth: int = 28, width: int = 10) -> Network:
    """A wide ResNet of Zagoruyko & Komodakis, 2016: WRN-28-10."""

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        # Where the size changes, the shortcut starts from the activated input too.
        convs = [conv(inputs, outputs, 3, stride), activated(outputs), conv(outputs, outputs)]
        if inputs == outputs:
            branch = nn.Sequential(activated(inputs), *convs)
            return Residual(nn.Identity(), branch, nn.Identity(), nn.Identity())
        shortcut = conv(inputs, outputs, 1, stride)
        return Residual(activated(inputs), nn.Sequential(*convs), shortcut, nn.Identity())

    stages: list[nn.Module] = []
    inputs = 16
    for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        others = [block(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
        stages.append(nn.Sequential(block(inputs, outputs, stride), *others))
        inputs = outputs
    return Network(conv(channels, 16), stages, activated(inputs), inputs, classes)


def pyramid(channels: int, classes: int, depth: int = 200, alpha: int = 240) -> Network:
    """PyramidNet-200 of Han et al., 2017, with bottlenecks: each block is wider than the last."""

    def block(inputs: int, inner: int, stride: int) -> Residual:
        branch = nn.Sequential(
            nn.BatchNorm2d(inputs),
            conv(inputs, inner, 1),
            activated(inner),
            conv(inner, inner, 3, stride),
            activated(inner),
            conv(inner, 4 * inner, 1),
            nn.BatchNorm2d(4 * inner),
        )
        shortcut = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        return Residual(nn.Identity(), branch, shortcut, nn.Identity())

    count = (depth - 2) // 9
    stages: list[nn.Module] = []
    inputs = 16
    for stage in range(3):
        blocks = []
        for i in range(count):
            inner = round(16 + alpha * (stage * count + i + 1) / (3 * count))
            blocks.append(block(inputs, inner, 2 if stage > 0 and i == 0 else 1))
            inputs = 4 * inner
        stages.append(nn.Sequential(*blocks))
    stem = nn.Sequential(conv(channels, 16), nn.BatchNorm2d(16))
    return Network(stem, stages, activated(inputs), inputs, classes)


def with_shakedrop(make: Callable[[int, int], Network], channels: int, classes: int) -> Network:
    """Branches are dropped with a probability that grows linearly to one half."""
    network = make(channels, classes)
    blocks = [each for each in network.modules() if isinstance(each, Residual)]
    for i, block in enumerate(blocks, 1):
        block.drop = 0.5 * i / len(blocks)
    return network


def by_timm(name: str, small_images: bool, channels: int, classes: int) -> nn.Module:
    """timm's ResNet; for small images with the stem of 3x3 that keeps their resolution."""
    timm = import_library("timm")
    network = timm.create_model(name, in_chans=channels, num_classes=classes)
    if small_images:
        network.conv1, network.maxpool = conv(channels, 64), nn.Identity()
    # A tuple, so that the stages are registered under one name only.
    network.stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    network.tapped = 2 if small_images else 3
    return network


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "small": small,
    "small-shakedrop": partial(with_shakedrop, small),
    "wrn-10-2": partial(wide, depth=10, width=2),
    "wrn-28-10": wide,
    "pyramidnet-200": pyramid,
    "pyramidnet-200-shakedrop": partial(with_shakedrop, pyramid),
    "resnet18": partial(by_timm, "resnet18", True),
    "resnet50": partial(by_timm, "resnet50", False),
}


def make(name: str, channels: int, classes: int) -> nn.Module:
    """With ``stages``, and ``tapped``, the one that Saliency Grafting taps."""
    return NETWORKS[name](channels, classes)
