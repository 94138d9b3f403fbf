"""The whole operator: every option of the contract against the truth and against the reference."""

import numpy as np
import pytest
import torch
import truth
from conftest import (
    LAYOUTS,
    assert_fulfils_contract,
    assert_masks_agree,
    assert_same_bits,
    in_layout,
    random_mask,
)

from sg_kernels import graft, mix_targets, saliency_graft

ONE_CELL = pytest.mark.filterwarnings("ignore:.*give a grid of one cell")
OPTIONS = {
    "default": {},
    "temperature": {"temperature": 0.7},
    "temperature an int": {"temperature": 1},
    "sharp": {"temperature": 0.01},
    "normalize mean": {"normalize": "mean", "temperature": 1.0},
    "normalize none": {"normalize": "none", "temperature": 2.5},
    "threshold 0": {"threshold": 0},
    "threshold 0, sharp": {"threshold": 0, "temperature": 1e-4},
    "sharp as can be": {"temperature": 1e-38},
    "flat as can be": {"temperature": 1e38, "threshold": 0},
    "threshold number": {"threshold": 0.04},
    "threshold high": {"threshold": 0.999},
    "grid shrinks": {"grid_size": (3, 2)},
    "grid grows": {"grid_size": (11, 12)},
    "grid shrinks and grows": {"grid_size": (2, 12)},
    "grid grows and shrinks": {"grid_size": [12, 3]},
    "grid of one cell": {"grid_size": (1, 1)},
    "grid as fine as the image": {"grid_size": (13, 12)},
    "alpha small": {"alpha": 0.2},
    "alpha large": {"alpha": 50},
    "keep_prob 0": {"keep_prob": 0},
    "keep_prob": {"keep_prob": 0.6},
    "keep_prob 1": {"keep_prob": 1.0},
    "topk 1": {"selection": "topk", "k": 1},
    "topk": {"selection": "topk", "k": 9},
    "topk all": {"selection": "topk", "k": 30},
    "topk on a grid": {"selection": "topk", "k": 4, "grid_size": (3, 3)},
    "area": {"label": "area"},
    "area and l2": {"label": "area", "norm": "l2"},
    "l2": {"norm": "l2"},
    "l2sq": {"norm": "l2sq"},
    "l2 on a grid": {"norm": "l2", "grid_size": (3, 4)},
    "augmentations": {"augmentations": 3},
    "augmentations on a grid": {"augmentations": 2, "grid_size": (4, 4), "norm": "l2sq"},
    "augmentations of topk": {"augmentations": 2, "selection": "topk", "k": 3},
    "no_fixed_points": {"no_fixed_points": True},
    "no_fixed_points, augmentations": {"no_fixed_points": True, "augmentations": 3},
    "index": {"index": torch.tensor([3, 3, 0, 1])},
    "index, augmentations": {"index": torch.tensor([3, 3, 0, 1, 0, 0, 0, 0]), "augmentations": 2},
    "mask": {"mask": random_mask(4, 5, 6)},
    "mask that shrinks and grows the map": {"mask": random_mask(4, 3, 11), "norm": "l2"},
    "mask of one cell": {"mask": random_mask(4, 1, 1)},
    "mask as fine as the image": {"mask": random_mask(4, 13, 12), "norm": "l2sq"},
    "mask, area": {"mask": random_mask(4, 5, 3), "label": "area"},
    "mask, no_fixed_points": {"mask": random_mask(4, 2, 2), "no_fixed_points": True},
    "mask, index, augmentations": {
        "mask": random_mask(8, 4, 4),
        "index": torch.tensor([3, 3, 0, 1, 0, 0, 0, 0]),
        "augmentations": 2,
    },
    "mask, class ids": {
        "mask": random_mask(4, 4, 4),
        "targets": torch.tensor([3, 0, 6, 3]),
        "num_classes": 7,
    },
    "class ids": {"targets": torch.tensor([3, 0, 6, 3]), "num_classes": 7},
    "class ids, smoothing": {
        "targets": torch.tensor([3, 0, 6, 3]),
        "num_classes": 7,
        "label_smoothing": 0.1,
        "augmentations": 2,
    },
    "dense rows": {"targets": torch.arange(20.0).view(4, 5) / 20, "augmentations": 2},
    "dense rows, smoothing": {
        "targets": torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool(),
        "num_classes": 3,
        "label_smoothing": 0.3,
    },
}

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def batch_of(batch=4, h=5, w=6, channels=16):
    generator = torch.Generator().manual_seed(batch + 10 * h + 100 * w)
    images = torch.randn(batch, 3, 13, 12, generator=generator)
    return images, torch.randn(batch, channels, h, w, generator=generator)


