"""The data sets, by name: tensors in memory, or folders of images that are read as needed."""

import gzip
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from benchmarks.rivals import import_library

FASHION = Path("/usr/share/datasets/fashion-mnist")
SCENE_SIDE = 32
TEST_SCENES = 5000
WORKERS = 8


class Batch(NamedTuple):
    images: Tensor
    """(B, C, H, W) float32, standardised."""
    labels: Tensor
    """(B,) int64."""
    epoch: int
    ids: Tensor | None = None
    """(B,) int64: which images of the training set they are. These three are of data in memory."""
    originals: Tensor | None = None
    """The images before they were cropped and flipped."""
    warp: Callable[[Tensor], Tensor] | None = None
    """Crops and flips maps (B, K, H, W) as ``images`` were."""


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: uint8 images (N, C, H, W) and class ids (N,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    padding: int
    """Pixels by which a training image is shifted at most, either way."""

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, seed: int, device: str) -> Iterator[Batch]:
        """Endlessly, each epoch in an order of its own; the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.standardise(self.images).to(device), self.labels.to(device)
        for epoch in itertools.count():
            order = torch.randperm(len(images), generator=generator)
            for ids in order.split(size)[: len(images) // size]:
                warp = random_warp(len(ids), self.padding, generator)
                originals = images[ids]
                yield Batch(warp(originals), labels[ids], epoch, ids, originals, warp)

    def tests(self, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.standardise(self.test_images)
        for these, labels in zip(images.split(size), self.test_labels.split(size)):
            yield these.to(device), labels.to(device)

    def standardise(self, images: Tensor) -> Tensor:
        """By the mean and the deviation of the training images, per channel."""
        pixels = self.images.double()
        mean, std = pixels.mean((0, 2, 3), True), pixels.std((0, 2, 3), keepdim=True)
        return (images - mean.float()) / std.float()


def random_warp(count: int, padding: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Crops of the padded images, half of them mirrored."""
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5

    def warp(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, [padding] * 4)
        x = torch.arange(width).expand(count, width)
        x = shifts[1] + torch.where(mirrored, width - 1 - x, x)
        y = shifts[0] + torch.arange(height)
        rows = torch.arange(count)[:, None, None]
        return padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()

    return warp


