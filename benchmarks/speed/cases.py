"""The shapes that are measured, and the fewest bytes each of them must move."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

COPY_BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
"""Bytes read and written per second by a large copy: assumed, for predictions."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels, 0 .. 255."""


class Case(NamedTuple):
    """One call of saliency_graft."""

    name: str
    images: tuple[int, int, int, int]
    features: tuple[int, ...]
    """(B, K, h, w), or tokens (B, N, K)."""
    num_classes: int = 10
    dtype: torch.dtype = torch.float32
    features_dtype: torch.dtype | None = None
    """None: that of the images."""
    channels_last: bool = False
    token_grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    grid_size: tuple[int, int] | None = None
    augmentations: int = 1
    standardized: torch.dtype | None = None
    """In which the images come out standardised; None: as they went in."""

    @property
    def shape(self) -> str:
        """As a table shows it."""
        images, features = ("x".join(map(str, sizes)) for sizes in (self.images, self.features))
        if self.dtype != self.map_dtype:
            images += f" {str(self.dtype).removeprefix('torch.')}"
        features += f" {str(self.map_dtype).removeprefix('torch.')}"
        return f"{images}, {features}" + " channels_last" * self.channels_last

    def where(self, candidate: str) -> tuple[str, str, str]:
        """How a row begins."""
        return self.name, self.shape, candidate

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of saliency_graft."""
        names = ("token_grid", "prefix_tokens", "grid_size", "augmentations")
        options = {name: getattr(self, name) for name in names}
        if self.standardized is None:
            return options
        return {**options, "standardize": (MEAN, STD), "dtype": self.standardized}

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
    """On the device, for a CUDA graph, which cannot draw one; None: every call draws its own."""


def make_data(case: Case, device: str, seed_on_device: bool = False) -> Data:
    images = fill(torch.empty(case.images, dtype=case.dtype, device=device))
    # A gain per cell: otherwise sums over many channels make every map flat, and nothing is kept.
    cells = (1, *case.map_size) if case.token_grid is None else (case.features[1], 1)
    gain = torch.empty(case.features[0], *cells, device=device).exponential_()
    features = torch.randn(case.features, device=device).mul_(gain).to(case.map_dtype)
    if case.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        features = features.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(case.num_classes, case.images[:1], device=device)
    seed = torch.randint(2**62, (1,), device=device) if seed_on_device else None
    return Data(images, features, labels, seed)


def fill(tensor: Tensor) -> Tensor:
    # Random values: pages of zeros may share one physical page, and zeros draw less power.
    return tensor.uniform_() if tensor.is_floating_point() else tensor.random_(256)


def floor_bytes(case: Case) -> int:
    """Features once + images once + output once.

    Maps, masks and labels are thousands of times smaller and not counted. An image counts once,
    although some of its pixels are read twice and as many never.
    """
    pixels, out = math.prod(case.images), case.standardized or case.dtype
    per_pixel = case.dtype.itemsize + case.augmentations * out.itemsize
    return features_bytes(case) + pixels * per_pixel


def features_bytes(case: Case) -> int:
    """Without the prefix tokens, which nobody reads."""
    channels = case.features[1] if case.token_grid is None else case.features[2]
    return case.features[0] * channels * math.prod(case.map_size) * case.map_dtype.itemsize


BF16_LAST: dict[str, Any] = {"dtype": torch.bfloat16, "channels_last": True}
UINT8: dict[str, Any] = {"dtype": torch.uint8, "features_dtype": torch.bfloat16}
TINY = Case("tiny", (2, 3, 8, 8), (2, 16, 4, 4))
"""So small that a call's time is the host's overhead."""


def wrn(name: str, batch: int = 128, channels: int = 640, **options: Any) -> Case:
    """WideResNet-28-10 on CIFAR-100."""
    return Case(name, (batch, 3, 32, 32), (batch, channels, 8, 8), 100, **options)


def resnet50(name: str, batch: int, **options: Any) -> Case:
    """ResNet-50 on ImageNet."""
    return Case(name, (batch, 3, 224, 224), (batch, 2048, 7, 7), 1000, **options)


def headline(device: str, quick: bool) -> list[Case]:
    """The two cases on which everything is compared."""
    if quick:
        small = Case("cifar", (2, 3, 16, 16), (2, 16, 4, 4))
        return [small, Case("imagenet", (4, 3, 16, 16), (4, 32, 4, 4))]
    if device == "cuda":
        return [wrn("cifar"), resnet50("imagenet", 256, **BF16_LAST)]
    return [wrn("cifar"), resnet50("imagenet", 64)]


def several(device: str, quick: bool) -> Case:
    """Four augmentations in one call."""
    case = headline(device, quick)[-1]
    return case._replace(name=f"{case.name}, four augmentations", augmentations=4)


def standardized(device: str, quick: bool) -> Case:
    """Pixels as a loader brings them, which come out as the network takes them."""
    case = headline(device, quick)[-1]
    dtypes = {"dtype": torch.uint8, "features_dtype": case.dtype, "standardized": case.dtype}
    return case._replace(name=f"{case.name}, standardised", **dtypes)


def paper(device: str) -> list[Case]:
    """The networks and data sets of the paper, a vision transformer and a spectrogram."""
    vit = {"token_grid": (14, 14), "prefix_tokens": 1}
    cases = [
        TINY,
        TINY._replace(name="tiny-bf16-channels_last", **BF16_LAST),
        TINY._replace(name="tiny-uint8", **UINT8),
        wrn("wrn28-10"),
        Case("pyramidnet", (64, 3, 32, 32), (64, 1024, 8, 8), 100),
        Case("resnet18-64x64", (128, 3, 64, 64), (128, 512, 8, 8), 200),
        *(resnet50(f"resnet50-{batch}", batch) for batch in (32, 64, 128, 256, 512)),
        *(resnet50(f"resnet50-{n}-bf16-channels_last", n, **BF16_LAST) for n in (64, 256, 512)),
        resnet50("resnet50-64-bf16", 64, dtype=torch.bfloat16),
        resnet50("resnet50-64-channels_last", 64, channels_last=True),
        resnet50("resnet50-64-fp16", 64, dtype=torch.float16),
        resnet50("resnet50-64-uint8", 64, **UINT8),
        Case("vit-b16", (64, 3, 224, 224), (64, 197, 768), 1000, **vit),
        Case("spectrogram", (64, 1, 128, 1024), (64, 512, 4, 32), 527),
    ]
    # Batches of 256 and more are trained on GPUs.
    return [case for case in cases if device == "cuda" or case.images[0] < 256]


def growth(quick: bool) -> dict[str, list[Case]]:
    """How the cost grows along one axis at a time, from the CIFAR shape."""
    axes = {
        "batch": [wrn(f"batch={n}", n) for n in (1, 4, 16, 64, 256, 1024)],
        "channels": [wrn(f"channels={n}", channels=n) for n in (64, 256, 1024, 4096)],
        "grid": [wrn(f"grid={n}", 128, 64, grid_size=(n, n)) for n in (1, 2, 4, 8, 16, 32)],
        "augmentations": [wrn(f"augmentations={n}", augmentations=n) for n in (1, 2, 4, 8)],
    }
    if quick:  # the small end of each axis, on a small batch
        small = {"images": (2, 3, 32, 32), "features": (2, 8, 8, 8)}
        return {axis: [case._replace(**small) for case in axes[axis][:2]] for axis in axes}
    return axes