@every_option
@ONE_CELL
def test_every_option_is_as_the_truth(backend, options, poisoned):
    images, features = batch_of()
    for seed in (1, -2):
        result = saliency_graft(images, features, seed=seed, backend=backend, **options)
        assert_fulfils_contract(result, images, seed, features=features, **options)


@every_option
@ONE_CELL
def test_every_option_agrees_with_the_reference(backend, options):
    images, features = batch_of(h=7, w=7)
    if "mask" not in options:
        options = {**options, "grid_size": options.get("grid_size", (7, 7))}
    result = saliency_graft(images, features, seed=5, backend=backend, **options)
    expected = saliency_graft(images, features, seed=5, backend="reference", **options)
    keys = ("normalize", "temperature", "threshold", "k")
    grid = truth.resample(truth.channel_saliency(features), expected.mask.shape[1:])
    _, unsure = truth.select(grid, **{key: options[key] for key in keys if key in options})
    assert torch.equal(result.index, expected.index)
    assert_masks_agree(result.mask, expected.mask, unsure)
    torch.testing.assert_close(result.saliency, expected.saliency)
    same = (result.mask == expected.mask).flatten(1).all(1)
    assert_same_bits(result.images[same], expected.images[same])
    torch.testing.assert_close(result.lam[same], expected.lam[same])
    if expected.targets is not None:
        torch.testing.assert_close(result.targets[same], expected.targets[same])


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"augmentations": 2}], ids=["once", "twice"])
def test_every_batch_size(backend, batch, options):
    images, features = batch_of(batch)
    targets = torch.arange(batch)
    options = {**options, "targets": targets, "num_classes": 5}
    result = saliency_graft(images, features, seed=2, backend=backend, **options)
    assert_fulfils_contract(result, images, 2, features=features, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_every_dtype_and_layout(backend, dtype, layout):
    images, features = batch_of()
    features = in_layout(features.to(dtype), layout)
    result = saliency_graft(images, features, seed=3, backend=backend)
    assert_fulfils_contract(result, images, 3, features=features)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 6), (5, 1), (7, 7), (8, 8), (13, 12)])
@pytest.mark.parametrize("channels", [0, 1, 5])
@ONE_CELL
def test_feature_maps_of_every_size(backend, h, w, channels):
    images, features = batch_of(2, h, w, channels)
    result = saliency_graft(images, features, seed=4, keep_prob=0.9, backend=backend)
    assert_fulfils_contract(result, images, 4, features=features, keep_prob=0.9)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
def test_tokens_are_the_map_they_unfold_to(backend, prefix_tokens):
    images, features = batch_of()
    patches = features.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full((4, prefix_tokens, 16), 1e6), patches], 1)
    options = {"token_grid": (5, 6), "prefix_tokens": prefix_tokens, "seed": 1, "backend": backend}
    result = saliency_graft(images, tokens, **options)
    assert_fulfils_contract(result, images, 1, features=features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_a_ready_saliency_map_takes_the_features_place(backend, dtype, strided):
    images, _ = batch_of()
    saliency = torch.rand(4, 6, 5).to(dtype).transpose(1, 2)
    saliency = saliency if strided else saliency.contiguous()
    result = saliency_graft(images, saliency=saliency, seed=1, norm="l2", backend=backend)
    assert_fulfils_contract(result, images, 1, saliency=saliency, norm="l2")
    assert result.saliency.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_images_of_every_layout(backend, layout, dtype):
    images, features = batch_of()
    images = in_layout((images * 50).to(dtype), layout)
    result = saliency_graft(images, features, seed=6, augmentations=2, backend=backend)
    assert_fulfils_contract(result, images, 6, features=features, augmentations=2)
    channels_last = layout in ("channels_last", "sliced_channels_last")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert result.images.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_grafts_nothing_and_weighs_by_area(backend, value):
    images, features = batch_of()
    features[2, 0, 1, 1] = value
    index = torch.tensor([1, 2, 3, 2])
    result = saliency_graft(images, features, index=index, seed=1, keep_prob=1.0, backend=backend)
    assert_same_bits(result.images[2], images[3])
    assert float(result.lam[2]) == 0.0
    area = result.mask.float().mean((1, 2))
    torch.testing.assert_close(result.lam[[1, 3]], area[[1, 3]])


@pytest.mark.parametrize("grid_size", [None, (4, 4), (5, 2)])
@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 7.7, 1e-30])
def test_a_constant_map_grafts_nothing(backend, value, grid_size):
    images, index = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 0])
    result = saliency_graft(
        images,
        saliency=torch.full((4, 7, 7), value),
        index=index,
        grid_size=grid_size,
        threshold=0.01,
        seed=1,
        backend=backend,
    )
    assert_same_bits(result.images, images[index])
    assert result.lam.tolist() == [0.0] * 4


