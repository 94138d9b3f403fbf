"""The networks, by name: each gives its stages as ``stages``, whose outputs can be tapped."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rivals import import_library


class ShakeDrop(torch.autograd.Function):
    """Yamada et al., 2019: in training a branch that is dropped is scaled by alpha ~ U(-1, 1), and
    its gradient by another factor, beta ~ U(0, 1), both drawn per image."""

    @staticmethod
    def forward(ctx, branch: Tensor, dropped: bool) -> Tensor:
        ctx.dropped = dropped
        return branch * _per_image(branch, -1.0) if dropped else branch.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * _per_image(gradient, 0.0) if ctx.dropped else gradient, None


def _per_image(like: Tensor, least: float) -> Tensor:
    return like.new_empty(len(like), 1, 1, 1).uniform_(least, 1.0)


def conv(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)


class Residual(nn.Module):
    """A branch and a shortcut: pooled where the side shrinks, padded or projected in channels."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after = branch, shortcut, after
        self.drop = 0.0
        """The probability that ShakeDrop drops the branch."""

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = self.branch(x), self.shortcut(x)
        if self.drop and self.training:
            branch = ShakeDrop.apply(branch, torch.rand(()).item() < self.drop)
        elif self.drop:
            branch = branch * (1 - self.drop)  # the mean of what training saw: E[alpha] = 0
        if branch.shape[1] > shortcut.shape[1]:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, branch.shape[1] - shortcut.shape[1]))
        return self.after(branch + shortcut)


class Staged(nn.Module):
    """A stem, stages whose outputs can be tapped, and a linear head."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], tail: nn.Module, head: nn.Linear):
        super().__init__()
        self.stem, self.stages, self.tail = stem, nn.ModuleList(stages), tail
        self.fc = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.tail(x).mean((2, 3)))


def small(channels: int, classes: int) -> Staged:
    """A ResNet-8 of He et al., 2016, twice as wide, whose stem halves the side: for one CPU core.

    For images of 28 or 32 pixels the three stages give maps of 14, 7 and 4 (16, 8 and 4) cells.
    """

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        branch = nn.Sequential(
            conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
            conv(outputs, outputs), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        return Residual(branch, shortcut, nn.ReLU())

    stem = nn.Sequential(conv(channels, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU())
    stages: list[nn.Module] = [block(32, 32, 1), block(32, 64, 2), block(64, 128, 2)]
    return Staged(stem, stages, nn.Identity(), nn.Linear(128, classes))


NETWORKS = {"small": small}


def make(name: str, channels: int, classes: int) -> nn.Module:
    return NETWORKS[name](channels, classes)
