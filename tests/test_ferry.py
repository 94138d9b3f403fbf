"""The ferry itself, from the CPU to the CPU."""

import pytest
import torch
from conftest import LAYOUTS, assert_same_bits, in_layout, random_bits
from ferry import carry, ferried

from sg_kernels import ops


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_carried_is_the_same_in_the_same_places(layout):
    images = in_layout(random_bits((2, 3, 4, 6), torch.int16), layout)
    carried = carry(images, "cpu")
    assert_same_bits(carried, images)
    assert carried.stride() == images.stride()
    assert carried.storage_offset() == images.storage_offset()
    assert carried.data_ptr() != images.data_ptr()


def test_what_an_operator_writes_comes_back():
    images = random_bits((4, 3, 8, 8), torch.uint8)
    mask, index = torch.rand(4, 2, 2) < 0.5, torch.tensor([1, 2, 3, 0])
    around = torch.full((6, 3, 8, 8), 7, dtype=torch.uint8)
    ferried(ops.overload("graft", "reference"), "cpu")(images, mask, index, around[1:5])
    assert_same_bits(around[1:5], ops.overload("graft", "reference")(images, mask, index))
    assert (around[[0, 5]] == 7).all()
