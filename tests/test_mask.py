"""A given mask in place of stages 3 to 5: saliency_graft(mask=), and the module's."""

import pytest
import torch
import truth
from conftest import LAYOUTS, assert_fulfils_contract, assert_same_bits, in_layout, random_mask
from torch import nn

from sg_kernels import SaliencyGraft, mix_criterion, ops, saliency_graft
from sg_kernels.call import NORM, NORMALIZE, Call, Outputs


def batch_of(batch=4, size=(13, 12)):
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, *size, generator=generator)
    return images, torch.randn(batch, 16, 5, 6, generator=generator)


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize("augmentations", [1, 2])
@pytest.mark.parametrize("mapped", [True, False])
def test_every_batch_size(backend, batch, augmentations, mapped, poisoned):
    images, features = batch_of(batch)
    options = {"augmentations": augmentations, "targets": torch.arange(batch), "num_classes": 5}
    options["mask"] = random_mask(augmentations * batch, 4, 3)
    options |= {"features": features} if mapped else {"label": "area"}
    result = saliency_graft(images, seed=2, backend=backend, **options)
    assert_fulfils_contract(result, images, 2, **options)


@pytest.mark.parametrize("case", range(12))
def test_random_arguments(backend, case, poisoned):
    draw = torch.Generator().manual_seed(case)

    def one_of(*choices):
        return choices[torch.randint(len(choices), (), generator=draw)]

    batch, augmentations = one_of(1, 2, 5), one_of(1, 3)
    side = one_of((8, 8), (9, 5), (1, 7), (33, 16))
    images = torch.randn(batch, one_of(1, 3), *side, generator=draw)
    evidence = {
        "features": {"features": torch.randn(batch, 7, one_of(1, 4, 9), one_of(2, 7))},
        "saliency": {"saliency": torch.rand(batch, one_of(1, 4, 9), one_of(2, 7))},
        "none": {"label": "area"},
    }[one_of("features", "saliency", "none")]
    rows = augmentations * batch
    grid = [int(torch.randint(1, extent + 1, (), generator=draw)) for extent in side]
    options = {"mask": random_mask(rows, *grid, seed=case), "augmentations": augmentations}
    options |= evidence | {"norm": one_of("l1", "l2", "l2sq")}
    options |= one_of(
        {}, {"index": torch.randint(batch, (rows,), generator=draw)}, {"no_fixed_points": batch > 1}
    )
    images = in_layout(images.to(one_of(torch.float32, torch.bfloat16)), one_of(*LAYOUTS[:-1]))
    result = saliency_graft(images, seed=case, backend=backend, **options)
    assert_fulfils_contract(result, images, case, **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_every_layout(backend, layout, dtype):
    images, features = batch_of()
    images = in_layout((images * 50).to(dtype), layout)
    options = {"features": features, "mask": random_mask(4, 3, 4)}
    result = saliency_graft(images, seed=6, backend=backend, **options)
    assert_fulfils_contract(result, images, 6, **options)


@pytest.mark.parametrize("label", ["saliency", "area"])
def test_a_grid_of_more_cells_than_one_launch_works_out(backend, label):
    images, features = batch_of(2, (40, 44))
    options = {"features": features, "mask": random_mask(2, 40, 44), "label": label}
    result = saliency_graft(images, seed=6, backend=backend, **options)
    assert_fulfils_contract(result, images, 6, **options)


def test_the_default_dtype_of_torch_changes_nothing(backend):
    images, mask = torch.rand(4, 3, 8, 8), random_mask(4, 4, 4)
    options = {"mask": mask, "label": "area", "seed": 1, "backend": backend}
    expected = saliency_graft(images, **options)
    torch.set_default_dtype(torch.float64)
    try:
        result = saliency_graft(images, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(result.lam, expected.lam)


@pytest.mark.parametrize("kind", ["sliced", "transposed", "expanded"])
def test_a_strided_mask(backend, kind):
    images, features = batch_of()
    mask = {
        "sliced": random_mask(8, 9, 5)[::2, 1:, ::2],
        "transposed": random_mask(4, 3, 5).mT,
        "expanded": random_mask(1, 4, 4).expand(4, 4, 4),
    }[kind]
    result = saliency_graft(images, features, mask=mask, seed=1, backend=backend)
    assert_fulfils_contract(result, images, 1, features=features, mask=mask)


def test_a_seed_draws_the_pairing_that_it_draws_without_a_mask(backend):
    images, features = batch_of(8)
    options = {"augmentations": 2, "seed": 5, "backend": backend}
    drawn = saliency_graft(images, features, **options)
    given = saliency_graft(images, features, mask=random_mask(16, 2, 3), **options)
    assert torch.equal(given.index, drawn.index)


def test_the_mask_of_a_call_gives_the_same_call_again(backend):
    images, features = batch_of()
    options = {"targets": torch.arange(4), "num_classes": 4, "seed": 5, "backend": backend}
    drawn = saliency_graft(images, features, **options)
    given = saliency_graft(images, features, mask=drawn.mask, **options)
    for one, other in zip(given, drawn, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite_weighs_by_area_and_is_grafted_all_the_same(backend, value):
    images, features = batch_of()
    features[2, 0, 1, 1] = value
    mask, index = random_mask(4, 5, 6), torch.tensor([1, 0, 3, 2])
    result = saliency_graft(images, features, mask=mask, index=index, seed=1, backend=backend)
    assert_same_bits(result.images, truth.graft(images, mask, index))
    area = mask.float().mean((1, 2))
    torch.testing.assert_close(result.lam[2:], area[2:])
    assert (result.lam[:2] != area[:2]).all()


def test_a_mask_of_one_value_keeps_one_image_and_its_label(backend):
    images, features = batch_of()
    mask, index = torch.tensor([True, False, True, False]), torch.tensor([1, 0, 3, 2])
    mask = mask[:, None, None].expand(4, 5, 6)
    result = saliency_graft(images, features, mask=mask, index=index, seed=1, backend=backend)
    assert result.lam.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert_same_bits(result.images, images[[0, 0, 2, 2]])


def test_a_mask_of_one_cell_warns_of_nothing(backend, recwarn):
    images, features = batch_of()
    saliency_graft(images, features, mask=random_mask(4, 1, 1), seed=1, backend=backend)
    assert len(recwarn) == 0


def test_inputs_stay_and_nothing_returned_is_one(backend):
    images, saliency = batch_of()[0], torch.rand(4, 5, 6)
    mask, index = random_mask(4, 5, 6), torch.tensor([1, 0, 3, 2])
    before = [tensor.clone() for tensor in (images, saliency, mask, index)]
    result = saliency_graft(
        images, saliency=saliency, mask=mask, index=index, seed=1, backend=backend
    )
    assert torch.equal(result.mask, mask)
    given = {tensor.data_ptr() for tensor in (images, saliency, mask, index)}
    assert given.isdisjoint(tensor.data_ptr() for tensor in result[:5])
    for tensor, copy in zip((images, saliency, mask, index), before, strict=True):
        assert_same_bits(tensor, copy)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "stepped"])
def test_out_takes_the_images_and_nothing_beside_them(backend, layout):
    images, mask = batch_of()[0], random_mask(8, 4, 4)
    out = in_layout(torch.zeros(8, 3, 13, 12), layout)
    base = out if out._base is None else out._base
    base.fill_(-7.0)
    options = {"mask": mask, "label": "area", "augmentations": 2, "seed": 1, "backend": backend}
    result = saliency_graft(images, out=out, **options)
    assert result.images is out
    assert_same_bits(out, truth.graft(images, mask, result.index))
    out.fill_(-7.0)
    assert (base == -7.0).all()


def test_gradients_reach_the_image_that_a_pixel_came_from(backend):
    images, features = batch_of()
    mask, index = random_mask(4, 13, 12), torch.tensor([1, 1, 0, 2])
    images.requires_grad_()
    result = saliency_graft(images, features, mask=mask, index=index, seed=1, backend=backend)
    weight = torch.randn(4, 3, 13, 12)
    (grad,) = torch.autograd.grad(result.images, images, weight)
    plain = torch.where(mask[:, None], images, images[index])
    (expected,) = torch.autograd.grad(plain, images, weight)
    torch.testing.assert_close(grad, expected)


def test_losses_mix_by_the_area_too(backend):
    images, mask, index = batch_of()[0], random_mask(4, 4, 4), torch.tensor([1, 0, 3, 2])
    result = saliency_graft(images, mask=mask, index=index, label="area", seed=1, backend=backend)
    logits, ids = torch.randn(4, 5), torch.arange(4)
    per_row, lam = nn.CrossEntropyLoss(reduction="none"), mask.float().mean((1, 2))
    mixed = lam * per_row(logits, ids) + (1 - lam) * per_row(logits, ids[index])
    loss = mix_criterion(nn.CrossEntropyLoss(), logits, ids, result)
    torch.testing.assert_close(loss, mixed.mean())
    with pytest.raises(ValueError, match="targets must have B rows"):
        mix_criterion(nn.CrossEntropyLoss(), logits, torch.arange(3), result)


EXCLUDED = {
    "temperature": 0.3,
    "normalize": "mean",
    "threshold": 0.1,
    "grid_size": (4, 4),
    "alpha": 0.5,
    "keep_prob": 0.5,
    "selection": "topk",
    "k": 3,
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_a_mask_excludes_the_options_it_replaces_and_names_them(name):
    images, features = batch_of()
    given = {name: EXCLUDED[name]}
    if name in ("selection", "k"):
        given = {"selection": "topk", "k": 3}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^mask replaces .* excludes .*\b{name}\b"):
        saliency_graft(images, features, mask=random_mask(4, 4, 4), **given)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_the_options_that_a_mask_excludes_are_named_at_once():
    images, features = batch_of()
    with pytest.raises(ValueError, match=r"it excludes temperature, alpha$"):
        saliency_graft(images, features, mask=random_mask(4, 4, 4), alpha=2.0, temperature=1.0)


def test_options_given_at_their_defaults_are_no_conflict():
    images, features = batch_of()
    result = saliency_graft(
        images, features, mask=random_mask(4, 4, 4), temperature=0.2, alpha=1, grid_size=None
    )
    assert torch.equal(result.mask, random_mask(4, 4, 4))


def test_without_a_map_only_the_area_is_known():
    images, _ = batch_of()
    with pytest.raises(ValueError, match=r"give one of features and saliency.* or label='area'"):
        saliency_graft(images, mask=random_mask(4, 4, 4))
    with pytest.raises(ValueError, match="give one of features and saliency; got neither"):
        saliency_graft(images, label="area")


def raw_call(**fields):
    fields = {
        "images": torch.randn(4, 3, 8, 6),
        "features": torch.randn(4, 5, 4, 3),
        "seed": torch.tensor([5]),
        "mask": random_mask(4, 2, 3),
        "grid_size": (2, 3),
        "temperature": 0.2,
        "threshold": 0.25,
        "normalize": NORMALIZE.index("max"),
        "norm": NORM.index("l1"),
        **fields,
    }
    return Call(**fields)


CALLS = {
    "plain": raw_call(),
    "step, strided": raw_call(step=torch.tensor([3]), mask=random_mask(4, 3, 2).mT),
    "ready map, prob": raw_call(
        features=None,
        saliency=torch.rand(4, 5, 5),
        prob=0.5,
        augmentations=2,
        mask=random_mask(8, 2, 3),
    ),
    "no map": raw_call(features=None, saliency=torch.rand(4, 0, 0), norm=NORM.index("area")),
}


@pytest.mark.operators
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(backend, name):
    torch.library.opcheck(ops.overload("saliency_graft", backend), CALLS[name])


@pytest.mark.operators
@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**63)])
@pytest.mark.parametrize("norm", ["l1", "area"])
def test_a_row_whose_index_is_out_of_range_is_nan_and_no_other_is(backend, bad, norm):
    index = torch.tensor([1, bad, 3, 0])
    given = raw_call(index=index, norm=NORM.index(norm))
    outputs = Outputs(*ops.overload("saliency_graft", backend)(*given))
    assert outputs.lam.isnan().tolist() == [False, True, False, False]
    assert_same_bits(outputs.images[1], given.images[1])
    assert torch.equal(outputs.mask, given.mask)


