"""What the tests of examples/ share: scikit-learn's digits, and a network to train on them."""

from contextlib import suppress

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.rivals import import_library

with suppress(ModuleNotFoundError):
    import_library("torchvision")  # before the frameworks do, which import it as it is

CLASSES = 10


def digits(count):
    """The first digits, (count, 3, 16, 16) in [0, 1], and their classes."""
    data = load_digits()
    images = torch.tensor(data.images[:count, None], dtype=torch.float32) / 16
    return F.interpolate(images, scale_factor=2).repeat(1, 3, 1, 1), torch.tensor(
        data.target[:count]
    )


def loader(count=32, batch=8):
    """Batches [images, classes] in a fixed order."""
    return DataLoader(TensorDataset(*digits(count)), batch)


class Net(nn.Module):
    """Has what a clean pass could disturb: BatchNorm's statistics, and dropout's draws."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, CLASSES))

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean((2, 3)))