@dataclass(frozen=True)
class Folders:
    """``train/<class>/*`` and ``val/<class>/*``, as of ImageNet, read by torchvision."""

    root: Path
    side: int
    seed: int
    count: int | None
    channels = 3

    def __post_init__(self) -> None:
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                raise FileNotFoundError(
                    f"{self.root / part} is missing: give --root, a folder that holds "
                    "train/<class>/ and val/<class>/"
                )

    @property
    def num_classes(self) -> int:
        return sum(each.is_dir() for each in (self.root / "train").iterdir())

    def __len__(self) -> int:
        return len(self._part("train"))

    def batches(self, size: int, seed: int, device: str) -> Iterator[Batch]:
        options = {"shuffle": True, "generator": torch.Generator().manual_seed(seed)}
        loader = self._loader("train", size, drop_last=True, **options)
        for epoch in itertools.count():
            for images, labels in loader:
                yield Batch(images.to(device), labels.to(device), epoch)

    def tests(self, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader("val", size):
            yield images.to(device), labels.to(device)

    def _loader(self, part: str, size: int, **options: Any) -> DataLoader:
        # Workers also where one would do: they are seeded by the loader's generator.
        return DataLoader(self._part(part), size, num_workers=WORKERS, **options)

    def _part(self, part: str) -> Any:
        v2, datasets = (
            import_library(f"torchvision.{name}") for name in ("transforms.v2", "datasets")
        )
        if part == "train":
            crop = [v2.RandomResizedCrop(self.side), v2.RandomHorizontalFlip()]
        else:
            crop = [v2.Resize(self.side * 8 // 7), v2.CenterCrop(self.side)]
        standardise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), standardise]
        reader = import_library("torchvision.datasets").ImageFolder
        images = reader(self.root / part, v2.Compose([*crop, *to_float]))
        if part == "train":
            return Subset(images, subset(len(images), self.seed, self.count).tolist())
        return images


def subset(available: int, seed: int, count: int | None) -> Tensor:
    """``count`` of the images, drawn by the seed; all for None."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:count]


def fashion(root: Path | None, seed: int, count: int | None) -> Arrays:
    """Fashion-MNIST: 28x28 grey images of ten kinds of clothes, centred on black."""
    images, labels, test_images, test_labels = _fashion(root or FASHION)
    chosen = subset(len(images), seed, count)
    return Arrays(images[chosen], labels[chosen], test_images, test_labels, 10, padding=2)


def clutter(root: Path | None, seed: int, count: int | None) -> Arrays:
    """Fashion-MNIST's clothes, coloured, shrunk and off centre on photographs, among scraps of
    other clothes: 32x32 in colour. What is salient has to be found."""
    images, labels, _, _ = _fashion(root or FASHION)
    chosen = subset(len(images), seed, count)
    test = _test_scenes(root or FASHION, TEST_SCENES)
    return Arrays(_scenes(images, chosen, seed), labels[chosen], *test, 10, padding=2)


def cifar(name: str, root: Path | None, seed: int, count: int | None) -> Arrays:
    """CIFAR10 or CIFAR100, from the python archive, unpacked in ``root``."""
    reader = getattr(import_library("torchvision.datasets"), name)
    root = root or Path("data")
    try:
        train, test = (reader(root, train=train) for train in (True, False))
    except RuntimeError as error:
        folder = root / reader.base_folder
        raise FileNotFoundError(
            f"{folder} is missing or not whole: unpack {reader.filename} there, or give --root"
        ) from error
    chosen = subset(len(train.data), seed, count)
    images, test_images = (torch.tensor(each.data).permute(0, 3, 1, 2) for each in (train, test))
    labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
    classes = len(train.classes)
    return Arrays(images[chosen], labels[chosen], test_images, test_labels, classes, padding=4)


@lru_cache
def _fashion(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [("train", "images"), ("train", "labels"), ("t10k", "images"), ("t10k", "labels")]
    images, labels, test_images, test_labels = (_read_idx(root, *part) for part in parts)
    return images[:, None], labels.long(), test_images[:, None], test_labels.long()


def _read_idx(root: Path, part: str, kind: str) -> Tensor:
    """The idx format: four bytes, the last of them the number of sizes, the sizes, then uint8."""
    path = root / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: install Debian's package dataset-fashion-mnist, or give --root, "
            "a folder that holds the four files of Fashion-MNIST"
        )
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes)
    return torch.tensor(values).view(*sizes.tolist())


@lru_cache
def _test_scenes(root: Path, count: int) -> tuple[Tensor, Tensor]:
    """The same for every seed."""
    _, _, images, labels = _fashion(root)
    chosen = subset(len(images), 0, count)
    return _scenes(images, chosen, seed=-1), labels[chosen]


def _scenes(images: Tensor, chosen: Tensor, seed: int) -> Tensor:
    draw = np.random.default_rng([seed + 1, 0xC1])
    clothes = images[:, 0].numpy() / np.float32(255)
    scenes = np.stack([_scene(draw, clothes, int(each)) for each in chosen])
    return torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous()


def _scene(draw: np.random.Generator, clothes: np.ndarray, chosen: int) -> np.ndarray:
    """One image (H, W, 3) uint8: a photograph's crop, scraps of clothes, then the object."""
    photo = _photographs()[draw.integers(2)]
    y, x = (draw.integers(size - SCENE_SIDE) for size in photo.shape[:2])
    scene = photo[y : y + SCENE_SIDE, x : x + SCENE_SIDE].copy()
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


LOADERS: dict[str, Callable[[Path | None, int, int | None], Arrays | Folders]] = {
    "fashion": fashion,
    "clutter": clutter,
    "cifar10": lambda *given: cifar("CIFAR10", *given),
    "cifar100": lambda *given: cifar("CIFAR100", *given),
    "tiny-imagenet": lambda root, *given: Folders(root or Path("data/tiny-imagenet"), 64, *given),
    "imagenet": lambda root, *given: Folders(root or Path("data/imagenet"), 224, *given),
}


@lru_cache(maxsize=1)  # the methods of an experiment take turns on the same images
def load(name: str, root: Path | None, seed: int, count: int | None) -> Arrays | Folders:
    """``count`` training images, drawn by the seed, or all; ``root`` None: the usual folder."""
    return LOADERS[name](root, seed, count)
