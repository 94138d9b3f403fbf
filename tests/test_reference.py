"""The stages of the reference against oracles that share no code with it."""

import numpy as np
import pytest
import torch
import truth
from conftest import assert_same_bits, random_bits
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sg_kernels import ops, rng, saliency_graft
from sg_kernels.backends import reference
from sg_kernels.call import NORMALIZE


def random_map(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_channel_saliency_sums_absolute_values_over_the_channels():
    features = torch.randn(2, 5, 3, 4)
    saliency = reference.channel_saliency(features)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                expected = sum(abs(float(features[b, k, y, x])) for k in range(5))
                assert float(saliency[b, y, x]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (3, 5), (7, 2), (1, 1), (1, 8)])
def test_resample_averages_over_areas_where_it_shrinks(size):
    saliency = random_map(2, 8, 8)
    expected = F.adaptive_avg_pool2d(saliency[:, None], size)[:, 0]
    torch.testing.assert_close(reference.resample(saliency, size), expected)


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (7, 11), (9, 5), (30, 50)])
def test_resample_takes_the_nearest_where_it_grows(size):
    saliency = random_map(2, 3, 5)
    expected = F.interpolate(saliency[:, None], size, mode="nearest")[:, 0]
    assert torch.equal(reference.resample(saliency, size), expected)


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (3, 5), (4, 4), (1, 7)])
def test_resample_treats_each_axis_on_its_own(size):
    saliency = random_map(2, 4, 6)
    expected = truth.resample(saliency.double().numpy(), size)
    np.testing.assert_allclose(reference.resample(saliency, size), expected, rtol=1e-6)


def test_resample_keeps_a_map_of_the_right_size_bit_for_bit():
    saliency = random_map(2, 7, 7)
    assert torch.equal(reference.resample(saliency, (7, 7)), saliency)


@pytest.mark.parametrize("length", [1, 2, 5, 7, 32])
@pytest.mark.parametrize("size", [1, 3, 7, 32, 33, 224])
def test_nearest_is_the_floor_of_the_exact_quotient(size, length):
    positions = reference.nearest(size, length, torch.device("cpu")).tolist()
    assert positions == [i * length // size for i in range(size)]


@pytest.mark.parametrize("normalize", ["max", "mean", "none"])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 1 / 35, 0.1, 0.9])
def test_select_is_softmax_above_threshold(normalize, temperature, threshold):
    saliency = random_map(4, 5, 7)
    flat = saliency.double().flatten(1)
    scale = {"max": flat.amax(1), "mean": flat.mean(1), "none": torch.ones(4)}[normalize]
    q = torch.softmax(flat / scale[:, None] / temperature, 1)
    keep = reference.select(saliency, normalize, temperature, threshold, None)
    assert torch.equal(keep.flatten(1), q > threshold)


@pytest.mark.parametrize("value", [0.0, 1.0, 3e38])
@pytest.mark.parametrize("threshold", [0.0, 1 / 16, 0.5])
def test_a_constant_map_selects_nothing(value, threshold):
    saliency = torch.full((1, 4, 4), value)
    assert not reference.select(saliency, "max", 0.2, threshold, None).any()


def test_a_single_cell_is_a_constant_map():
    assert not reference.select(torch.ones(1, 1, 1), "max", 0.2, 0.5, None).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [None, 3])
def test_a_sample_that_is_not_finite_selects_nothing_and_the_others_do_not_care(value, k):
    saliency = random_map(3, 4, 4)
    clean = reference.select(saliency, "max", 0.2, 1 / 16, k)
    saliency[1, 2, 3] = value
    keep = reference.select(saliency, "max", 0.2, 1 / 16, k)
    assert not keep[1].any()
    assert torch.equal(keep[[0, 2]], clean[[0, 2]])


def test_select_does_not_overflow():
    saliency = random_map(2, 4, 4) * 1e36
    keep = reference.select(saliency, "none", 1e-3, 1 / 16, None)
    peak = saliency.flatten(1).argmax(1)
    expected = F.one_hot(peak, 16).bool().view(2, 4, 4)
    assert torch.equal(keep, expected)


