"""examples/labels.py: the masks and labels of other methods, by their own definitions."""

import inspect

import pytest
import torch
import truth
from conftest import assert_same_bits
from torch.nn import functional as F

from examples import labels

IMAGES, IDS = torch.randn(6, 3, 32, 32), torch.arange(6) % 4
FEATURES = torch.randn(6, 8, 4, 4)


def mixed(lam, index):
    one_hot = F.one_hot(IDS, 4).float()
    return lam[:, None] * one_hot + (1 - lam[:, None]) * one_hot[index]


def test_boxes_are_squares_of_at_most_their_area():
    area = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(50)
    inside = ~labels.outside_boxes(area, 16)
    down, across = inside.any(2), inside.any(1)
    assert torch.equal(inside, down[:, :, None] & across[:, None])  # rectangles
    found = inside.float().mean((1, 2))
    assert (found[area == 0] == 0).all()
    side = 16 * area.sqrt()
    assert (down.sum(1) <= side.ceil()).all()
    uncut = (down[:, [0, -1]] | across[:, [0, -1]]).any(1).logical_not() & (area > 0)
    assert uncut.any()
    assert ((down.sum(1) - side).abs() < 1)[uncut].all()


def test_cutmix_labels_are_one_less_the_area_of_the_box():
    result = labels.cutmix(IMAGES, IDS, 4)
    box = 1 - result.mask.float().mean((1, 2))
    assert 0 < box.max() < 1
    torch.testing.assert_close(result.lam, 1 - box)
    torch.testing.assert_close(result.targets, mixed(1 - box, result.index))
    assert_same_bits(result.images, truth.graft(IMAGES, result.mask, result.index))


def test_cutmix_by_saliency_weighs_what_the_box_covers_and_brings():
    result = labels.cutmix(IMAGES, IDS, 4, FEATURES)
    grid = truth.resample(truth.channel_saliency(FEATURES), (16, 16))
    lam = truth.label_ratio(grid, result.mask.numpy(), result.index.tolist())
    torch.testing.assert_close(result.lam, torch.from_numpy(lam).float())
    torch.testing.assert_close(result.targets, mixed(result.lam, result.index))


def test_attentive_cutmix_grafts_the_k_most_attentive_cells():
    attention = torch.rand(6, 7, 7)
    result = labels.attentive_cutmix(IMAGES, IDS, 4, attention)
    bar = attention.flatten(1).sort(1, descending=True).values[:, 5, None, None]
    assert torch.equal(result.mask, attention >= bar)
    torch.testing.assert_close(result.targets, mixed(torch.full((6,), 6 / 49), result.index))


def test_transmix_weighs_the_attention_to_each_part_of_the_mixed_image():
    seen = []

    def attend(images):
        seen.append(images)
        return images.abs().mean(1)[:, ::2, ::2]  # of 16 x 16 cells, as the mask

    torch.manual_seed(3)
    images, targets = labels.transmix(IMAGES, IDS, 4, attend)
    torch.manual_seed(3)
    result = labels.cutmix(IMAGES, IDS, 4)
    assert_same_bits(images, result.images)
    assert_same_bits(seen[0], images)
    attention = attend(images)
    lam = (attention * result.mask).sum((1, 2)) / attention.sum((1, 2))
    torch.testing.assert_close(targets, mixed(lam, result.index))


@pytest.mark.parametrize("function", [labels.cutmix, labels.attentive_cutmix, labels.transmix])
def test_each_is_under_ten_lines(function):
    body = inspect.getsource(function).split('"""')[-1].strip()
    assert len(body.splitlines()) < 10
