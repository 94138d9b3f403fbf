"""The module of a training loop."""

import copy
import subprocess
import sys

import pytest
import torch
import truth
from conftest import assert_fulfils_contract, assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import Net, batch_of, by_pickle, by_torch_save

import sg_kernels
from sg_kernels import SaliencyGraft, rng, saliency_graft


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


OPTIONS = {
    "default": {},
    "softmax": {"temperature": 0.5, "normalize": "mean", "threshold": 0.05},
    "grid": {"grid_size": (2, 5), "norm": "l2"},
    "alpha": {"alpha": 0.4, "label": "area"},
    "keep_prob": {"keep_prob": 0.7, "norm": "l2sq"},
    "topk": {"selection": "topk", "k": 5},
    "augmentations": {"augmentations": 3, "no_fixed_points": True, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", [0, -1, 2**64 - 5])
def test_a_call_is_the_function_with_that_calls_seed(backend, options, seed):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, seed=seed, backend=backend, **options)
    for step in range(3):
        mixed, targets = module(images, ids, features=features)
        expected = saliency_graft(
            images,
            features,
            targets=ids,
            num_classes=5,
            seed=rng.call_seed(seed, step, 0),
            backend=backend,
            **options,
        )
        assert equal(module.result, expected)
        assert mixed.data_ptr() == module.result.images.data_ptr()
        assert targets is module.result.targets
        assert int(module.step) == step + 1


def test_a_call_fulfils_the_contract(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, seed=3, label_smoothing=0.1, backend=backend)
    module(images, ids, features=features)
    assert_fulfils_contract(
        module.result,
        images,
        truth.call_seed(3, 0, 0),
        features=features,
        targets=ids,
        num_classes=5,
        label_smoothing=0.1,
    )


def test_a_ready_saliency_map_goes_with_a_call(backend):
    images, ids, features = batch_of()
    saliency = sg_kernels.channel_saliency(features)
    by_map = SaliencyGraft(num_classes=5, seed=3, backend=backend)
    by_features = SaliencyGraft(num_classes=5, seed=3, backend=backend)
    by_map(images, ids, saliency=saliency)
    by_features(images, ids, features=features)
    assert torch.equal(by_map.result.mask, by_features.result.mask)
    assert_same_bits(by_map.result.images, by_features.result.images)


def test_tokens_go_with_a_call(backend):
    images, _, features = batch_of()
    tokens = torch.cat([torch.ones(4, 2, 8), features.flatten(2).transpose(1, 2)], 1)
    plain = SaliencyGraft(seed=3, backend=backend)
    plain(images, features=features)
    module = SaliencyGraft(seed=3, token_grid=(4, 4), prefix_tokens=2, backend=backend)
    module(images, features=tokens)
    assert torch.equal(module.result.mask, plain.result.mask)


def test_without_targets_none_come_back(backend):
    images, _, features = batch_of()
    mixed, targets = SaliencyGraft(seed=1, backend=backend)(images, features=features)
    assert targets is None
    assert not torch.equal(mixed, images)


def test_images_on_another_device_are_refused():
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5)
    with pytest.raises(ValueError, match=r"images must be on cpu.*got meta: call .to\('meta'\)"):
        module(images.to("meta"), ids, features=features)


def test_evaluation_returns_the_inputs(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, backend=backend).eval()
    assert module(images, ids, features=features) == (images, ids)
    assert int(module.step) == 0


def test_prob_0_returns_the_images_and_spends_no_step(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, prob=0, backend=backend)
    assert module(images, ids, features=features)[0] is images
    assert int(module.step) == 0


@pytest.mark.parametrize("prob", [1.0, 1e-9, 0.0])
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_in_training_mode_targets_have_one_form(backend, prob, warmup_epochs):
    images, ids, features = batch_of()
    module = SaliencyGraft(
        num_classes=5,
        prob=prob,
        warmup_epochs=warmup_epochs,
        label_smoothing=0.1,
        backend=backend,
    )
    _, targets = module(images, ids, features=features)
    assert targets.shape == (4, 5)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    if prob < 1 or warmup_epochs:
        torch.testing.assert_close(targets, F.one_hot(ids, 5) * 0.9 + 0.1 / 5)


