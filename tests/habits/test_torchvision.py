"""examples/torchvision_transform.py"""

import pytest
import torch
from digits import CLASSES, digits
from torch.utils.data import DataLoader, TensorDataset, default_collate

from sg_kernels import graft, saliency_graft

pytest.importorskip("torchvision")

from torchvision import tv_tensors
from torchvision.transforms import v2

from examples.torchvision_transform import GraftBatch, edges


@pytest.fixture
def batch():
    return digits(8)


@pytest.fixture
def transform():
    return GraftBatch(edges, num_classes=CLASSES)


def expected_of(images, targets):
    torch.manual_seed(1)
    return saliency_graft(images, saliency=edges(images), targets=targets, num_classes=CLASSES)


def test_images_and_labels_are_those_of_the_function(batch, transform):
    expected = expected_of(*batch)
    torch.manual_seed(1)
    mixed, targets = transform(*batch)
    assert expected.mask.any()
    assert mixed.equal(expected.images)
    assert targets.equal(expected.targets)


def test_any_structure_comes_back_as_it_went_in(batch, transform):
    images, targets = batch
    maps = torch.randint(5, (8, 1, 16, 16))
    transform.labels_getter = lambda given: given["annotation"][1]
    given = {
        "annotation": (tv_tensors.Mask(maps), targets),
        "image": tv_tensors.Image(images),
        "name": [f"{i}.png" for i in range(8)],
    }
    torch.manual_seed(1)
    output = transform(given)
    expected = expected_of(images, targets)
    mixed_maps, soft = output["annotation"]
    assert type(output["image"]) is tv_tensors.Image
    assert type(mixed_maps) is tv_tensors.Mask
    assert output["image"].equal(expected.images)
    assert mixed_maps.equal(graft(maps, expected.mask, expected.index))
    assert soft.equal(expected.targets)
    assert output["name"] == given["name"]


def test_the_function_returns_plain_tensors_as_torch_does(batch):
    images, targets = batch
    image = tv_tensors.Image(images)
    assert type(expected_of(image, targets).images) is type(image.clone().add(0)) is torch.Tensor


def test_boxes_are_refused(batch, transform):
    images, targets = batch
    boxes = tv_tensors.BoundingBoxes(torch.zeros(8, 4), format="XYXY", canvas_size=(16, 16))
    with pytest.raises(TypeError, match="does not support BoundingBoxes"):
        transform(images, targets, boxes)


def test_it_takes_turns_with_torchvisions_own(batch, transform):
    choice = v2.RandomChoice([transform, v2.CutMix(num_classes=CLASSES)])
    for _ in range(8):
        mixed, targets = choice(*batch)
        assert mixed.shape == batch[0].shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8))


def collate(samples):
    return GraftBatch(edges, num_classes=CLASSES)(default_collate(samples))


def test_the_workers_of_a_loader_draw_differently(batch):
    """Two workers get the same eight images each, and mix them in two ways."""
    images, targets = batch
    twice = TensorDataset(images.repeat(2, 1, 1, 1), targets.repeat(2))
    (one, _), (other, _) = DataLoader(twice, 8, num_workers=2, collate_fn=collate)
    assert not one.equal(other)


def test_edges_are_where_neighbours_differ():
    images = torch.zeros(1, 3, 8, 12)
    images[..., 2:] = 1  # a step inside the first column of cells
    assert edges(images).shape == (1, 2, 3)
    assert (edges(images)[0] > 0).tolist() == [[True, False, False]] * 2
