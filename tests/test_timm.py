"""sg_kernels.timm.Mixup: grafts as SaliencyGraft, and mixes the other batches as timm."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import truth
from conftest import library
from torch import nn
from torch.nn import functional as F
from training import Net, batch_of

from sg_kernels import SaliencyGraft

timm = library("timm.data")

from sg_kernels.timm import Mixup  # noqa: E402  # after timm is known to be there

MIXES = {
    "mixup": {},
    "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.3, "cutmix_alpha": 0.7, "switch_prob": 0.4, "prob": 0.6},
    "minmax": {"cutmix_minmax": (0.2, 0.8), "switch_prob": 1.0},
    "not corrected": {"cutmix_alpha": 1.0, "correct_lam": False},
    "smoothed": {"label_smoothing": 0.4},
}


def multi_hot(rows, classes=5):
    return (torch.rand(rows, classes) < 0.4).float()


def never_grafts():
    """A grafter whose draw says no for the first batches."""
    seed = next(s for s in range(99) if all(not coin(s, step, 0.3) for step in range(3)))
    return {"graft_prob": 0.3, "layer": Net().body, "seed": seed}


def coin(seed, step, prob):
    return truth.word(truth.call_seed(seed, step, 0), truth.KEEP_PROB, 1) < int(prob * 2**32)


@pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_what_is_not_grafted_is_mixed_as_timm_does(options, mode, multi_label):
    options = {**options, "mode": mode, "num_classes": 5, "multi_label": multi_label}
    own, theirs = Mixup(graft_prob=0, **options), timm.Mixup(**options)
    for seed in range(6):
        images, ids, _ = batch_of(6, seed)
        targets = multi_hot(6) if multi_label else ids
        results = []
        for mixup_fn in (own, theirs):
            np.random.seed(seed)
            results.append(mixup_fn(images.clone(), targets))
            results[-1] += (torch.tensor(np.random.rand()),)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_that_the_draw_leaves_out_goes_to_timm():
    own, theirs = Mixup(num_classes=5, **never_grafts()), timm.Mixup(num_classes=5)
    for step in range(3):
        images, ids, _ = batch_of(6, step)
        np.random.seed(step)
        mixed, targets = own(images.clone(), ids)
        np.random.seed(step)
        expected, expected_targets = theirs(images.clone(), ids)
        assert torch.equal(mixed, expected)
        assert torch.equal(targets, expected_targets)
        assert int(own.grafter.step) == step + 1


@pytest.mark.parametrize("batch", [1, 5, 6])
def test_a_grafted_batch_is_that_of_the_module(batch):
    net = Net()
    mixup_fn = Mixup(num_classes=5, graft_prob=1, layer="body", network=net, seed=3)
    module = SaliencyGraft("body", network=net, num_classes=5, label_smoothing=0.1, seed=3)
    numpy_state = np.random.get_state()[1].copy()
    for seed in range(3):
        images, ids, _ = batch_of(batch, seed)
        given = images.clone()
        mixed, targets = mixup_fn(given, ids)
        expected, expected_targets = module(images, ids)
        assert torch.equal(mixed, expected)
        assert torch.equal(targets, expected_targets)
        assert torch.equal(given, images)
        net(mixed)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_targets_of_a_graft_are_smoothed_as_timms(multi_label):
    net, (images, ids, _) = Net(), batch_of(6)
    rows = multi_hot(6) if multi_label else ids
    mixup_fn = Mixup(
        num_classes=5,
        label_smoothing=0.3,
        multi_label=multi_label,
        graft_prob=1,
        layer="body",
        network=net,
    )
    _, targets = mixup_fn(images, rows)
    lam, index = mixup_fn.grafter.result.lam[:, None], mixup_fn.grafter.result.index
    smooth = timm.mixup.mixup_target(rows, 5, 1.0, 0.3, multi_label)
    torch.testing.assert_close(targets, lam * smooth + (1 - lam) * smooth[index])
    assert (lam < 1).any()


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_of_an_odd_batch_timm_mixes_all_but_the_last(batch, mode):
    images, ids, _ = batch_of(batch)
    options = {"num_classes": 5, "mode": mode}
    np.random.seed(1)
    mixed, targets = Mixup(graft_prob=0, **options)(images.clone(), ids)
    np.random.seed(1)
    expected, expected_targets = timm.Mixup(**options)(images[:-1].clone(), ids[:-1])
    assert torch.equal(mixed, torch.cat([expected, images[-1:]]))
    last = F.one_hot(ids[-1:], 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets, torch.cat([expected_targets, last]))


def test_prob_is_the_share_mixed_and_graft_prob_the_share_of_those_grafted():
    net, counts = Net(), {"grafted": 0, "timm": 0, "unmixed": 0}
    images, ids, _ = batch_of(4)
    mixup_fn = Mixup(
        num_classes=5, prob=0.6, graft_prob=0.25, layer="body", network=net, seed=2, keep_prob=0.5
    )
    np.random.seed(0)
    for step in range(400):
        mixed, _ = mixup_fn(images.clone(), ids)
        if mixup_fn.grafter.result is not None:
            counts["grafted"] += 1
            assert coin(2, step, 0.15)
        else:
            counts["unmixed" if torch.equal(mixed, images) else "timm"] += 1
    for kind, share in {"grafted": 0.15, "timm": 0.45, "unmixed": 0.4}.items():
        assert abs(counts[kind] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5, kind


def test_timms_script_can_switch_the_mixing_off(recwarn):
    net, (images, ids, _) = Net(), batch_of(4)
    mixup_fn = Mixup(num_classes=5, graft_prob=1, layer="body", network=net)
    mixed, _ = mixup_fn(images, ids)
    net(mixed)
    mixup_fn.mixup_enabled = False
    for _ in range(3):
        mixed, targets = mixup_fn(images, ids)
        torch.testing.assert_close(targets, F.one_hot(ids, 5) * 0.9 + 0.1 / 5)
        assert torch.equal(mixed, images)
        net(mixed)
    assert int(mixup_fn.grafter.step) == 1
    mixup_fn.mixup_enabled = True
    mixed, _ = mixup_fn(images, ids)
    torch.testing.assert_close(mixup_fn.grafter.result.saliency, net.body(images).abs().sum(1))
    assert not recwarn.list


def test_the_grafter_follows_the_batches_to_their_device():
    mixup_fn = Mixup(graft_prob=0, num_classes=5)
    mixup_fn(torch.empty(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=int, device="meta"))
    assert mixup_fn.grafter.step.device.type == "meta"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "layer is needed to graft"),
        ({"prob": 2}, "prob must be"),
        ({"graft_prob": -1}, "graft_prob must be"),
        ({"graft_prob": 0, "augmentations": 2}, "augmentations must be 1"),
        ({"graft_prob": 0, "beta": 2}, "unexpected keyword argument 'beta'"),
    ],
)
def test_bad_arguments_are_refused_and_spend_nothing(given, message):
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message):
        Mixup(num_classes=5, **given)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_timm_the_error_names_the_install():
    code = "import sys; sys.modules['timm'] = None; import sg_kernels; import sg_kernels.timm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: sg_kernels.timm needs timm: pip install timm" in run.stderr


class Model(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def train(task, steps):
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.1)
    for step in steps:
        np.random.seed(step)
        images, ids, _ = batch_of(6, step)
        task(images, ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_classification_task_grafts_and_its_checkpoint_resumes():
    from examples.timm_task import GraftingTask

    def new_task(seed):
        model = Model()
        mixup_fn = Mixup(num_classes=5, layer="body", network=model, seed=seed)
        return GraftingTask(model, mixup_fn, verbose=False)

    whole = new_task(4)
    train(whole, range(3))
    assert int(whole.mixup_fn.grafter.step) == 3
    checkpoint = {key: dict(value) for key, value in whole.get_checkpoint_state().items()}
    resumed = new_task(99)
    resumed.load_checkpoint_state(checkpoint["state_dict"], checkpoint["task_state"])
    for task in (whole, resumed):
        train(task, range(3, 9))
    assert [int(value) for value in resumed.mixup_fn.grafter.state_dict().values()] == [4, 9]
    for name, value in whole.trainable_module.state_dict().items():
        assert torch.equal(value, resumed.trainable_module.state_dict()[name]), name