@pytest.mark.parametrize("augmentations", [1, 3])
def test_needs_pass_tells_what_the_next_call_does(augmentations):
    images, ids, features = batch_of()
    module = SaliencyGraft(
        num_classes=5, prob=0.4, augmentations=augmentations, seed=9, keep_prob=0.5
    )
    answers = []
    for _ in range(40):
        answers.append(module.needs_pass())
        assert module.needs_pass() is answers[-1]
        module(images, ids, features=features)
        rows = module.result.mask.flatten(1).all(1)
        assert answers[-1] is (not bool(rows.all()))
    assert len(set(answers)) == 2


def test_a_call_that_needs_no_pass_goes_without_one_and_changes_no_draw():
    net, pictures = Net(), [batch_of(seed=seed) for seed in range(12)]
    masks = {}
    for asks in (False, True):
        module = SaliencyGraft(net.body, num_classes=5, prob=0.5, seed=2)
        for step, (images, ids, _) in enumerate(pictures):
            needed = module.needs_pass()
            if needed or not asks:
                net(images)
            mixed, targets = module(images, ids)
            assert int(module.step) == step + 1
            if needed:
                masks.setdefault(step, []).append(module.result.mask)
            else:
                assert torch.equal(mixed, images)
                assert torch.equal(targets, F.one_hot(ids, 5).float())
            net(mixed)
        module.untap()
    assert 0 < len(masks) < 12
    assert all(torch.equal(*pair) for pair in masks.values())


def test_no_pass_is_needed_where_nothing_is_grafted():
    assert SaliencyGraft().needs_pass()
    assert not SaliencyGraft().eval().needs_pass()
    assert not SaliencyGraft(prob=0).needs_pass()
    module = SaliencyGraft(warmup_epochs=1)
    assert not module.needs_pass()
    module.set_epoch(1)
    assert module.needs_pass()


def test_prob_and_temperature_can_be_scheduled(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, seed=3, backend=backend)
    module.prob, module.temperature = 0, 0.5
    assert module(images, ids, features=features)[0] is images
    module.prob = 1
    module(images, ids, features=features)
    expected = saliency_graft(
        images, features, seed=rng.call_seed(3, 0, 0), temperature=0.5, backend=backend
    )
    assert torch.equal(module.result.mask, expected.mask)
    for name, wrong in (("prob", 2), ("temperature", 0)):
        with pytest.raises(ValueError, match=name):
            setattr(module, name, wrong)


def test_warm_up_without_set_epoch_is_warned_of():
    module = SaliencyGraft(warmup_epochs=1)
    module.train()
    module.eval()
    with pytest.warns(UserWarning, match="call set_epoch"):
        module.train()


def test_warm_up_with_set_epoch_is_not_warned_of(recwarn):
    module = SaliencyGraft(warmup_epochs=2)
    for epoch in range(3):
        module.set_epoch(epoch)
        module.train()
        module.eval()
    assert not recwarn.list


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_of_the_module_is_refused(reentrant, compiled):
    images, _, features = batch_of()
    module, leaf = SaliencyGraft(seed=0), images.clone().requires_grad_()

    def block(images):
        return module(images, features=features)[0].square()

    def checkpointed(images):
        return checkpoint(block, images, use_reentrant=reentrant).sum()

    if compiled:
        torch.compiler.reset()
        checkpointed = torch.compile(checkpointed, backend="aot_eager")
    loss = checkpointed(leaf)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss.backward()


def test_ranks_that_share_a_batch_draw_alike(monkeypatch):
    images, _, features = batch_of()
    results = []
    for process in (0, 3):
        monkeypatch.setattr(sg_kernels.nn, "_rank", lambda process=process: process)
        module = SaliencyGraft(seed=4, rank=1)
        module(images, features=features)
        results.append(module.result)
    assert equal(results[0][:-1], results[1][:-1])
    assert results[0].index.tolist() == truth.pairing(truth.call_seed(4, 0, 1), 4)