def test_a_map_of_zeros_weighs_by_area(backend):
    images, _ = batch_of()
    result = saliency_graft(
        images, saliency=torch.zeros(4, 2, 3), selection="topk", k=4, seed=1, backend=backend
    )
    torch.testing.assert_close(result.lam, torch.full((4,), 4 / 6))


def test_top_k_breaks_ties_by_the_lowest_cell(backend):
    saliency = torch.tensor([[[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]])
    images = torch.randn(1, 3, 6, 6)
    options = {"selection": "topk", "k": 4, "seed": 1, "backend": backend}
    result = saliency_graft(images, saliency=saliency, **options)
    assert result.mask.int().tolist() == [[[1, 1, 0], [1, 0, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(512, 7, 7), (2048, 7, 7)])
def test_cells_of_equal_features_tie(backend, shape, dtype):
    channels, h, w = shape
    column = torch.randn(8, channels, 1, 1, generator=torch.Generator().manual_seed(5)).to(dtype)
    features = column.expand(8, *shape).contiguous()
    options = {"selection": "topk", "k": 1, "seed": 1, "backend": backend}
    mask = saliency_graft(torch.randn(8, 3, 9, 9), features, **options).mask
    assert mask.sum() == mask[:, 0, 0].sum() == 8


def test_a_cell_at_the_threshold_is_not_salient(backend):
    saliency = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])
    images = torch.randn(1, 3, 6, 6)
    options = {"threshold": 1 / 3, "keep_prob": 1.0, "seed": 1, "backend": backend}
    result = saliency_graft(images, saliency=saliency, temperature=1e-3, **options)
    assert not result.mask.any()


def test_the_saliency_returned_is_not_resampled(backend):
    images, features = batch_of()
    saliency = saliency_graft(images, features, grid_size=(2, 2), seed=1, backend=backend).saliency
    np.testing.assert_allclose(saliency, truth.channel_saliency(features), rtol=1e-5)


def test_augmentation_a_of_index_mask_and_targets_makes_image_row_a_b(backend):
    images, features = batch_of()
    ids = torch.arange(4)
    options = {"augmentations": 3, "targets": ids, "num_classes": 4, "seed": 8}
    result = saliency_graft(images, features, backend=backend, **options)
    for a in range(3):
        rows = slice(4 * a, 4 * a + 4)
        mask, index, lam = result.mask[rows], result.index[rows], result.lam[rows]
        assert torch.equal(index.sort().values, ids)
        assert_same_bits(result.images[rows], graft(images, mask, index, backend=backend))
        mixed = mix_targets(ids, lam, index, 4, backend=backend)
        torch.testing.assert_close(result.targets[rows], mixed)


def test_the_first_augmentation_is_the_call_without_augmentations(backend):
    images, features = batch_of()
    one = saliency_graft(images, features, seed=8, backend=backend)
    three = saliency_graft(images, features, seed=8, augmentations=3, backend=backend)
    assert torch.equal(three.mask[:4], one.mask)
    assert torch.equal(three.index[:4], one.index)


def test_a_result_mask_grafts_segmentation_maps_along(backend):
    images, features = batch_of()
    maps = torch.randint(0, 255, (4, 13, 12), dtype=torch.uint8)
    result = saliency_graft(images, features, seed=3, backend=backend)
    grafted = graft(maps, result.mask, result.index, backend=backend)
    assert_same_bits(grafted, truth.graft(maps[:, None], result.mask, result.index)[:, 0])


def test_inputs_stay_as_they_are(backend):
    images, features = batch_of()
    arguments = {
        "index": torch.tensor([1, 1, 2, 0]),
        "targets": torch.rand(4, 5),
        "seed": torch.tensor([4]),
    }
    before = [tensor.clone() for tensor in (images, features, *arguments.values())]
    saliency_graft(images, features, label_smoothing=0.1, backend=backend, **arguments)
    for tensor, copy in zip((images, features, *arguments.values()), before, strict=True):
        assert_same_bits(tensor, copy)


def test_nothing_returned_is_an_input(backend):
    images, features = batch_of()
    index, targets = torch.tensor([1, 1, 2, 0]), torch.rand(4, 5)
    saliency = torch.rand(4, 5, 6)
    result = saliency_graft(
        images, saliency=saliency, index=index, targets=targets, seed=1, backend=backend
    )
    given = {tensor.data_ptr() for tensor in (images, saliency, index, targets)}
    assert given.isdisjoint(tensor.data_ptr() for tensor in result)