def test_the_mean_does_not_overflow_where_the_sum_would():
    saliency = random_map(2, 4, 4)
    scaled = saliency / saliency.amax() * 3e38
    assert torch.equal(
        reference.select(scaled, "mean", 0.5, 1 / 16, None),
        reference.select(saliency, "mean", 0.5, 1 / 16, None),
    )


class WithoutFloat64(TorchDispatchMode):
    """As a device of Apple's or Intel's: no tensor of float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert not any(tensor.dtype == torch.float64 for tensor in made), function
        return result


@pytest.mark.parametrize(
    "chosen",
    [*({"normalize": name} for name in NORMALIZE), {"selection": "topk", "k": 7}],
    ids=str,
)
def test_a_device_without_float64_gives_the_same(monkeypatch, chosen):
    images, features = random_map(6, 3, 24, 24).requires_grad_(), random_map(6, 8, 6, 6) ** 4
    features = (features * 64).round() / 64  # channels add up without rounding
    features[2] = 1e38  # the sum of the map overflows
    options = {"norm": "l2", "augmentations": 2, "seed": 3, **chosen}
    call = {"targets": torch.arange(6), "num_classes": 7, "backend": "reference", **options}
    expected = saliency_graft(images, features, **call)
    gradient = torch.autograd.grad(expected.images.sum(), images)
    monkeypatch.setattr(reference, "WITHOUT_FLOAT64", ("cpu",))
    # The mode sees an operator as a whole, so the functions behind the operators are called.
    monkeypatch.setattr(ops, "overload", lambda name, backend: ops._REFERENCE[name])
    with WithoutFloat64():
        found = saliency_graft(images, features, **call)
        assert torch.equal(torch.autograd.grad(found.images.sum(), images)[0], gradient[0])
    for name in ("mask", "index", "images", "lam", "targets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_top_k_keeps_the_k_largest():
    saliency = random_map(3, 4, 5)
    keep = reference.select(saliency, "max", 0.2, 0.0, 6).flatten(1)
    for row, kept in zip(saliency.flatten(1), keep, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(6).indices.tolist())


def test_top_k_breaks_ties_by_the_lowest_cell():
    saliency = torch.tensor([[[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]])
    keep = reference.select(saliency, "max", 0.2, 0.0, 4)
    assert keep.int().tolist() == [[[1, 1, 0], [1, 0, 1]]]


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keep_prob", [None, 0.0, 0.3, 1.0])
def test_sample_compares_words_with_the_threshold_of_p(prob, keep_prob):
    keep, seed = random_map(3, 4, 5) > 0.3, torch.tensor([11])
    quantiles = rng.beta_quantiles(1.0) if keep_prob is None else None
    p, grafts = reference.draw_keep_prob(seed, quantiles, keep_prob or 0.0, prob, 4)
    mask = reference.gate(reference.sample(keep, seed, p), grafts)
    expected = truth.sample(
        keep.numpy(), 11, alpha=1.0, keep_prob=keep_prob, prob=prob, augmentations=4
    )
    np.testing.assert_array_equal(mask, expected)


def test_prob_0_leaves_every_draw_as_it_is():
    _, grafts = reference.draw_keep_prob(torch.tensor([1]), None, 1.0, 0.0, 3)
    assert reference.gate(torch.zeros(6, 3, 3, dtype=torch.bool), grafts).all()


@pytest.mark.parametrize("augmentations", [1, 3])
def test_graft_takes_the_source_where_the_mask_is_true(augmentations):
    images = random_bits((4, 3, 9, 7), torch.float32)
    mask = random_map(4 * augmentations, 4, 3) > 0.5
    index = torch.randint(4, (4 * augmentations,))
    assert_same_bits(reference.graft(images, mask, index), truth.graft(images, mask, index))


def test_graft_agrees_with_where_on_an_interpolated_mask():
    images, mask = torch.randn(4, 3, 32, 32), random_map(4, 8, 8) > 0.5
    index = torch.tensor([1, 2, 3, 0])
    up = F.interpolate(mask[:, None].float(), (32, 32), mode="nearest") > 0
    assert torch.equal(reference.graft(images, mask, index), torch.where(up, images, images[index]))


@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**63)])
def test_graft_takes_all_of_the_source_where_the_index_is_out_of_range(bad):
    images = torch.randn(4, 3, 8, 8)
    index = torch.tensor([1, bad, 3, 0])
    grafted = reference.graft(images, torch.zeros(4, 2, 2, dtype=torch.bool), index)
    assert torch.equal(grafted, images[[1, 1, 3, 0]])


@pytest.mark.parametrize("augmentations", [1, 3])
def test_graft_backward_is_the_transpose_of_graft(augmentations):
    images = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    grad = torch.randn(4 * augmentations, 2, 6, 5, dtype=torch.float64)
    mask = random_map(4 * augmentations, 3, 2) > 0.5
    index = torch.randint(4, (4 * augmentations,))
    forward = (reference.graft(images, mask, index) * grad).sum()
    backward = (images * reference.graft_backward(grad, mask, index, augmentations)).sum()
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq", "area"])
@pytest.mark.parametrize("augmentations", [1, 2])
def test_label_ratio_is_the_formula(norm, augmentations):
    saliency = random_map(4, 3, 5)
    mask = random_map(4 * augmentations, 3, 5, seed=1) > 0.5
    index = torch.randint(4, (4 * augmentations,))
    lam = reference.label_ratio(saliency, mask, index, norm)
    expected = truth.label_ratio(saliency.double().numpy(), mask.numpy(), index.tolist(), norm)
    np.testing.assert_allclose(lam, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-22, 1e22, 1e37])
def test_label_ratio_neither_overflows_nor_underflows(norm, scale):
    saliency = (random_map(4, 3, 5) * 3).ceil() * scale
    mask = random_map(4, 3, 5, seed=1) > 0.5
    index = torch.tensor([1, 2, 3, 0])
    lam = reference.label_ratio(saliency, mask, index, norm)
    expected = truth.label_ratio(saliency.double().numpy(), mask.numpy(), index, norm)
    np.testing.assert_allclose(lam, expected, rtol=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["own", "other"])
def test_label_ratio_is_the_area_where_a_norm_is_useless(norm, value, where):
    saliency = random_map(2, 2, 2)
    saliency[0 if where == "own" else 1] = value
    mask = torch.tensor([[[True, False], [True, True]]] * 2)
    lam = reference.label_ratio(saliency, mask, torch.tensor([1, 0]), norm)
    assert lam.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])
def test_label_ratio_is_the_area_where_nothing_salient_survived_of_either(norm):
    saliency = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    mask = torch.tensor([[[False, True, False]], [[False, True, False]]])
    lam = reference.label_ratio(saliency, mask, torch.tensor([1, 1]), norm)
    assert float(lam[0]) == pytest.approx(1 / 3)


def test_label_ratio_is_0_and_1_at_the_ends():
    saliency = random_map(2, 3, 3)
    mask = torch.stack([torch.zeros(3, 3), torch.ones(3, 3)]).bool()
    assert reference.label_ratio(saliency, mask, torch.tensor([1, 0]), "l1").tolist() == [0.0, 1.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["ids", "dense"])
@pytest.mark.parametrize("augmentations", [1, 2])
def test_mix_targets_is_the_formula(label_smoothing, kind, augmentations):
    targets = torch.tensor([3, 0, 6, 3]) if kind == "ids" else random_map(4, 7)
    lam, index = random_map(4 * augmentations), torch.randint(4, (4 * augmentations,))
    mixed = reference.mix_targets(targets, lam, index, 7, label_smoothing)
    expected = truth.mix_targets(targets, lam, index.tolist(), 7, label_smoothing)
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_mix_targets_of_a_row_and_itself_is_its_own(kind):
    targets = torch.tensor([3, 0, 6]) if kind == "ids" else random_map(3, 7)
    dense = F.one_hot(targets, 7).float() if kind == "ids" else targets
    mixed = reference.mix_targets(targets, random_map(3), torch.arange(3), 7, 0.0)
    torch.testing.assert_close(mixed, dense)
