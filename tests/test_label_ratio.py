"""Stage 7 through its own function: lam and the two shares that it is made of."""

import math

import numpy as np
import pytest
import torch
import truth
from conftest import assert_same_bits, random_mask

from sg_kernels import checks, label_ratio, saliency_graft

NORMS = pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])


def inputs(batch=4, augmentations=1, grid=(5, 6)):
    rows = augmentations * batch
    index = torch.randint(max(batch, 1), (rows,))
    return torch.rand(batch, 5, 6), random_mask(rows, *grid), index


@NORMS
@pytest.mark.parametrize("grid", [(5, 6), (2, 3), (10, 12), (3, 11), (1, 1)])
@pytest.mark.parametrize("augmentations", [1, 3])
def test_lam_and_shares_are_the_truth(norm, grid, augmentations):
    saliency, mask, index = inputs(4, augmentations, grid)
    resampled = truth.resample(saliency.double().numpy(), grid)
    expected = truth.shares(resampled, mask.numpy(), index.tolist(), norm)
    shares = label_ratio(saliency, mask, index, norm=norm, shares=True)
    assert shares._fields == ("own", "other")
    for found, wanted in zip(shares, expected, strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    lam = label_ratio(saliency, mask, index, norm=norm)
    assert lam.dtype == torch.float32
    expected = truth.label_ratio(resampled, mask.numpy(), index.tolist(), norm)
    np.testing.assert_allclose(lam, expected, rtol=1e-5)


@NORMS
def test_it_is_the_lam_of_every_backend(backend, norm):
    images, (saliency, mask, index) = torch.rand(4, 3, 12, 12), inputs(4, 2, (3, 4))
    result = saliency_graft(
        images,
        saliency=saliency,
        mask=mask,
        index=index,
        augmentations=2,
        norm=norm,
        seed=1,
        backend=backend,
    )
    torch.testing.assert_close(label_ratio(saliency, mask, index, norm=norm), result.lam)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_every_batch_size(batch):
    saliency, mask, index = inputs(batch)
    expected = truth.label_ratio(saliency.double().numpy(), mask.numpy(), index.tolist())
    np.testing.assert_allclose(label_ratio(saliency, mask, index), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_maps_of_every_dtype_and_layout(dtype, strided):
    saliency, mask, index = inputs()
    saliency = saliency.to(dtype)
    if strided:
        saliency, mask = saliency.mT.contiguous().mT, mask.repeat(2, 1, 1)[::2]
    expected = truth.label_ratio(saliency.double().numpy(), mask.numpy(), index.tolist())
    np.testing.assert_allclose(label_ratio(saliency, mask, index), expected, rtol=1e-5)


@NORMS
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_norm_that_is_0_or_not_finite_gives_nan_shares_and_lam_by_area(norm, value):
    saliency, mask, _ = inputs(3)
    saliency[1] = value
    index = torch.tensor([1, 2, 0])
    own, other = label_ratio(saliency, mask, index, norm=norm, shares=True)
    assert own.isnan().tolist() == [False, True, False]
    assert other.isnan().tolist() == [True, False, False]
    lam, area = label_ratio(saliency, mask, index, norm=norm), mask.float().mean((1, 2))
    assert torch.equal(lam[:2], area[:2])
    assert lam[2] != area[2]


def test_where_nothing_survives_of_either_lam_is_the_area():
    saliency = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    mask = torch.tensor([[[False, True]], [[True, False]]])
    index = torch.tensor([1, 0])
    own, other = label_ratio(saliency, mask, index, shares=True)
    assert own.tolist() == other.tolist() == [0.0, 0.0]
    assert label_ratio(saliency, mask, index).tolist() == [0.5, 0.5]


def test_a_map_that_survives_whole_has_a_share_of_one():
    saliency, _, index = inputs()
    everything = torch.ones(4, 5, 6, dtype=torch.bool)
    own, other = label_ratio(saliency, everything, index, shares=True)
    torch.testing.assert_close(own, torch.ones(4))
    assert other.tolist() == [0.0] * 4
    assert label_ratio(saliency, everything, index).tolist() == [1.0] * 4


def test_nothing_is_differentiated_or_written_to():
    saliency, mask, index = inputs()
    before = saliency.clone()
    assert not label_ratio(saliency.requires_grad_(), mask, index).requires_grad
    assert_same_bits(saliency.detach(), before)


def test_values_that_nobody_checked_show_as_nan(monkeypatch):
    monkeypatch.setattr(checks, "_values_are_checked", lambda values: False)
    saliency, mask, index = torch.rand(4, 5, 6), random_mask(4, 5, 6), torch.tensor([1, 9, 3, -1])
    own, other = label_ratio(saliency, mask, index, shares=True)
    assert own.isfinite().all()
    assert other.isnan().tolist() == [False, True, False, True]
    assert label_ratio(saliency, mask, index).isnan().tolist() == [False, True, False, True]
    saliency[0, 0, 0] = -1.0
    own, _ = label_ratio(saliency, mask, index, shares=True)
    assert own.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(dynamic):
    torch.compiler.reset()

    def both(saliency, mask, index):
        lam = label_ratio(saliency, mask, index, norm="l2")
        return lam, *label_ratio(saliency, mask, index, shares=True)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 4, 5):
        arguments = inputs(batch, grid=(3, 4))
        for one, other in zip(compiled(*arguments), both(*arguments), strict=True):
            torch.testing.assert_close(one, other)


SALIENCY, MASK, INDEX = torch.rand(2, 4, 4), random_mask(4, 2, 2), torch.tensor([1, 0, 0, 1])
REFUSED = [
    *[
        ("saliency", {"saliency": value})
        for value in (None, SALIENCY.numpy(), SALIENCY[0], SALIENCY.long(), SALIENCY - 1)
    ],
    *[("saliency", {"saliency": value}) for value in (SALIENCY[:, :0], SALIENCY.to_sparse())],
    *[
        ("mask", {"mask": value})
        for value in (None, MASK.numpy(), MASK.float(), MASK[0], MASK[:3], MASK[:, :0])
    ],
    ("mask", {"mask": MASK.to("meta")}),
    *[
        ("index", {"index": value})
        for value in (None, INDEX.tolist(), INDEX.int(), INDEX[:2], INDEX + 1, INDEX.to("meta"))
    ],
    *[("norm", {"norm": value}) for value in (None, "l3", "area", 1)],
    *[("shares", {"shares": value}) for value in (None, 1, "yes")],
]


@pytest.mark.parametrize(("name", "change"), REFUSED)
def test_label_ratio_refuses(name, change):
    arguments = {"saliency": SALIENCY, "mask": MASK, "index": INDEX}
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        label_ratio(**arguments | change)
