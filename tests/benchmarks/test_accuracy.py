"""The accuracy benchmarks: each method does what it is defined to do, at the stated cost."""

import csv
import gzip
import itertools
import multiprocessing
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy import data, experiments, methods, networks, price, report, run, train
from benchmarks.accuracy.data import Batch
from benchmarks.accuracy.train import Run
from benchmarks.rivals import import_library
from benchmarks.speed import results
from benchmarks.speed.readme import between_markers
from sg_kernels import SaliencyGraft, channel_saliency, label_ratio, mix_targets

BATCH, SIDE, CLASSES, SEED = 6, 16, 6, 3


class Recorded(nn.Module):
    """Two stages with BatchNorm, whose maps have 8 and 4 cells a side. Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, 4, 2, 2), nn.BatchNorm2d(4)) for inputs in (1, 4)
        )
        self.fc = nn.Linear(4, CLASSES)
        self.tapped = 1
        self.given, self.cost = [], 0.0

    def forward(self, images):
        self.given.append(images.detach().clone())
        # A pass for gradients by the images alone is made in eval mode.
        price = 1 if not torch.is_grad_enabled() else 3 if self.training else 2
        self.cost += price * images[:, 0].numel() / (BATCH * SIDE**2)
        return self.fc(self.stages[1](self.stages[0](images)).mean((2, 3)))


def needs(library):
    """A library, in a way that works beside a PyTorch without CUDA."""
    try:
        return import_library(library)
    except ImportError:
        pytest.skip(f"without {library}")


@pytest.fixture
def to():
    torch.manual_seed(0)
    return methods.Trained(Recorded(), CLASSES, BATCH, SEED, "cpu")


def spotted():
    """Image b is b + 1 throughout, but for a bright spot in a place of its own."""
    images = torch.arange(1.0, BATCH + 1)[:, None, None, None].repeat(1, 1, SIDE, SIDE)
    for b in range(BATCH):
        images[b, 0, 9, 2 * b + 2] += 0.9
    return images


def batch_of(images=None, epoch=0):
    torch.manual_seed(1)
    images = torch.randn(BATCH, 1, SIDE, SIDE) if images is None else images
    ids = torch.arange(BATCH)
    return Batch(images, ids, epoch, ids, images, lambda maps: maps.flip(3))


def loss_on(to, images, targets):
    """Of the batch that was trained on, as the definition has it."""
    kept = to.network.cost, len(to.network.given)
    loss = F.cross_entropy(to.network(images), targets)
    to.network.cost, to.network.given = kept[0], to.network.given[: kept[1]]
    return loss


def grafts_of(features=None, saliency=None):
    """What the module makes of a map, by the seed that the method is given."""
    batch = batch_of()
    mixer = SaliencyGraft(num_classes=CLASSES, seed=SEED)
    return mixer(batch.images, batch.labels, features=features, saliency=saliency)


def features_in(mode, to, images, stage=1):
    """Of a pass that leaves no trace."""
    network = pickle.loads(pickle.dumps(to.network)).train(mode == "train")
    with torch.no_grad():
        x = network.stages[0](images)
        return (network.stages[1](x) if stage else x).clone()


# Methods


HALVES = ("pass_scale=0.5", "mode=train", "mode=train pass_scale=0.5", "augmentations=3")


@pytest.mark.parametrize("words", [*methods.METHODS, *(f"half {each}" for each in HALVES)])
def test_a_method_states_what_its_passes_cost(to, monkeypatch, words):
    needs("timm")
    monkeypatch.setattr(methods.rivals, "puzzlemix", lambda images, *_: (images, torch.eye(BATCH)))
    transforms = needs("torchvision.transforms.v2")
    monkeypatch.setattr(transforms, "AugMix", lambda: lambda image: image)
    method, steps = methods.make(words, to), 100
    for step in range(steps):
        batch = batch_of(epoch=step)
        torch.manual_seed(step)
        method.loss(batch)
    assert to.network.cost / steps == pytest.approx(method.cost, rel=0.05)


@pytest.mark.parametrize("words", ["cutmix prob=1", "saliencymix prob=1", "attentive prob=1 k=3"])
def test_what_pastes_patches_mixes_labels_by_the_area_that_is_seen(to, words):
    method, seen = methods.make(words, to), []
    for seed in range(5):
        batch = batch_of(spotted())
        torch.manual_seed(seed)
        loss = method.loss(batch)
        mixed = to.network.given[-1]
        shares = mixed.floor() == torch.arange(1, BATCH + 1)[:, None, None, None, None]
        shares = shares.float().mean((2, 3, 4)).T
        assert shares.sum(1).allclose(torch.ones(BATCH))
        torch.testing.assert_close(loss, loss_on(to, mixed, shares))
        seen += shares.amax(1).tolist()
    assert min(seen) < 1


def test_cutmix_pastes_one_box_of_the_drawn_area(to, monkeypatch):
    monkeypatch.setattr(methods, "beta", lambda alpha: 0.75)
    monkeypatch.setattr(methods, "random_pixel", lambda height, width: (5, 15))
    methods.make("cutmix prob=1", to).loss(batch_of(spotted()))
    changed = (to.network.given[-1].floor() != spotted().floor()).any(0)[0]
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[1:9, 11:] = True  # 8 x 8 around (5, 15), clipped
    assert changed.equal(expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_box_labels_mixes_the_labels_of_cutmixs_box_by_saliency(to, monkeypatch, scale):
    monkeypatch.setattr(methods, "beta", lambda alpha: 0.75)
    monkeypatch.setattr(methods, "random_pixel", lambda height, width: (5, 12))
    batch = batch_of(spotted().floor() + torch.rand(BATCH, 1, SIDE, SIDE))
    if scale:
        small = F.interpolate(batch.images, scale_factor=scale, mode="area")
        saliency = channel_saliency(features_in("eval", to, small, stage=int(scale == 1)))
    else:
        saliency = methods.edge_strength(batch.images)
    loss = methods.make(f"box-labels prob=1 pass_scale={scale}", to).loss(batch)
    mixed = to.network.given[-1]
    outside = torch.ones(BATCH, SIDE, SIDE, dtype=torch.bool)
    outside[:, 1:9, 8:] = False
    index = mixed[:, 0, 5, 12].long() - 1
    assert mixed.equal(torch.where(outside[:, None], batch.images, batch.images[index]))
    lam = label_ratio(saliency, outside, index)
    assert (lam - 0.75).abs().max() > 1e-3  # the area
    targets = mix_targets(batch.labels, lam, index, CLASSES)
    torch.testing.assert_close(loss, loss_on(to, mixed, targets))


def test_saliencymix_puts_the_box_around_the_first_images_peak(to, monkeypatch):
    def saliency(image):
        assert (image.shape, image.dtype, image.max()) == ((SIDE, SIDE, 3), np.uint8, 255)
        return image[..., 0].astype(float)

    monkeypatch.setattr(methods.rivals, "fine_grained_saliency", saliency)
    monkeypatch.setattr(methods, "beta", lambda alpha: 1 - (4 / SIDE) ** 2)
    methods.make("saliencymix prob=1", to).loss(batch_of(spotted()))
    changed = (to.network.given[-1].floor() != spotted().floor()).any(0)[0]
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[7:11, 0:4] = True  # the spot of image 0 is at (9, 2)
    assert changed.equal(expected)


def test_attentive_cutmix_keeps_the_most_attended_cells(to):
    clean = batch_of().images
    saliency = channel_saliency(features_in("eval", to, clean)).flatten(1)
    methods.make("attentive prob=1 k=5", to).loss(batch_of())
    own = (clean == to.network.given[-1]).view(BATCH, 4, 4, 4, 4).all(4).all(2).flatten(1)
    for row in range(BATCH):
        if not own[row].all():  # paired with itself
            assert set(own[row].nonzero()[:, 0].tolist()) == set(saliency[row].topk(5)[1].tolist())


def test_mixup_weighs_images_and_labels_alike(to):
    needs("torchvision")
    images = torch.eye(BATCH, SIDE)[:, None, None].repeat(1, 1, SIDE, 1)  # column b of image b
    loss = methods.make("mixup", to).loss(batch_of(images))
    mixed = to.network.given[-1]
    targets = mixed[:, 0, 0, :CLASSES]
    assert targets.sum(1).allclose(torch.ones(BATCH))
    assert 0 < targets.max() < 1
    torch.testing.assert_close(loss, loss_on(to, mixed, targets))


def test_manifold_mixup_mixes_what_a_stage_receives(to, monkeypatch):
    monkeypatch.setattr(methods, "beta", lambda alpha: 0.3)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(1))
    other = torch.arange(BATCH).roll(2)
    monkeypatch.setattr(torch, "randperm", lambda count: other)
    batch = batch_of()
    hidden = to.network.stages[0](batch.images)
    logits = to.network.fc(to.network.stages[1](0.3 * hidden + 0.7 * hidden[other]).mean((2, 3)))
    targets = 0.3 * torch.eye(BATCH) + 0.7 * torch.eye(BATCH)[other]
    loss = methods.make("manifold-mixup", to).loss(batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    assert not to.network.stages[1]._forward_pre_hooks


def test_cutout_blanks_a_square_and_keeps_the_labels(to):
    loss = methods.make("cutout", to).loss(batch_of(spotted()))
    given = to.network.given[-1]
    blank = (given == 0).sum((1, 2, 3))
    assert ((blank >= (SIDE // 4) ** 2) & (blank <= (SIDE // 2) ** 2)).all()
    assert (given + (given == 0) * spotted()).equal(spotted())
    torch.testing.assert_close(loss, loss_on(to, given, torch.arange(BATCH)))


def test_dropblock_zeroes_blocks_in_training_alone(to):
    needs("timm")
    methods.make("dropblock drop=0.3", to)
    stage = to.network.stages[0]
    assert (stage(batch_of().images) == 0).float().mean() > 0.1
    stage.eval()
    assert (stage(batch_of().images) != 0).all()


def test_augmix_adds_the_divergence_of_the_views(to, monkeypatch):
    views = iter([*[torch.zeros] * BATCH, *[torch.ones] * BATCH])
    transforms = SimpleNamespace(AugMix=lambda: lambda image: 255 * next(views)(image.shape))
    monkeypatch.setattr(methods, "import_library", lambda name: transforms)
    to.network.eval()
    batch = batch_of()
    loss = methods.make("augmix weight=2.0", to).loss(batch)
    low, high = (batch.images.flatten(1).aminmax(dim=1)[i][:, None, None, None] for i in (0, 1))
    seen = [to.network(x + 0 * batch.images).softmax(1) for x in (batch.images, low, high)]
    mean = sum(seen) / 3
    divergence = sum((p * (p / mean).log()).sum(1).mean() for p in seen) / 3
    torch.testing.assert_close(loss, loss_on(to, batch.images, batch.labels) + 2 * divergence)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_half_grafts_by_a_clean_pass_that_leaves_no_trace(to, mode, scale):
    batch = batch_of()
    small = F.avg_pool2d(batch.images, 2) if scale == 0.5 else batch.images
    features = features_in(mode, to, small, stage=int(scale == 1))
    mixed, targets = grafts_of(features)
    before = pickle.loads(pickle.dumps(to.network))
    loss = methods.make(f"half prob=1 mode={mode} pass_scale={scale}", to).loss(batch)
    assert [each.shape[2] for each in to.network.given] == [SIDE * scale, SIDE]
    assert to.network.given[1].equal(mixed)
    torch.testing.assert_close(loss, F.cross_entropy(before(mixed), targets))
    for kept, own in zip(before.buffers(), to.network.buffers()):
        assert kept.equal(own)  # both saw the mixed images once


def test_half_grafts_half_of_the_batches(to):
    method = methods.make("half", to)
    grafted = []
    for _ in range(200):
        count = len(to.network.given)
        method.loss(batch_of())
        grafted.append(len(to.network.given) - count - 1)
    assert 70 < sum(grafted) < 130


def test_paper_trains_on_the_clean_images_and_their_grafts(to):
    batch, before = batch_of(), pickle.loads(pickle.dumps(to.network))
    mixed, targets = grafts_of(features_in("train", to, batch.images))
    loss = methods.make("paper", to).loss(batch)
    clean = F.cross_entropy(before(batch.images), batch.labels)
    torch.testing.assert_close(loss, (clean + F.cross_entropy(before(mixed), targets)) / 2)


def test_streamed_trains_on_the_grafts_of_the_batch_before(to):
    first, stage = batch_of(), to.network.stages[1]
    second, third = (first._replace(images=first.images * scale) for scale in (2, 3))
    outputs, mixer = [], SaliencyGraft(num_classes=CLASSES, seed=SEED)
    stage.register_forward_hook(lambda stage, args, output: outputs.append(output.detach()))
    method = methods.make("streamed", to)
    torch.testing.assert_close(method.loss(first), loss_on(to, first.images, first.labels))
    for before, batch in ((first, second), (second, third)):
        mixed, targets = mixer(before.images, before.labels, features=outputs[-1][:BATCH])
        loss = method.loss(batch)
        assert to.network.given[-1].equal(torch.cat([batch.images, mixed]))
        both = torch.cat([torch.eye(BATCH), targets])
        torch.testing.assert_close(loss, loss_on(to, to.network.given[-1], both))
        del outputs[-1]  # of loss_on


def test_cached_maps_are_warped_and_made_anew_when_they_are_due(to):
    method = methods.make("cached every=3 prob=1", to)
    features = features_in("eval", to, batch_of().images)
    mixed, _ = grafts_of(saliency=channel_saliency(features).flip(2))
    passes = []
    for epoch in range(7):
        method.loss(batch_of(epoch=epoch))
        passes.append(len(to.network.given))
        to.network.given = to.network.given[-1:] * (epoch == 0)
        if epoch == 0:
            assert to.network.given[0].equal(mixed)
            to.network.given = []
    assert passes == [2, 1, 1, 2, 1, 1, 2]


def test_sobel_grafts_by_edges(to):
    step = torch.zeros(1, 2, 8, 8)
    step[:, :, :, 4:] = 1
    edges = methods.edge_strength(step)
    assert edges[0, :, 3:5].eq(4).all()
    assert edges.sum() == 4 * 2 * 8
    batch = batch_of()
    mixed, _ = grafts_of(saliency=F.avg_pool2d(methods.edge_strength(batch.images), 4))
    methods.make("sobel prob=1", to).loss(batch)
    assert to.network.given[-1].equal(mixed)


def test_the_control_grafts_by_the_next_images_map(to):
    features = features_in("eval", to, batch_of().images)
    mixed, _ = grafts_of(features[[*range(1, BATCH), 0]])
    methods.make("another-map prob=1", to).loss(batch_of())
    assert to.network.given[-1].equal(mixed)


def test_backward_and_puzzlemix_take_the_gradient_of_the_loss_by_the_pixels(to, monkeypatch):
    batch = batch_of()
    images = batch.images.clone().requires_grad_()
    to.network.eval()
    F.cross_entropy(to.network(images), batch.labels).backward()
    expected = BATCH * images.grad.abs()[:, 0]
    to.network.train()
    to.network.zero_grad()
    torch.testing.assert_close(methods.loss_gradient(to, batch), expected)
    assert to.network.training
    assert all(parameter.grad is None for parameter in to.network.parameters())
    mixed, _ = grafts_of(saliency=F.avg_pool2d(expected, 4))
    methods.make("backward prob=1", to).loss(batch)
    assert to.network.given[-1].equal(mixed)
    given = []
    monkeypatch.setattr(
        methods.rivals, "puzzlemix", lambda *args: given.extend(args) or (args[0], torch.eye(BATCH))
    )
    expected = methods.loss_gradient(to, batch)
    methods.make("puzzlemix prob=1", to).loss(batch)
    torch.testing.assert_close(given[1], expected)
    assert given[3:] == [CLASSES, 4]


def test_an_unknown_method_or_mode_is_refused(to):
    with pytest.raises(ValueError, match=r"method must be one of vanilla, .*; got 'sgd'"):
        methods.make("sgd", to)
    with pytest.raises(ValueError, match="mode must be eval or train; got 'evil'"):
        methods.make("half mode=evil", to)


# Networks


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [("wrn-28-10", 100, 36.5), ("pyramidnet-200", 100, 26.8), ("resnet18", 200, 11.3),
     ("resnet50", 1000, 25.6), ("small", 10, 0.2)],
)  # fmt: skip
def test_a_network_has_the_papers_size_and_a_map_to_tap(name, classes, millions):
    if name.startswith("resnet"):
        needs("timm")
    with torch.device("meta"):
        network = networks.make(name, 3, classes)
        images = torch.empty(2, 3, 224 if name == "resnet50" else 32, 32)
        assert network(images).shape == (2, classes)
        maps = methods.features_of(network, images)
    assert round(sum(each.numel() for each in network.parameters()) / 1e6, 1) == millions
    cells = {"resnet50": (7, 1), "small": (4, 4)}
    assert maps.shape[2:] == cells.get(name, (8, 8))


def test_shakedrop_scales_a_dropped_branch_and_its_gradient(monkeypatch):
    torch.manual_seed(0)
    branch = torch.ones(1000, 2, 1, 1, requires_grad=True)
    shaken = networks.shakedrop(branch, 1.0, training=True)
    shaken.sum().backward()
    for values, least in ((shaken.detach(), -1), (branch.grad, 0)):
        assert values[:, 0].equal(values[:, 1])  # one draw an image
        assert stats.kstest(values[:, 0].flatten(), "uniform", (least, 1 - least)).pvalue > 0.01
    assert networks.shakedrop(branch, 0.0, training=True) is branch
    assert networks.shakedrop(branch, 0.3, training=False).eq(0.7).all()
    drops = [each.drop for each in networks.make("small-shakedrop", 1, 10).modules()
             if isinstance(each, networks.Residual)]  # fmt: skip
    assert drops == pytest.approx([1 / 6, 2 / 6, 3 / 6])


# Data


@pytest.fixture
def clothes(tmp_path):
    """A tiny Fashion-MNIST."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 12)):
        for kind, shape in (("images", (count, 28, 28)), ("labels", (count,))):
            values = draw.integers(0, 10 if kind == "labels" else 256, shape, np.uint8)
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            path = tmp_path / f"{part}-{kind}-idx{len(shape)}-ubyte.gz"
            path.write_bytes(gzip.compress(head + values.tobytes()))
    return tmp_path


