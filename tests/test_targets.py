"""Stage 8 through its own function, and criteria that take no dense targets."""

import numpy as np
import pytest
import torch
import truth
from torch import nn
from torch.nn import functional as F

import sg_kernels


def lam_and_index(batch, augmentations=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = batch * augmentations
    return torch.rand(rows, generator=generator), torch.randint(batch, (rows,), generator=generator)


def assert_mixed(mixed, targets, lam, index, num_classes, label_smoothing=0.0):
    expected = truth.mix_targets(targets, lam, index.tolist(), num_classes, label_smoothing)
    assert mixed.dtype == torch.float32
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-7)


INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint64])
def test_class_ids_of_any_integer_dtype(backend, dtype):
    ids = torch.tensor([3, 0, 99, 3]).to(dtype)
    lam, index = lam_and_index(4)
    mixed = sg_kernels.mix_targets(ids, lam, index, 100, backend=backend)
    assert_mixed(mixed, ids.long(), lam, index, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dense_rows_of_any_real_dtype(backend, dtype):
    targets = torch.rand(4, 9).to(dtype)
    lam, index = lam_and_index(4)
    mixed = sg_kernels.mix_targets(targets, lam, index, backend=backend)
    assert_mixed(mixed, targets.double(), lam, index, 9)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_multi_label_rows(backend, dtype):
    targets = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).to(dtype)
    lam, index = lam_and_index(4)
    mixed = sg_kernels.mix_targets(targets, lam, index, backend=backend)
    assert_mixed(mixed, targets.double(), lam, index, 3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5, 1.0, 1, 0])
@pytest.mark.parametrize("num_classes", [1, 2, 7, 1000])
def test_label_smoothing_spreads_over_all_classes(backend, label_smoothing, num_classes):
    ids = torch.arange(4) % num_classes
    lam, index = lam_and_index(4)
    mixed = sg_kernels.mix_targets(ids, lam, index, num_classes, label_smoothing, backend=backend)
    assert_mixed(mixed, ids, lam, index, num_classes, label_smoothing)


@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_row_a_b_is_the_a_th_draw_of_sample_b(backend, kind):
    targets = torch.tensor([2, 0, 1]) if kind == "ids" else torch.rand(3, 4)
    lam, index = lam_and_index(3, augmentations=3)
    mixed = sg_kernels.mix_targets(targets, lam, index, 4, backend=backend)
    assert_mixed(mixed, targets, lam, index, 4)


@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_strided_arguments(backend, kind):
    targets = torch.tensor([2, 9, 0, 9, 1, 9])[::2] if kind == "ids" else torch.rand(4, 3).t()
    lam, index = torch.rand(6)[1::2], torch.tensor([2, 9, 0, 9, 0, 9])[::2]
    mixed = sg_kernels.mix_targets(targets, lam, index, 4, backend=backend)
    assert_mixed(mixed, targets, lam, index, 4)


@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_an_empty_batch_mixes_to_nothing(backend, kind):
    targets = torch.zeros(0, dtype=torch.int64) if kind == "ids" else torch.zeros(0, 5)
    lam, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    mixed = sg_kernels.mix_targets(targets, lam, index, 5, backend=backend)
    assert mixed.shape == (0, 5)
    assert mixed.dtype == torch.float32


def test_a_nan_weight_makes_its_row_nan_and_no_other(backend):
    lam = torch.tensor([0.5, torch.nan, 1.0])
    mixed = sg_kernels.mix_targets(
        torch.arange(3), lam, torch.tensor([1, 2, 0]), 3, backend=backend
    )
    assert mixed.isnan().all(1).tolist() == [False, True, False]


def test_mixing_carries_no_gradient(backend):
    targets = torch.rand(3, 4, requires_grad=True)
    lam = torch.rand(3, requires_grad=True)
    mixed = sg_kernels.mix_targets(targets, lam, torch.tensor([1, 2, 0]), backend=backend)
    assert not mixed.requires_grad


def test_the_arguments_stay_as_they_are(backend):
    targets, (lam, index) = torch.rand(4, 5), lam_and_index(4)
    before = [tensor.clone() for tensor in (targets, lam, index)]
    sg_kernels.mix_targets(targets, lam, index, label_smoothing=0.3, backend=backend)
    assert all(map(torch.equal, (targets, lam, index), before))


@pytest.fixture
def result():
    images, features = torch.rand(4, 3, 8, 8), torch.randn(4, 6, 4, 4)
    return sg_kernels.saliency_graft(images, features, seed=3, augmentations=2)


