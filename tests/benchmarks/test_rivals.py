"""The mixups that are ours, after papers without a library, do what the papers say."""

import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_bits

from benchmarks import rivals


def pair(side):
    """An image of zeros and one of ones, and their classes."""
    return torch.arange(2.0)[:, None, None, None].expand(2, 3, side, side), torch.arange(2)


def until_mixed(mix, images, *args):
    """The images mixed in place, with a pairing that is not the identity."""
    for _ in range(20):
        given = images.clone()
        mixed, targets = mix(given, *args)
        assert mixed is given
        if not mixed.equal(images):
            return (mixed != images).all(1), targets
    pytest.fail("always paired with itself")


def test_attentive_cutmix_pastes_the_most_attended_cells():
    images, labels = pair(8)
    features = torch.zeros(2, 5, 4, 4)
    features[:, :, 1, 2] = -9
    changed, targets = until_mixed(rivals.attentive_cutmix, images, features, labels, 2, 1)
    assert changed.sum() == 2 * 4
    assert changed[:, 2:4, 4:6].all()
    torch.testing.assert_close(targets, torch.tensor([[15 / 16, 1 / 16], [1 / 16, 15 / 16]]))


def test_saliencymix_centres_its_box_on_the_peak(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.75)

    def saliency(image):
        peak = np.zeros(image.shape[:2])
        peak[6, 9] = 1
        return peak

    images, labels = pair(16)
    changed, targets = until_mixed(rivals.saliencymix, images, labels, 2, saliency)
    assert changed.sum() == 2 * 8 * 8
    assert changed[:, 2:10, 5:13].all()
    assert targets[0].tolist() == [0.75, 0.25]


def test_our_fine_grained_saliency_ranks_pixels_as_opencv_does():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "saliency"):
        pytest.skip("OpenCV without its contrib modules")
    y, x = np.mgrid[:96, :96][..., None]
    image = (120 + 60 * np.sin(y / 7) + 60 * np.cos(x / (5, 9, 11))).astype(np.uint8)
    ours, theirs = rivals.fine_grained_saliency(image), rivals.opencv_saliency(image)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_puzzlemix_keeps_what_is_salient():
    pytest.importorskip("gco")
    images, labels = pair(16)
    saliency = torch.full((2, 4, 4), 1e-3)
    saliency[0, :, :2] = 1
    saliency[1, :, 2:] = 1
    for _ in range(20):
        mixed, targets = rivals.puzzlemix(images, saliency, labels, 2)
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        if not mixed.equal(images):
            break
    assert mixed[0, 0, :, :8].mean() <= mixed[0, 0, :, 8:].mean()
    assert mixed[1, 0, :, :8].mean() <= mixed[1, 0, :, 8:].mean()


def test_puzzlemix_cuts_by_the_costs_of_its_authors(monkeypatch):
    """Of 2 x 2 blocks, each from one image: the hidden saliency, the prior, the bad joints."""
    given = []
    cut = SimpleNamespace(cut_grid_graph=lambda *args, **_: given.append(args) or np.zeros(4, int))
    monkeypatch.setitem(sys.modules, "gco", cut)
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.3)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor([1, 0]))
    # Large, so that the joints still count when costs become integers.
    images, saliency = 50 * torch.rand(2, 3, 8, 8), torch.rand(2, 2, 2)
    mixed, targets = rivals.puzzlemix(images, saliency, torch.arange(2), 2, blocks=2)
    assert_same_bits(mixed, images)
    assert targets.tolist() == [[1, 0], [0, 1]]

    unary, disagreement, vertical, horizontal = given[0]
    share = saliency / saliency.sum((1, 2), keepdim=True)
    pooled = torch.nn.functional.avg_pool2d(images, 4)
    borders = [((0, x), (1, x)) for x in (0, 1)] + [((y, 0), (y, 1)) for y in (0, 1)]

    def cost(shown):
        of_blocks = sum(unary[y, x, 2 * z] for (y, x), z in shown.items())
        weights = [*vertical.ravel(), *horizontal.ravel()]
        return of_blocks + sum(
            w * disagreement[2 * shown[a], 2 * shown[b]] for w, (a, b) in zip(weights, borders)
        )

    def expected(shown):
        hidden = sum(share[(1 - z, *at)] for at, z in shown.items())
        prior = sum(-0.2 * np.log((0.3, 0.7)[z] ** 2) / 4 for z in shown.values())
        joints = 0.0
        for a, b in borders:
            difference = pooled[(shown[a], slice(None), *a)] - pooled[(shown[b], slice(None), *b)]
            joints += 1.2 / 32 * ((shown[a] != shown[b]) + 0.5 * difference.abs().mean())
        return 4000 * (hidden + prior + joints)

    choices = [dict(zip(product((0, 1), repeat=2), chosen)) for chosen in product((0, 1), repeat=4)]
    for shown in choices[1:]:
        difference = expected(shown) - expected(choices[0])
        assert cost(shown) - cost(choices[0]) == pytest.approx(float(difference), abs=8)