def test_fashion_is_read_and_its_subset_follows_the_seed(clothes):
    whole, few = data.load("fashion", clothes, 1, None), data.load("fashion", clothes, 1, 10)
    assert (whole.images.shape, whole.test_images.shape) == ((40, 1, 28, 28), (12, 1, 28, 28))
    assert whole.images[:10].equal(few.images)
    assert not few.images.equal(data.load("fashion", clothes, 2, 10).images)
    standard = whole.standardise(whole.images)
    assert abs(standard.mean()) < 1e-4
    assert standard.std() == pytest.approx(1, abs=1e-3)


def test_fashion_that_is_missing_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.load("fashion", tmp_path / "none", 0, None)


def test_clutter_shows_the_object_in_a_place_and_colour_of_its_own(clothes):
    pytest.importorskip("sklearn")
    first, again = (data.clutter(clothes, 1, 8) for _ in range(2))
    other = data.clutter(clothes, 2, 8)
    assert first.images.shape == (8, 3, 32, 32)
    assert first.images.equal(again.images)
    assert not first.images.equal(other.images)
    assert first.test_images.equal(other.test_images)
    assert len(first.test_images) == 12
    assert first.labels.equal(data.fashion(clothes, 1, 8).labels)
    draw, scene = np.random.default_rng(0), np.zeros((32, 32, 3), np.float32)
    data._paste(draw, scene, np.ones((10, 10), np.float32))
    rows, columns, _ = scene.nonzero()
    assert (np.ptp(rows), np.ptp(columns), len({*scene[..., 0].ravel()})) == (9, 9, 2)