def test_mix_criterion_equals_cross_entropy_on_the_mixed_targets(result):
    ids, logits = torch.tensor([0, 1, 2, 3]), torch.randn(8, 5)
    mixed = sg_kernels.mix_targets(ids, result.lam, result.index, 5)

    def criterion(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none")

    loss = sg_kernels.mix_criterion(criterion, logits, ids, result)
    torch.testing.assert_close(loss, F.cross_entropy(logits, mixed))


def test_mix_criterion_is_the_formula_for_losses_with_more_dimensions(result):
    def criterion(logits, targets):
        return (logits - targets).abs()

    logits, targets = torch.randn(8, 2, 3), torch.randn(4, 2, 3)
    expected = 0.0
    for r in range(8):
        lam = float(result.lam[r])
        own = criterion(logits[r], targets[r % 4])
        other = criterion(logits[r], targets[result.index[r]])
        expected += (lam * own + (1 - lam) * other).mean() / 8
    loss = sg_kernels.mix_criterion(criterion, logits, targets, result)
    torch.testing.assert_close(loss, expected)


def test_mix_criterion_passes_gradients_to_the_logits(result):
    logits = torch.randn(8, 5, requires_grad=True)
    mixed = sg_kernels.mix_targets(torch.arange(4), result.lam, result.index, 5)
    loss = sg_kernels.mix_criterion(
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
        logits,
        torch.arange(4),
        result,
    )
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, (logits.softmax(1) - mixed).detach() / 8)


CRITERIA = {
    "plain": {},
    "ignored rows": {"ignore_index": 3},
    "class weights": {"weight": torch.tensor([0.5, 2.0, 1.0, 3.0, 0.0])},
    "both": {"ignore_index": 1, "weight": torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])},
    "smoothed": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
def test_mix_criterion_of_an_unmixed_batch_is_the_criterion(options, reduction):
    logits, ids = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 1])
    criterion = nn.CrossEntropyLoss(**options, reduction=reduction)
    loss = sg_kernels.mix_criterion(criterion, logits, ids, None)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(**options)(logits, ids))
    assert criterion.reduction == reduction


def test_mix_criterion_leaves_ignored_rows_out_of_the_mean():
    torch.manual_seed(0)
    logits, ids = torch.randn(8, 10), torch.tensor([0, 1, -100, 3, 4, -100, 6, 7])
    loss = sg_kernels.mix_criterion(nn.CrossEntropyLoss(), logits, ids, None)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, ids)))


@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
def test_mix_criterion_weighs_each_of_both_labels_as_the_criterion_does(result, options):
    logits, ids = torch.randn(8, 5), torch.tensor([0, 1, 2, 3])
    single = nn.CrossEntropyLoss(**options, reduction="sum")
    weight, ignored = options.get("weight", torch.ones(5)), options.get("ignore_index")
    total = count = 0.0
    for r in range(8):
        lam = float(result.lam[r])
        for share, y in ((lam, ids[r % 4]), (1 - lam, ids[result.index[r]])):
            total += share * float(single(logits[r : r + 1], y[None]))
            count += share * float(weight[y]) * (int(y) != ignored)
    loss = sg_kernels.mix_criterion(nn.CrossEntropyLoss(**options), logits, ids, result)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_mix_criterion_sums_where_the_criterion_does(result):
    logits, ids = torch.randn(8, 5), torch.tensor([0, 1, 2, 3])
    summed = sg_kernels.mix_criterion(nn.CrossEntropyLoss(reduction="sum"), logits, ids, result)
    mean = sg_kernels.mix_criterion(nn.CrossEntropyLoss(), logits, ids, result)
    torch.testing.assert_close(summed, 8 * mean)


def test_mix_criterion_takes_lam_and_index_alone(result):
    logits, ids = torch.randn(8, 5), torch.tensor([0, 1, 2, 3])
    criterion = nn.CrossEntropyLoss()
    torch.testing.assert_close(
        sg_kernels.mix_criterion(criterion, logits, ids, (result.lam, result.index)),
        sg_kernels.mix_criterion(criterion, logits, ids, result),
    )


def test_mix_criterion_of_maps_leaves_ignored_pixels_out():
    logits, ids = torch.randn(4, 5, 3, 3), torch.randint(5, (4, 3, 3))
    ids[ids == 2] = 255
    loss = sg_kernels.mix_criterion(nn.CrossEntropyLoss(ignore_index=255), logits, ids, None)
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids, ignore_index=255))


@pytest.mark.parametrize("ids", [torch.tensor([[0], [2], [1]]), torch.tensor([[True], [False]])])
def test_a_column_of_class_ids_is_refused(ids, backend):
    rows = len(ids)
    with pytest.raises(ValueError, match=r"targets \(B, 1\) .*num_classes"):
        sg_kernels.mix_targets(ids, torch.rand(rows), torch.arange(rows), backend=backend)