def test_the_rank_is_that_in_the_group(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "get_rank", lambda group: {"data": 2, "other": -1}[group]
    )
    assert SaliencyGraft(group="data").rank == 2
    with pytest.raises(ValueError, match="group must contain this process"):
        SaliencyGraft(group="other")
    with pytest.raises(ValueError, match="rank and group exclude each other"):
        SaliencyGraft(group="data", rank=1)


@pytest.mark.parametrize("seed", [7, None])
def test_reset_parameters_restores_what_to_empty_leaves_as_garbage(seed):
    with torch.device("meta"):
        module = SaliencyGraft(seed=seed)
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.fill_(99)
    module.reset_parameters()
    assert torch.equal(module.quantiles, rng.beta_quantiles(1.0))
    assert int(module.step) == 0
    assert int(module.seed) == (7 if seed else int(module.seed)) != 99


@pytest.mark.parametrize("layer", [nn.ReLU, 5])
def test_a_refused_module_spends_nothing_of_the_generator(layer):
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="layer"):
        SaliencyGraft(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_without_its_keys_loads():
    network = nn.ModuleDict({"net": Net(), "mixer": SaliencyGraft(seed=3)})
    older = {k: v for k, v in network.state_dict().items() if not k.startswith("mixer")}
    network["mixer"].step.fill_(5)
    network.load_state_dict(older)
    assert int(network["mixer"].step) == 5
    del older["net.head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.head\.bias"):
        network.load_state_dict(older)


def test_a_single_image_is_paired_with_itself(backend):
    images, ids, features = batch_of(1)
    module = SaliencyGraft(num_classes=5, no_fixed_points=True, backend=backend)
    mixed, targets = module(images, ids, features=features)
    assert module.result.index.tolist() == [0]
    assert_same_bits(mixed, images)
    torch.testing.assert_close(targets, F.one_hot(ids, 5).float())


@pytest.mark.slow
def test_prob_gates_whole_calls_by_their_own_words(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, prob=0.3, keep_prob=0.5, seed=9, backend=backend)
    grafted = 0
    for step in range(100):
        mixed, targets = module(images, ids, features=features)
        word = truth.word(truth.call_seed(9, step, 0), truth.KEEP_PROB, 1)
        if word < int(0.3 * 2**32):
            grafted += 1
            assert not module.result.mask.all()
        else:
            assert torch.equal(mixed, images)
            assert torch.equal(targets, F.one_hot(ids, 5).float())
            assert module.result.lam.tolist() == [1.0] * 4
    assert 20 <= grafted <= 40


@pytest.mark.slow
def test_prob_gates_each_augmentation(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(prob=0.5, augmentations=40, seed=1, keep_prob=0.0, backend=backend)
    module(images, features=features)
    whole = module.result.mask.view(40, -1).all(1).tolist()
    seed = truth.call_seed(1, 0, 0)
    assert whole == [truth.word(seed, truth.KEEP_PROB, 1, draw=a) >= 2**31 for a in range(40)]


def test_warm_up_grafts_nothing_and_spends_no_step(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, warmup_epochs=2, label_smoothing=0.1, backend=backend)
    for epoch in range(2):
        module.set_epoch(epoch)
        mixed, targets = module(images, ids, features=features)
        assert mixed is images
        torch.testing.assert_close(targets, F.one_hot(ids, 5) * 0.9 + 0.1 / 5)
    assert int(module.step) == 0
    module.set_epoch(2)
    module(images, ids, features=features)
    assert int(module.step) == 1


def test_warm_up_takes_dense_targets_and_none(backend):
    images, _, _ = batch_of()
    module = SaliencyGraft(warmup_epochs=1, backend=backend)
    dense = torch.rand(4, 5)
    assert torch.equal(module(images, dense)[1], dense)
    assert module(images) == (images, None)


@pytest.mark.parametrize(
    "wrong", [[0, 1, 2, 3], torch.arange(3), torch.rand(4), torch.arange(4) + 9]
)
def test_warm_up_refuses_targets_as_any_epoch_does(wrong):
    images, _, features = batch_of()
    module = SaliencyGraft(num_classes=5, warmup_epochs=1)
    messages = []
    for epoch in range(2):
        module.set_epoch(epoch)
        with pytest.raises((TypeError, ValueError), match="targets") as caught:
            module(images, wrong, features=features)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("wrong", [None, [1], torch.zeros(3, 16, 16), torch.tensor(1.0)])
def test_what_is_no_batch_of_images_is_refused(wrong, warmup_epochs):
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, warmup_epochs=warmup_epochs)
    net(torch.randn(4, 3, 16, 16))
    with pytest.raises((TypeError, ValueError), match=r"images must be .*\(B, C, H, W\)"):
        module(wrong)


def test_epochs_compile_once_for_the_warm_up_and_once_after_it():
    torch.compiler.reset()
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, warmup_epochs=2, backend="reference")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    frames = []
    for epoch in range(6):
        module.set_epoch(epoch)
        compiled(images, ids, features=features)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert [count - frames[0] for count in frames] == [0, 0, 1, 1, 1, 1]


