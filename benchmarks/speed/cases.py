"""The shapes that are measured, and the fewest bytes each must move."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One call of saliency_graft."""

    name: str
    images: tuple[int, int, int, int]
    features: tuple[int, ...]
    """(B, K, h, w); tokens are (B, N, K)."""
    num_classes: int = 10
    dtype: torch.dtype = torch.float32
    features_dtype: torch.dtype | None = None
    """That of the images, by default."""
    channels_last: bool = False
    token_grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    grid_size: tuple[int, int] | None = None
    augmentations: int = 1

    @property
    def shape(self) -> str:
        """As a table shows it."""
        images, features = ("x".join(map(str, extents)) for extents in (self.images, self.features))
        of_images, of_features = (
            str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.map_dtype)
        )
        if of_images != of_features:
            images += f" {of_images}"
        return f"{images}, {features} {of_features}" + " channels_last" * self.channels_last

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of saliency_graft."""
        return {
            "token_grid": self.token_grid,
            "prefix_tokens": self.prefix_tokens,
            "grid_size": self.grid_size,
            "augmentations": self.augmentations,
        }

    @property
    def map_size(self) -> tuple[int, int]:
        return self.token_grid or (self.features[2], self.features[3])

    @property
    def map_dtype(self) -> torch.dtype:
        return self.features_dtype or self.dtype


class Data(NamedTuple):
    """The inputs of a call."""

    images: Tensor
    features: Tensor
    labels: Tensor
    seed: Tensor | None
    """On the device, for a graph, which cannot draw one; else every call draws its own."""


def make_data(case: Case, device: str, seed_on_device: bool = False) -> Data:
    images = fill(torch.empty(case.images, dtype=case.dtype, device=device))
    # A gain a cell, or sums over many channels would make all maps flat: none is easier to cut up.
    cells = (1, *case.map_size) if case.token_grid is None else (case.features[1], 1)
    gain = torch.empty(case.features[0], *cells, device=device).exponential_()
    features = torch.randn(case.features, device=device).mul_(gain).to(case.map_dtype)
    if case.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        if features.dim() == 4:
            features = features.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(case.num_classes, case.images[:1], device=device)
    seed = torch.randint(2**62, (1,), device=device) if seed_on_device else None
    return Data(images, features, labels, seed)


def fill(tensor: Tensor) -> Tensor:
    # Random: pages of zeros may be one page that was never touched, and zeros draw less power.
    return tensor.uniform_() if tensor.is_floating_point() else tensor.random_(256)


def floor_bytes(case: Case) -> int:
    """Features once + images once + output once: no way of computing it moves fewer.

    The maps, masks and labels besides are thousands of times smaller and not counted.
    """
    batch, channels, height, width = case.images
    image_bytes = batch * channels * height * width * case.dtype.itemsize
    return features_bytes(case) + (1 + case.augmentations) * image_bytes


def features_bytes(case: Case) -> int:
    if case.token_grid is None:
        batch, channels, h, w = case.features
    else:
        batch, _, channels = case.features
        h, w = case.token_grid
    return batch * channels * h * w * case.map_dtype.itemsize


BF16_LAST: dict[str, Any] = {"dtype": torch.bfloat16, "channels_last": True}
UINT8: dict[str, Any] = {"dtype": torch.uint8, "features_dtype": torch.bfloat16}


def wrn(name: str, batch: int = 128, channels: int = 640, **options: Any) -> Case:
    """WideResNet-28-10 on CIFAR-100."""
    return Case(name, (batch, 3, 32, 32), (batch, channels, 8, 8), 100, **options)


def resnet50(name: str, batch: int, **options: Any) -> Case:
    """ResNet-50 on ImageNet."""
    return Case(name, (batch, 3, 224, 224), (batch, 2048, 7, 7), 1000, **options)


def headline(device: str, quick: bool) -> list[Case]:
    """The two that everything is compared on."""
    if quick:
        return [
            Case("cifar", (4, 3, 8, 8), (4, 16, 4, 4)),
            Case("imagenet", (4, 3, 16, 16), (4, 32, 4, 4)),
        ]
    if device == "cuda":
        return [wrn("cifar"), resnet50("imagenet", 256, **BF16_LAST)]
    return [wrn("cifar"), resnet50("imagenet", 64)]


TINY = Case("tiny", (2, 3, 8, 8), (2, 16, 4, 4))
"""So small that only the way to the kernels and back is left."""


def paper(device: str, quick: bool) -> list[Case]:
    """The networks and data sets of the paper, a vision transformer and a spectrogram."""
    if quick:
        return [
            TINY,
            TINY._replace(name="tiny-bf16-channels_last", **BF16_LAST),
            TINY._replace(name="tiny-uint8", **UINT8),
        ]
    on_cuda = device == "cuda"
    cases = [
        wrn("wrn28-10"),
        Case("pyramidnet", (64, 3, 32, 32), (64, 1024, 8, 8), 100),
        Case("resnet18-64x64", (128, 3, 64, 64), (128, 512, 8, 8), 200),
        *(resnet50(f"resnet50-{batch}", batch) for batch in (32, 64, 128, 256, 512)),
        resnet50("resnet50-64-bf16", 64, dtype=torch.bfloat16),
        resnet50("resnet50-64-bf16-channels_last", 64, **BF16_LAST),
        resnet50("resnet50-64-channels_last", 64, channels_last=True),
        resnet50("resnet50-64-fp16", 64, dtype=torch.float16),
        resnet50("resnet50-64-uint8", 64, **UINT8),
        Case(
            "vit-b16",
            (64, 3, 224, 224),
            (64, 197, 768),
            1000,
            token_grid=(14, 14),
            prefix_tokens=1,
        ),
        Case("spectrogram", (64, 1, 128, 1024), (64, 512, 4, 32), 527),
    ]
    if on_cuda:
        cases += [resnet50(f"resnet50-{b}-bf16-channels_last", b, **BF16_LAST) for b in (256, 512)]
        return cases
    # A CPU's training batches are not that large.
    return [case for case in cases if case.images[0] < 256]


def growth(device: str, quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """How cost grows along one axis at a time, from the CIFAR shape."""

    batches, channels, own, batch = [1, 4, 16, 64, 256, 1024], [64, 256, 1024, 4096], 640, 128
    grids, augmentations = [1, 2, 4, 8, 16, 32], [1, 2, 4, 8]
    if quick:
        batches, channels, own, batch = [1, 2], [4, 8], 8, 2
        grids, augmentations = [1, 2], [1, 2]

    def base(batch: int = batch, channels: int = own, **options: Any) -> Case:
        return wrn("", batch, channels, **options)

    axes = {
        "batch": [(n, base(n)) for n in batches],
        "channels": [(n, base(channels=n)) for n in channels],
        "grid": [(n, base(channels=channels[0], grid_size=(n, n))) for n in grids],
        "augmentations": [(n, base(augmentations=n)) for n in augmentations],
    }
    return {
        axis: [(n, case._replace(name=f"{axis}={n}")) for n, case in points]
        for axis, points in axes.items()
    }