def test_the_result_is_a_named_tuple_in_the_order_of_the_contract(backend):
    images, features = batch_of()
    result = saliency_graft(images, features, seed=1, backend=backend)
    assert result._fields == ("images", "lam", "index", "mask", "saliency", "targets")


@pytest.fixture
def number_of_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit(backend, number_of_threads):
    images = torch.randn(32, 3, 32, 32, requires_grad=True)
    features = torch.randn(32, 64, 8, 8)
    results = []
    for threads in (1, 2, 3):
        number_of_threads(threads)
        result = saliency_graft(images, features, seed=1, backend=backend)
        (grad,) = torch.autograd.grad(result.images.square().sum(), images)
        results.append((*result[:5], grad))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


@pytest.mark.parametrize(
    ("seed", "same"),
    [
        (7, torch.tensor([7])),
        (7, torch.tensor(7)),
        (-1, 2**64 - 1),
        (-(2**63), 2**63),
        (2**63 - 1, torch.tensor([2**63 - 1])),
    ],
)
def test_a_seed_is_64_bits_however_written(backend, seed, same):
    images, features = batch_of()
    first = saliency_graft(images, features, seed=seed, backend=backend)
    assert equal(first, saliency_graft(images, features, seed=same, backend=backend))
    assert_fulfils_contract(first, images, seed, features=features)


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_of_the_seed_counts(backend, bit):
    images, features = batch_of()
    first = saliency_graft(images, features, seed=0, augmentations=4, backend=backend)
    other = saliency_graft(images, features, seed=1 << bit, augmentations=4, backend=backend)
    assert not torch.equal(first.index, other.index)
    assert not torch.equal(first.mask, other.mask)


def test_a_generator_decides_the_call_and_moves_on(backend):
    images, features = batch_of()
    generator = torch.Generator().manual_seed(3)
    first, second = (
        saliency_graft(images, features, generator=generator, backend=backend) for _ in range(2)
    )
    assert not equal(first, second)
    again = generator.manual_seed(3)
    assert equal(first, saliency_graft(images, features, generator=again, backend=backend))


def test_torchs_own_generator_is_the_default(backend):
    images, features = batch_of()
    torch.manual_seed(3)
    first, second = (saliency_graft(images, features, backend=backend) for _ in range(2))
    assert not equal(first, second)
    torch.manual_seed(3)
    assert equal(first, saliency_graft(images, features, backend=backend))


def test_a_seed_leaves_torchs_generator_alone(backend):
    images, features = batch_of()
    before = torch.get_rng_state()
    saliency_graft(images, features, seed=1, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"grid_size": (3, 4), "augmentations": 2}], ids=str)
def test_index_p_and_cells_do_not_depend_on_the_rest_of_the_batch(backend, options):
    images, features = batch_of(8)
    index = torch.zeros(8 * options.get("augmentations", 1), dtype=torch.int64)
    whole = saliency_graft(images, features, index=index, seed=5, backend=backend, **options)
    rows = index.view(-1, 8)[:, :3].flatten()
    part = saliency_graft(images[:3], features[:3], index=rows, seed=5, backend=backend, **options)
    assert torch.equal(part.mask, whole.mask.unflatten(0, (-1, 8))[:, :3].flatten(0, 1))


@pytest.mark.slow
def test_of_several_grid_sizes_the_seed_draws_one(backend):
    images, features = batch_of()
    sizes = [(2, 2), (3, 4), (5, 6), [4, 4]]
    for seed in range(20):
        result = saliency_graft(images, features, grid_size=sizes, seed=seed, backend=backend)
        expected = sizes[truth.word(seed, truth.GRID_SIZE, 0) * 4 >> 32]
        assert_fulfils_contract(result, images, seed, features=features, grid_size=expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "stepped", "transposed"])
def test_out_takes_the_images_and_nothing_beside_them(backend, layout):
    images, features = batch_of()
    expected = saliency_graft(images, features, seed=1, augmentations=2, backend=backend)
    out = in_layout(torch.full((8, 3, 13, 12), torch.nan), layout)
    base = out if out._base is None else out._base
    base.fill_(-7.0)
    out.fill_(torch.nan)
    result = saliency_graft(images, features, seed=1, augmentations=2, out=out, backend=backend)
    assert result.images is out
    assert_same_bits(out, expected.images)
    assert all(torch.equal(a, b) for a, b in zip(result[1:5], expected[1:5], strict=True))
    out.fill_(-7.0)
    assert (base == -7.0).all()