@pytest.mark.operators
@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_draw_that_prob_says_no_to_does_not_graft(backend, prob, mapped):
    images, mask = torch.randn(2, 3, 8, 6), random_mask(12, 2, 3)
    call = raw_call(
        images=images,
        features=None,
        saliency=torch.rand(2, 2, 3) if mapped else torch.empty(2, 0, 0),
        norm=NORM.index("l1" if mapped else "area"),
        mask=mask,
        augmentations=6,
        prob=prob,
    )
    outputs = Outputs(*ops.overload("saliency_graft", backend)(*call))
    expected = truth.gate(mask.numpy(), 5, prob, 6)
    assert outputs.mask.tolist() == expected.tolist()
    assert_same_bits(outputs.images, truth.graft(images, outputs.mask, outputs.index))
    unmixed = outputs.mask.all(2).all(1)
    assert (outputs.lam[unmixed] == 1).all()
    assert (unmixed.sum() > mask.all(2).all(1).sum()) == (prob < 1)


@pytest.mark.operators
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(backend, mapped, dynamic):
    torch.compiler.reset()

    def step(images, features, mask, ids):
        evidence = {"features": features} if mapped else {"label": "area"}
        result = saliency_graft(
            images, mask=mask, targets=ids, num_classes=7, seed=3, backend=backend, **evidence
        )
        loss = (result.images**2).sum()
        return loss, *result[:4], result.targets

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 3, 6):
        images, features = batch_of(batch)
        ids, mask = torch.arange(batch), random_mask(batch, 5, 4)
        outputs = []
        for function in (compiled, step):
            leaf = images.clone().requires_grad_()
            results = function(leaf, features, mask, ids)
            outputs.append((*results, *torch.autograd.grad(results[0], leaf)))
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


