"""The data sets, by name. Those that fit are tensors in memory; folders of images are read as
needed."""

import gzip
import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FASHION = Path("/usr/share/datasets/fashion-mnist")
CLUTTER_SIDE = 32


class Batch(NamedTuple):
    images: Tensor
    """(B, C, H, W) float32, standardised."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64: which images of the training set they are."""
    epoch: int
    originals: Tensor
    """The images before they were cropped and flipped."""
    warp: Callable[[Tensor], Tensor]
    """Crops and flips maps (B, K, H, W) as ``images`` were."""


class Arrays(NamedTuple):
    """A data set in memory: uint8 images (N, C, H, W) and class ids (N,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    padding: int
    """Pixels by which a training image is shifted at most, either way."""

    def batches(self, size: int, seed: int, device: str) -> Iterator[Batch]:
        """Endlessly, each epoch in an order of its own; the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.standardise(self.images).to(device), self.labels.to(device)
        for epoch in itertools.count():
            order = torch.randperm(len(images), generator=generator)
            for ids in order.split(size)[: len(images) // size]:
                warp = random_warp(len(ids), self.padding, generator)
                originals = images[ids]
                yield Batch(warp(originals), labels[ids], ids, epoch, originals, warp)

    def tests(self, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.standardise(self.test_images)
        for these, labels in zip(images.split(size), self.test_labels.split(size)):
            yield these.to(device), labels.to(device)

    def standardise(self, images: Tensor) -> Tensor:
        pixels = self.images.double()
        mean, std = pixels.mean((0, 2, 3), True), pixels.std((0, 2, 3), keepdim=True)
        return (images - mean.float()[0]) / std.float()[0]


def random_warp(
    count: int, padding: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Crops of the padded images, half of them mirrored."""
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5

    def warp(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, [padding] * 4)
        y = shifts[0] + torch.arange(height)
        x = torch.arange(width).expand(count, width)
        x = shifts[1] + torch.where(mirrored, width - 1 - x, x)
        rows = torch.arange(count)[:, None, None]
        return padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()

    return warp


def fashion(seed: int, count: int | None) -> Arrays:
    """Fashion-MNIST: 28x28 grey images of ten kinds of clothes, centred on black."""
    images, labels, test_images, test_labels = _fashion()
    chosen = subset(len(images), seed, count)
    return Arrays(images[chosen], labels[chosen], test_images, test_labels, 10, padding=2)


def clutter(seed: int, count: int | None, test_count: int = 5000) -> Arrays:
    """Fashion-MNIST's clothes, coloured, shrunk and off centre on photographs, among scraps of
    other clothes: 32x32 in colour. What is salient has to be found."""
    images, labels, test_images, test_labels = _fashion()
    chosen = subset(len(images), seed, count)
    test = subset(len(test_images), 0, test_count)
    return Arrays(
        _cluttered(images, chosen, seed), labels[chosen],
        _clutter_test(test_count), test_labels[test], 10, padding=2,
    )  # fmt: skip


def subset(available: int, seed: int, count: int | None) -> Tensor:
    """``count`` of the images, drawn by the seed; all for None."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:count]


@lru_cache
def _fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [("train", "images"), ("train", "labels"), ("t10k", "images"), ("t10k", "labels")]
    images, labels, test_images, test_labels = (read_idx(FASHION, *part) for part in parts)
    return images[:, None], labels.long(), test_images[:, None], test_labels.long()


def read_idx(directory: Path, part: str, kind: str) -> Tensor:
    """LeCun's idx format: four bytes, the last the number of sizes, the sizes, then uint8."""
    path = directory / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: install Debian's package dataset-fashion-mnist, or put the four "
            f"files of Fashion-MNIST there"
        )
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", content[3], 4)
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])).view(*sizes)


@lru_cache
def _clutter_test(count: int) -> Tensor:
    images = _fashion()[2]
    return _cluttered(images, subset(len(images), 0, count), seed=-1)


def _cluttered(images: Tensor, chosen: Tensor, seed: int) -> Tensor:
    draw = np.random.default_rng([seed + 1, 0xC1])
    clothes = images[:, 0].numpy() / np.float32(255)
    scenes = np.stack([_scene(draw, clothes, int(each)) for each in chosen])
    return torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous()


def _scene(draw: np.random.Generator, clothes: np.ndarray, chosen: int) -> np.ndarray:
    """One image (H, W, 3) uint8: a photograph's crop, scraps of clothes, then the object."""
    side = CLUTTER_SIDE
    photo = _photographs()[draw.integers(2)]
    y, x = (draw.integers(size - side) for size in photo.shape[:2])
    scene = photo[y : y + side, x : x + side].copy()
    for _ in range(4):
        scrap = clothes[draw.integers(len(clothes))]
        y, x = draw.integers(4, 16, 2)
        _paste(draw, scene, scrap[y : y + 8, x : x + 8])
    size = draw.integers(16, 23)
    whole = torch.from_numpy(clothes[chosen])[None, None]
    _paste(draw, scene, F.interpolate(whole, (size, size), mode="area")[0, 0].numpy())
    return (255 * scene).astype(np.uint8)


def _paste(draw: np.random.Generator, scene: np.ndarray, grey: np.ndarray) -> None:
    """At a random place and in a random colour; what is black in ``grey`` is not there."""
    y, x = (draw.integers(size - grey.shape[0] + 1) for size in scene.shape[:2])
    colour = draw.uniform(0.3, 1.0, 3).astype(np.float32)
    there = np.minimum(1, 4 * grey)[..., None]
    box = scene[y : y + grey.shape[0], x : x + grey.shape[1]]
    box[:] = (1 - there) * box + there * grey[..., None] * colour


@lru_cache
def _photographs() -> list[np.ndarray]:
    """scikit-learn's two, at half their resolution."""
    from sklearn.datasets import load_sample_images

    return [photo[::2, ::2] / np.float32(255) for photo in load_sample_images().images]


LOADERS = {"fashion": fashion, "clutter": clutter}


@lru_cache(maxsize=2)  # the methods of an experiment take turns on the same images
def load(name: str, seed: int, count: int | None) -> Arrays:
    return LOADERS[name](seed, count)