def test_out_may_be_a_part_of_what_the_images_are_a_part_of(backend):
    images, features = batch_of()
    expected = saliency_graft(images, features, seed=1, backend=backend)
    both = torch.cat([images, torch.full_like(images, torch.nan)])
    out = both[len(images) :]
    saliency_graft(both[: len(images)], features, seed=1, out=out, backend=backend)
    assert_same_bits(out, expected.images)
    assert_same_bits(both[: len(images)], images)


@pytest.mark.parametrize("augmentations", [1, 3])
def test_gradients_reach_the_images_as_where_would_pass_them(backend, augmentations):
    images, features = batch_of()
    images.requires_grad_()
    features.requires_grad_()
    options = {"targets": torch.rand(4, 5), "augmentations": augmentations, "seed": 3}
    result = saliency_graft(images, features, backend=backend, **options)
    rows = torch.arange(4).repeat(augmentations)
    ys, xs = torch.arange(13) * 5 // 13, torch.arange(12) * 6 // 12
    up = result.mask[:, None][:, :, ys][..., xs]
    plain = torch.where(up, images[rows], images[result.index])
    assert_same_bits(result.images.detach(), plain.detach())
    weight = torch.randn_like(plain)
    (grad,) = torch.autograd.grad((result.images * weight).sum(), images, retain_graph=True)
    (expected,) = torch.autograd.grad((plain * weight).sum(), images)
    torch.testing.assert_close(grad, expected)
    assert not any(t.requires_grad for t in (result.lam, result.saliency, result.targets))


def test_the_gradient_does_not_change_the_result(backend):
    images, features = batch_of()
    plain = saliency_graft(images, features, seed=3, backend=backend)
    with_grad = saliency_graft(images.requires_grad_(), features, seed=3, backend=backend)
    assert with_grad.images.requires_grad
    assert equal([t.detach() for t in with_grad[:5]], plain)


def test_no_grad_records_nothing(backend):
    images, features = batch_of()
    with torch.no_grad():
        result = saliency_graft(images.requires_grad_(), features, seed=3, backend=backend)
    assert not result.images.requires_grad


@pytest.mark.parametrize("grid_size", [(2, 3), (4, 4), (8, 2)])
def test_the_sum_of_a_window_does_not_overflow_where_its_values_do_not(backend, grid_size):
    images, _ = batch_of()
    saliency = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(2)) * 2.0**127
    options = {"grid_size": grid_size, "keep_prob": 0.9, "seed": 1, "backend": backend}
    whole = saliency_graft(images, saliency=saliency, **options)
    small = saliency_graft(images, saliency=saliency / 2.0**20, **options)
    assert whole.mask.any()
    assert torch.equal(whole.mask, small.mask)
    assert torch.equal(whole.lam, small.lam)


def test_the_mean_of_a_map_does_not_overflow_where_its_sum_would(backend):
    images, _ = batch_of()
    saliency = torch.rand(4, 5, 6)
    options = {"normalize": "mean", "temperature": 0.5, "keep_prob": 1.0, "backend": backend}
    plain = saliency_graft(images, saliency=saliency, seed=1, **options)
    huge = saliency_graft(images, saliency=saliency * 2.0**127, seed=1, **options)
    assert 0 < plain.mask.sum() < plain.mask.numel()
    assert torch.equal(huge.mask, plain.mask)


@pytest.mark.slow
def test_many_alphas_do_not_crowd_out_one_another(backend):
    images, features = batch_of(2)
    for alpha in np.linspace(0.5, 1.5, 70).tolist():
        saliency_graft(images, features, alpha=alpha, seed=1, backend=backend)
    result = saliency_graft(images, features, alpha=0.5, seed=1, backend=backend)
    assert_fulfils_contract(result, images, 1, features=features, alpha=0.5)


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_the_layout_of_out_does_not_change_the_map(backend, size):
    images, features = torch.rand(6, 3, *size), torch.randn(6, 256, 4, 4)
    maps = []
    for layout in ("nchw", "channels_last", "stepped"):
        out = in_layout(torch.empty_like(images), layout)
        result = saliency_graft(images, features, seed=1, out=out, backend=backend)
        maps.append(result.saliency)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_an_output_that_finds_no_room_says_so(backend):
    # Beyond the 2**47 bytes that a process can address.
    images = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match="memory"):
        saliency_graft(images, torch.rand(1, 2, 4, 4), augmentations=2**17, seed=1, backend=backend)