def test_a_training_step_compiles_whole():
    torch.compiler.reset()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, seed=3, backend="reference")
    images, ids, _ = batch_of()

    def step(images, ids):
        with torch.no_grad():
            net(images)
        mixed, targets = module(images, ids)
        return mixed, F.cross_entropy(net(mixed), targets)

    expected = [step(images, ids) for _ in range(3)]
    module.step.zero_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mixed, loss in expected:
        one, other = compiled(images, ids)
        assert_same_bits(one, mixed)
        torch.testing.assert_close(other, loss)
    torch.compiler.reset()


def test_there_is_no_result_where_nothing_was_mixed():
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, warmup_epochs=1)
    logits, losses = torch.randn(4, 5), F.cross_entropy
    module.set_epoch(1)
    module(images, ids, features=features)
    for leave, enter in [
        (module.train, module.eval),
        (lambda: module.set_epoch(1), lambda: module.set_epoch(0)),
    ]:
        enter()
        module(images, ids, features=features)
        assert module.result is None
        loss = sg_kernels.mix_criterion(
            lambda logits, ids: losses(logits, ids, reduction="none"), logits, ids, module.result
        )
        torch.testing.assert_close(loss, losses(logits, ids))
        leave()
        module(images, ids, features=features)
        assert module.result is not None


class Workers(torch.utils.data.Dataset):
    def __init__(self):
        self.module = SaliencyGraft(seed=1)

    def __len__(self):
        return 1

    def __getitem__(self, item):
        images, _, features = batch_of()
        return self.module(images, features=features)[0]


def test_a_loaders_worker_is_refused():
    next(iter(torch.utils.data.DataLoader(Workers())))
    loader = torch.utils.data.DataLoader(Workers(), num_workers=1)
    with pytest.raises(RuntimeError, match="SaliencyGraft runs in the main process"):
        next(iter(loader))


def run_steps(module, steps):
    results = []
    for step in range(steps):
        images, ids, features = batch_of(seed=step)
        module(images, ids, features=features)
        results.append(module.result)
    return results


GRIDS = {"one grid": {}, "several grids": {"grid_size": [(2, 2), (4, 4), (3, 3), (4, 2)]}}


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_a_state_dict_resumes_exactly(backend, options):
    module = SaliencyGraft(num_classes=5, seed=4, backend=backend, **options)
    run_steps(module, 3)
    state = copy.deepcopy(module.state_dict())
    expected = run_steps(module, 3)

    fresh = SaliencyGraft(num_classes=5, seed=99, backend=backend, **options)
    run_steps(fresh, 2)
    fresh.load_state_dict(state)
    for result, wanted in zip(run_steps(fresh, 3), expected, strict=True):
        assert equal(result, wanted)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_resumes_the_end_of_the_warm_up(steps):
    module = SaliencyGraft(num_classes=5, warmup_epochs=3)
    if steps:
        module.set_epoch(3)
        run_steps(module, steps)
    fresh = SaliencyGraft(num_classes=5, warmup_epochs=3)
    fresh.load_state_dict(module.state_dict())
    images, ids, features = batch_of()
    assert (fresh(images, ids, features=features)[0] is images) == (steps == 0)