def test_a_warp_shifts_and_mirrors_maps_as_it_does_images():
    images = torch.arange(500 * 36.0).view(500, 1, 6, 6) + 1
    warp = data.random_warp(500, 2, torch.Generator().manual_seed(0))
    warped = warp(images)
    assert warp(torch.cat([images, -images], 1))[:, 1:].equal(-warped)
    found = set()
    for padded, result in zip(F.pad(images, [2] * 4), warped):
        for y, x in itertools.product(range(5), range(5)):
            crop = padded[:, y : y + 6, x : x + 6]
            found |= {
                (y, x, each) for each in (0, 1) if result.equal(crop.flip(2) if each else crop)
            }
    assert len(found) == 50


def test_batches_are_the_same_for_every_method_and_visit_every_image(clothes):
    source = data.load("fashion", clothes, 0, None)
    first, again = (source.batches(16, 7, "cpu") for _ in range(2))
    batches = [next(first) for _ in range(4)]
    for batch in batches:
        assert batch.images.equal(next(again).images)
        assert batch.warp(batch.originals).equal(batch.images)
        assert batch.labels.equal(source.labels[batch.ids])
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    assert len({*batches[0].ids.tolist(), *batches[1].ids.tolist()}) == 32


def test_cifar_is_read_from_its_python_archive(tmp_path, monkeypatch):
    datasets = needs("torchvision.datasets")
    with pytest.raises(FileNotFoundError, match="cifar-100-python"):
        data.load("cifar100", tmp_path, 0, None)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # of the real files
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    for name in ("train", "test"):
        content = {"data": pixels, "fine_labels": list(range(20))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["x"] * 100}))
    source = data.load("cifar100", tmp_path, 0, 5)
    assert (len(source), source.num_classes) == (5, 100)
    image = torch.tensor(pixels[source.labels[0]].reshape(3, 32, 32))
    assert source.images[0].equal(image)


