"""A batch and a network to train, for the tests of the module and of its tap."""

import io
import pickle

import torch
from torch import nn


def batch_of(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 16, 16, generator=generator)
    features = torch.randn(batch, 8, 4, 4, generator=generator)
    return images, torch.arange(batch) % 5, features


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