@pytest.mark.parametrize("options", [{"keep_prob": 0.5}, {"selection": "topk", "k": 2}])
def test_a_module_that_draws_no_p_holds_no_table(options):
    assert SaliencyGraft(**options).quantiles is None
    assert torch.equal(SaliencyGraft(alpha=0.3).quantiles, rng.beta_quantiles(0.3))


def test_the_state_dict_is_the_seed_and_the_step():
    module = SaliencyGraft(Net().body, seed=4)
    assert {name: int(value) for name, value in module.state_dict().items()} == {
        "seed": 4,
        "step": 0,
    }


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_a_parents_state_dict_resumes_too(backend, options):
    parent = nn.ModuleDict({"graft": SaliencyGraft(num_classes=5, backend=backend, **options)})
    run_steps(parent["graft"], 2)
    state = copy.deepcopy(parent.state_dict())
    expected = run_steps(parent["graft"], 2)
    parent.load_state_dict(state)
    for result, wanted in zip(run_steps(parent["graft"], 2), expected, strict=True):
        assert equal(result, wanted)


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_goes_on_as_the_original_would(backend, options, duplicate):
    module = SaliencyGraft(num_classes=5, seed=4, backend=backend, **options)
    run_steps(module, 2)
    twin = duplicate(module)
    for result, wanted in zip(run_steps(twin, 3), run_steps(module, 3), strict=True):
        assert equal(result, wanted)


def test_a_copy_can_be_made_after_a_call_with_gradients(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, backend=backend)
    module(images.requires_grad_(), ids, features=features)
    twin = copy.deepcopy(module)
    assert int(twin.step) == 1
    assert twin.result is None


def test_a_write_into_the_step_counts_for_the_grid_sizes_too(backend):
    sizes = [(2, 2), (4, 4), (3, 3), (4, 2)]
    images, _, features = batch_of()
    module = SaliencyGraft(grid_size=sizes, seed=6, backend=backend)
    for step in (0, 7, 8, 2):
        module.step.fill_(step)
        module(images, features=features)
        expected = rng.draw_grid_size(truth.call_seed(6, step, 0), tuple(sizes))
        assert tuple(module.result.mask.shape[1:]) == expected


def test_a_seed_tensor_is_copied():
    seed = torch.tensor([4])
    module = SaliencyGraft(seed=seed)
    seed.fill_(5)
    assert int(module.seed) == 4


@pytest.mark.parametrize("seed", [None, 4, torch.tensor(4)])
def test_the_buffers_are_on_the_default_device(seed):
    with torch.device("meta"):
        module = SaliencyGraft(seed=seed)
    assert module.seed.device.type == module.step.device.type == "meta"


@pytest.mark.slow
def test_of_several_grid_sizes_the_calls_seed_draws_one(backend):
    sizes = [(2, 2), (4, 4), (3, 3), (4, 2)]
    images, _, features = batch_of()
    module = SaliencyGraft(grid_size=sizes, seed=6, backend=backend)
    drawn = []
    for step in range(12):
        module(images, features=features)
        drawn.append(tuple(module.result.mask.shape[1:]))
        assert_fulfils_contract(
            module.result,
            images,
            truth.call_seed(6, step, 0),
            features=features,
            grid_size=rng.draw_grid_size(truth.call_seed(6, step, 0), tuple(sizes)),
        )
    assert set(drawn) == set(sizes)


@pytest.mark.slow
def test_a_refused_call_does_not_shift_the_grid_sizes_to_come(backend):
    sizes = [(2, 2), (4, 4), (3, 3), (4, 2)]
    images, _, features = batch_of()
    module = SaliencyGraft(grid_size=sizes, seed=6, backend=backend)
    module(images, features=features)
    with pytest.raises(ValueError, match="features"):
        module(images, features=features[:2])
    for step in range(1, 9):
        module(images, features=features)
        expected = rng.draw_grid_size(truth.call_seed(6, step, 0), tuple(sizes))
        assert tuple(module.result.mask.shape[1:]) == expected