def test_folders_are_read_and_cropped(tmp_path, monkeypatch):
    needs("torchvision")
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError, match="give --root"):
        data.load("tiny-imagenet", tmp_path, 0, None)
    for part in ("train", "val"):
        for i, name in enumerate("ab"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for shot in range(4):
                image.new("RGB", (70, 60), (255 * i, 40 * shot, 0)).save(folder / f"{shot}.png")
    monkeypatch.setattr(data, "WORKERS", 1)
    source = data.Folders(tmp_path, 64, seed=0, count=6)
    assert (len(source), source.num_classes) == (6, 2)
    batches = [next(source.batches(3, 5, "cpu")) for _ in range(2)]
    assert batches[0].images.equal(batches[1].images)
    assert batches[0].images.shape == (3, 3, 64, 64)
    ((images, labels),) = source.tests(8, "cpu")
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert (images[:, 0].mean((1, 2)) > 0).tolist() == [False] * 4 + [True] * 4


# Runs


def a_run(**more):
    given = {"data": "fashion", "train_images": 40, "network": "small", "method": "cutmix"}
    given |= {"budget": "cost", "steps": 30, "batch": 8, "rate": 0.1, "test": "plain", "seed": 0}
    return Run(**{**given, **more})


def test_a_run_repeats_itself_and_methods_cost_the_same(clothes):
    def done(method, budget="cost"):
        spent = []
        found = train.train(a_run(method=method, budget=budget), clothes, "cpu", spent.append)
        return found._replace(seconds=0), sum(spent)

    outcome, spent = done("half")
    assert done("half")[0] == outcome
    assert outcome.steps_done == 26  # 30 * 3 / 3.5
    assert spent == pytest.approx(30, abs=0.5)
    assert done("half", "steps")[0].steps_done == 30
    assert done("vanilla")[0].steps_done == 30
    assert done("paper")[0].steps_done == 15


def test_occlusion_hides_the_most_salient_cells(to):
    images = batch_of().images
    hidden = train.occlude(to.network.eval(), images, 0.25) == 0
    saliency = channel_saliency(features_in("eval", to, images)).flatten(1)
    expected = torch.zeros(BATCH, 16, dtype=torch.bool)
    expected.scatter_(1, saliency.topk(4).indices, True)
    assert hidden.equal(F.interpolate(expected.view(-1, 1, 4, 4).float(), SIDE).bool())


def test_a_stopped_experiment_goes_on_and_leaves_out_what_another_process_makes(tmp_path):
    path, runs = tmp_path / "a.csv", [a_run(seed=seed) for seed in range(4)]
    outcome = train.Outcome(1.0, "", 3.0, 30, 2.0)
    run.add(path, {**runs[1]._asdict(), **outcome._asdict()})
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def make_the_next():
        for made in run.unfinished(runs[2:], path):
            assert made == runs[2]
            ready.set()
            fork.Event().wait()  # until it is killed

    other = fork.Process(target=make_the_next)
    other.start()
    assert ready.wait(30)
    assert list(run.unfinished(runs, path)) == [runs[0], runs[3]]
    other.kill()
    other.join()
    assert list(run.unfinished(runs, path)) == [runs[0], runs[2], runs[3]]
    run.add(path, {**runs[0]._asdict(), **outcome._asdict()})
    with path.open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["1", "0"]


def test_one_command_adds_a_row_as_each_run_ends(clothes, tmp_path, monkeypatch):
    tiny = experiments.Setting("fashion", 40, "small", 20, 8, 0.1)
    monkeypatch.setitem(experiments.SMALL, "fashion", tiny)
    path = tmp_path / "a.csv"
    command = ["run", "key", "--data", "fashion", "--seeds", "2", "--methods", "vanilla"]
    monkeypatch.setattr(sys, "argv", [*command, f"--root={clothes}", f"--results={path}"])
    threads = torch.get_num_threads()
    run.main()
    rows = pd.read_csv(path)
    run.main()
    torch.set_num_threads(threads)
    assert pd.read_csv(path).equals(rows)
    assert rows.seed.tolist() == [0, 1]
    assert {*rows.method} == {"vanilla"}


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_an_experiment_compares_all_methods_seed_by_seed(experiment, to):
    settings = list(experiments.SMALL.values())
    runs = list(experiments.runs_of(experiment, settings, range(3)))
    assert len(set(runs)) == len(runs)
    assert [each.seed for each in runs] == sorted(each.seed for each in runs)
    assert experiments.BASELINE in {each.method for each in runs}
    for words in dict.fromkeys(each.method for each in runs):
        if words.split()[0] not in ("mixup", "dropblock", "augmix"):
            methods.make(words, to)  # its options exist
    assert {each.network for each in runs} <= set(networks.NETWORKS)


# Report


def a_row(method, seed, error, **more):
    occluded = "21.00 25.00 60.00" if more else ""
    outcome = train.Outcome(error, occluded, 3.0, 30, 2.0)
    machine = {"commit": "1234567", "torch": "2.13.0", "device": "a machine", "ended": ""}
    return {**a_run(method=method, seed=seed, **more)._asdict(), **outcome._asdict(), **machine}


def rows_of(errors, path):
    for method, values in errors.items():
        for seed, error in enumerate(values):
            run.add(path, a_row(method, seed, error))
    return report.read(path)


def test_differences_are_paired_by_seed(tmp_path):
    draw = np.random.default_rng(0)
    base = 20 + draw.normal(0, 3, 8)
    errors = {
        "cutmix": base,
        "half": base - 0.5 + draw.normal(0, 0.1, 8),
        "sobel": base + draw.normal(0, 0.1, 8) - 0.01,
        "paper": base[:5] + 1,
        "vanilla": base + 1,
    }
    rows = rows_of(errors, tmp_path / "a.csv")
    lines = report.summary(rows).set_index("method")
    expected = stats.ttest_rel(errors["half"], base).confidence_interval()
    half = lines.loc["half"]
    assert half.difference - half.reach == pytest.approx(expected.low)
    assert half.difference + half.reach == pytest.approx(expected.high)
    assert half["standard error"] == pytest.approx(errors["half"].std(ddof=1) / 8**0.5)
    verdicts = {line.method: report.verdict(line) for _, line in report.summary(rows).iterrows()}
    assert verdicts == {
        "cutmix": "", "half": "better", "sobel": "no difference shown", "paper": "too few seeds",
        "vanilla": "worse",
    }  # fmt: skip
    found = report.comparisons(rows)
    assert "-0.5" in report.tables(found)
    report.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_equal_steps_compare_with_the_runs_at_plain_cost(tmp_path):
    rows = rows_of({"cutmix": [20.0] * 8, "half": [19.0] * 8}, tmp_path / "a.csv")
    dear = rows[rows.method == "half"].assign(budget="steps", cost=3.5, error=18.0)
    rows.loc[rows.method == "half", "cost"] = 3.5
    found = report.comparisons(pd.concat([rows, dear]))
    assert [report.summary(each.runs).difference.min() for each in found] == [-1, -2]


def test_each_experiment_has_a_table_and_shows_again_what_it_is_compared_with(tmp_path):
    names = ["cutmix", "vanilla", "half", "half threshold=0.0", "half stage=9"]
    rows = rows_of({name: [20.0] * 8 for name in names}, tmp_path / "a.csv")
    found = {
        each.title.split(": ")[0]: (each.section, [*each.runs.method.unique()])
        for each in report.comparisons(rows)
    }
    start = "fashion, equal cost, "
    assert found == {
        f"{start}recipes": ("recipes", ["cutmix", "vanilla", "half"]),
        f"{start}threshold": ("options", ["cutmix", "half", "half threshold=0.0"]),
        f"{start}others": ("options", ["cutmix", "half stage=9"]),
    }


@pytest.mark.parametrize("experiment", ["key", "shakedrop", "scarcity", "ablations"])
def test_runs_of_one_experiment_have_one_table_of_its_name(tmp_path, experiment):
    methods = experiments.EXPERIMENTS[experiment]
    rows = rows_of({name: [20.0] * 8 for name in methods}, tmp_path / "a.csv")
    (found,) = report.comparisons(rows)
    assert found.title.startswith(f"fashion, equal cost, {experiment}: ")
    assert len(found.runs) == len(rows)


def test_what_has_too_few_seeds_is_not_published(tmp_path):
    rows = rows_of({"cutmix": [20.0] * 8, "half": [19.0] * 8, "paper": [18.0] * 7}, tmp_path / "a")
    assert {*report.with_enough_seeds(rows).method} == {"cutmix", "half"}


def test_errors_under_occlusion_are_compared_too(tmp_path):
    run.add(tmp_path / "a.csv", a_row("cutmix", 0, 20.0, test="occlusion"))
    rows = report.read(tmp_path / "a.csv").set_index("test").error
    assert rows.to_dict() == {
        "plain": 20, "10% of the cells hidden": 21, "20% of the cells hidden": 25,
        "40% of the cells hidden": 60,
    }  # fmt: skip


def test_the_tables_of_the_page_are_what_the_results_say():
    rows = report.with_enough_seeds(report.read(report.RESULTS / "accuracy.csv"))
    found = report.sections(report.comparisons(rows))
    page = report.PAGE.read_text()
    for section in found:
        assert page.count(f"<!-- {section} -->\n") == 1
        assert (report.RESULTS / f"accuracy-{section}.png").exists()
    assert report.rewritten(page, found) == page


# Price


def test_the_price_of_a_recipe_that_mixes_half_is_the_mean_of_two_steps(monkeypatch):
    seconds = {
        "plain": 10.0,
        "cutmix": 12.0,
        "half pass_scale=0.5": 14.0,
        "half": 16.0,
        "always": 17.0,
        "paper": 22.0,
    }
    made = {}

    def interleave(steps, *_):
        made.update(steps)
        return pd.DataFrame([seconds] * 3)[list(steps)], {}

    monkeypatch.setattr(price.measure, "interleave", interleave)
    monkeypatch.setattr(price.networks, "make", lambda *given: Recorded())
    monkeypatch.setattr(price, "timm_cutmix", lambda to: methods.make("cutmix prob=1.0", to))
    rows = price.measure_steps(price.Setting("any", BATCH, SIDE), "cpu", 3)
    ratios = {row.candidate: row.value for row in rows if row.figure == price.OVER_CUTMIX}
    assert ratios == pytest.approx(
        {"half pass_scale=0.5": 12 / 11, "half": 13 / 11, "always": 17 / 11, "paper": 2}, rel=1e-4
    )
    counted = {row.candidate: row.value for row in rows if row.figure == price.COUNTED}
    assert counted == pytest.approx(
        {"half pass_scale=0.5": 3.125 / 3, "half": 3.5 / 3, "always": 4 / 3, "paper": 2}
    )
    assert {*made} == {*seconds}


@pytest.mark.parametrize("recipe", price.OF_HALF)
def test_a_step_that_is_priced_mixes_every_batch(recipe, monkeypatch):
    passes = []

    class Counting(Recorded):
        def forward(self, images):
            passes.append(torch.is_grad_enabled())
            return super().forward(images[:, :1])

    monkeypatch.setattr(price, "CLASSES", CLASSES)
    monkeypatch.setattr(price.networks, "make", lambda *given: Counting())
    make = partial(methods.make, f"{recipe} prob=1.0")
    step = price.step_of(make, price.Setting("any", BATCH, SIDE), "cpu")
    for _ in range(5):
        step()
    assert passes == [False, True] * 5


def test_the_price_on_the_page_is_what_the_results_say():
    table = price.table_of(results.read(results.RESULTS / "price.csv"))
    page = price.PAGE.read_text()
    assert between_markers(page, "price", table) == page