class TestModule:
    def test_it_grafts_the_mask_and_weighs_by_the_tapped_layer(self, backend):
        layer, images = nn.Conv2d(3, 8, 3, 4), torch.randn(4, 3, 16, 16)
        mixer = SaliencyGraft(layer, num_classes=5, seed=3, backend=backend)
        features, mask = layer(images), random_mask(4, 2, 2)
        mixed, targets = mixer(images, torch.arange(4), mask=mask)
        seed = truth.call_seed(3, 0, 0)
        options = {"features": features.detach(), "mask": mask, "targets": torch.arange(4)}
        assert_fulfils_contract(mixer.result, images, seed, num_classes=5, **options)
        assert_same_bits(mixed, mixer.result.images)
        assert_same_bits(targets, mixer.result.targets)

    def test_by_area_it_needs_neither_a_layer_nor_a_pass(self, backend):
        images, mask = torch.randn(4, 3, 16, 16), random_mask(4, 2, 2)
        for layer in (None, nn.Conv2d(3, 8, 3, 4)):
            mixer = SaliencyGraft(layer, label="area", seed=3, backend=backend)
            mixed, targets = mixer(images, mask=mask)
            assert targets is None
            assert mixer.result.saliency is None
            assert_same_bits(mixed, truth.graft(images, mask, mixer.result.index))
            with pytest.raises((ValueError, RuntimeError)):
                mixer(images)

    def test_the_coin_of_prob_is_that_of_a_call_without_a_mask(self, backend):
        images, features, mask = *batch_of(), torch.zeros(4, 2, 2, dtype=torch.bool)
        mixers = [SaliencyGraft(prob=0.5, seed=1, backend=backend) for _ in range(2)]
        grafted = set()
        for _ in range(8):
            mixers[0](images, features=features, mask=mask)
            mixers[1](images, features=features)
            given, drawn = (mixer.result for mixer in mixers)
            assert torch.equal(given.index, drawn.index)
            assert bool(given.mask.all()) == bool(drawn.mask.all())
            grafted.add(bool(given.mask.all()))
        assert grafted == {True, False}

    @pytest.mark.operators
    def test_compiled_is_eager(self, backend):
        torch.compiler.reset()
        images, features, mask = *batch_of(), random_mask(4, 3, 4)
        mixers = [SaliencyGraft(num_classes=5, seed=1, backend=backend) for _ in range(2)]
        compiled = torch.compile(mixers[0], fullgraph=True, backend="aot_eager")
        for mixer in (compiled, mixers[1]):
            for _ in range(2):
                mixer(images, torch.arange(4), features=features, mask=mask)
        for one, other in zip(mixers[0].result, mixers[1].result, strict=True):
            assert_same_bits(one, other)

    def test_it_excludes_the_options_of_the_module(self):
        images, features = batch_of()
        mixer = SaliencyGraft(alpha=0.5)
        with pytest.raises(ValueError, match=r"mask .* excludes alpha"):
            mixer(images, features=features, mask=random_mask(4, 2, 2))
        assert int(mixer.step) == 0