@pytest.mark.parametrize("rank", [1, 7])
def test_each_rank_draws_a_stream_of_its_own(backend, rank, monkeypatch):
    images, ids, features = batch_of()
    monkeypatch.setattr(sg_kernels.nn, "_rank", lambda: rank)
    module = SaliencyGraft(num_classes=5, seed=4, backend=backend)
    for step in range(3):
        module(images, ids, features=features)
        assert_fulfils_contract(
            module.result,
            images,
            truth.call_seed(4, step, rank),
            features=features,
            targets=ids,
            num_classes=5,
        )


def test_the_rank_is_torch_distributeds(monkeypatch):
    assert sg_kernels.nn._rank() == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    assert sg_kernels.nn._rank() == 5


def test_without_a_seed_torchs_own_generator_gives_one():
    torch.manual_seed(5)
    first, second = SaliencyGraft(), SaliencyGraft()
    assert int(first.seed) != int(second.seed)
    torch.manual_seed(5)
    assert torch.equal(SaliencyGraft().seed, first.seed)


def test_a_call_leaves_torchs_generator_alone(backend):
    images, _, features = batch_of()
    module = SaliencyGraft(seed=1, grid_size=[(2, 2), (3, 3)], backend=backend)
    before = torch.get_rng_state()
    module(images, features=features)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refused_call_spends_no_step(backend):
    images, ids, features = batch_of()
    module = SaliencyGraft(num_classes=5, backend=backend)
    with pytest.raises(ValueError, match="targets"):
        module(images, ids + 3, features=features)
    assert int(module.step) == 0


def test_gradients_reach_the_images(backend):
    images, ids, features = batch_of()
    images.requires_grad_()
    module = SaliencyGraft(num_classes=5, seed=3, augmentations=2, backend=backend)
    mixed, targets = module(images, ids, features=features)
    weight = torch.randn(mixed.shape)
    (grad,) = torch.autograd.grad((mixed * weight).sum(), images)
    grafted = sg_kernels.graft(images, module.result.mask, module.result.index, backend=backend)
    (expected,) = torch.autograd.grad((grafted * weight).sum(), images)
    torch.testing.assert_close(grad, expected)
    assert not targets.requires_grad


def test_the_networks_gradients_come_from_the_mixed_pass_alone(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, seed=3, backend=backend)
    net(images)
    mixed, targets = module(images, ids)
    F.cross_entropy(net(mixed), targets).backward()
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    module.untap()
    F.cross_entropy(net(mixed), targets).backward()
    assert equal(grads, [parameter.grad for parameter in net.parameters()])


def test_the_module_has_no_parameters():
    assert not list(SaliencyGraft(Net().body).parameters())


def test_repr_tells_the_options():
    text = repr(SaliencyGraft(temperature=0.75, warmup_epochs=4))
    assert "temperature=0.75" in text
    assert "warmup_epochs=4" in text


def test_repr_leaves_out_the_defaults():
    assert repr(SaliencyGraft()) == "SaliencyGraft()"
    module = SaliencyGraft(num_classes=5, k=3, selection="topk", mixed_pass=False)
    assert repr(module) == "SaliencyGraft(selection='topk', k=3, num_classes=5, mixed_pass=False)"


RANK_SCRIPT = """
import sys
import torch
import sg_kernels
store, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
module = sg_kernels.SaliencyGraft(seed=5)
images, features = torch.randn(16, 1, 8, 8), torch.randn(16, 4, 4, 4)
for step in range(2):
    module(images, features=features)
    expected = sg_kernels.saliency_graft(
        images, features, seed=sg_kernels.rng.call_seed(5, step, rank)
    )
    assert torch.equal(module.result.mask, expected.mask)
    others = [torch.empty_like(module.result.index) for _ in range(2)]
    torch.distributed.all_gather(others, module.result.index)
    assert torch.equal(others[rank], expected.index)
    assert not torch.equal(*others)
torch.distributed.destroy_process_group()
"""


def test_two_processes_draw_streams_of_their_own_from_one_seed(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_SCRIPT, str(tmp_path / "store"), str(rank)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
