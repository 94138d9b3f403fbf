"""The draws have the distributions that the paper asks for.

Seeds are fixed, so no test here is a gamble. A critical value is that of a test which a right
generator fails once in a thousand.
"""

from itertools import permutations

import numpy as np
import pytest
import torch

from sg_kernels import SaliencyGraft, rng, saliency_graft

RISK = 1e-3
stats = pytest.importorskip("scipy.stats")


def assert_uniform(counts):
    counts = np.asarray(counts, np.float64)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert statistic < stats.chi2(counts.size - 1).ppf(1 - RISK)
    # a generator that counts up instead of drawing is too even
    assert statistic > stats.chi2(counts.size - 1).ppf(RISK)


def assert_uncorrelated(a, b):
    correlation = np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
    assert abs(correlation) < stats.norm.ppf(1 - RISK / 2) / np.sqrt(np.size(a))


def assert_frequency(hits, trials, probability):
    deviation = np.sqrt(probability * (1 - probability) / trials)
    assert abs(hits / trials - probability) < stats.norm.ppf(1 - RISK / 2) * deviation


def call(batch, augmentations, backend, **options):
    """Many draws at once, of a map in which exactly the cells of the upper row are salient."""
    saliency = torch.tensor([[1.0] * 4, [0.0] * 4]).repeat(batch, 1, 1)
    return saliency_graft(
        torch.zeros(batch, 1, 2, 4, dtype=torch.uint8),
        saliency=saliency,
        augmentations=augmentations,
        backend=backend,
        **{"seed": 2026, **options},
    )


def kept(result, batch):
    """The upper row of every mask: float64 (augmentations, batch, 4)."""
    return result.mask.view(-1, batch, 2, 4)[:, :, 0].double().numpy()


def words(count, stream=rng.Stream.KEEP_PROB, seed=11):
    return rng.words(torch.tensor([seed]), stream, count)[0, 0]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 8.0, 100.0])
def test_p_is_beta_distributed(alpha):
    p = rng.keep_threshold(words(5000), rng.beta_quantiles(alpha)).numpy() / 2**32
    assert stats.kstest(p, stats.beta(alpha, alpha).cdf).pvalue > RISK


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 8.0, 100.0])
def test_the_cdf_of_p_is_right_to_a_1024th_at_the_resolution_of_the_table(alpha):
    u = torch.arange(0, 1 << 32, 65521)
    p = rng.keep_threshold(u, rng.beta_quantiles(alpha)).numpy() / 2**32
    cdf, step = stats.beta(alpha, alpha).cdf, 2.0**-rng.QUANTILE_BITS
    assert (cdf(p - step) <= u.numpy() / 2**32 + 1 / 1024).all()
    assert (cdf(p + step) >= u.numpy() / 2**32 - 1 / 1024).all()


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_all_permutations_are_equally_likely(backend, batch):
    index = call(batch, 6000, backend).index.view(-1, batch).tolist()
    counts = dict.fromkeys(permutations(range(batch)), 0)
    for pairing in index:
        counts[tuple(pairing)] += 1
    assert_uniform(list(counts.values()))


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_all_cyclic_permutations_are_equally_likely(backend, batch):
    index = call(batch, 6000, backend, no_fixed_points=True).index.view(-1, batch).tolist()
    counts = {}
    for pairing in index:
        counts[tuple(pairing)] = counts.get(tuple(pairing), 0) + 1
    assert len(counts) == np.prod(range(1, batch))
    assert_uniform(list(counts.values()))


@pytest.mark.parametrize("no_fixed_points", [False, True])
def test_every_image_meets_every_other_equally_often(backend, no_fixed_points):
    batch = 16
    index = call(batch, 4000, backend, no_fixed_points=no_fixed_points).index.view(-1, batch)
    counts = torch.stack([index[:, b].bincount(minlength=batch) for b in range(batch)])
    if no_fixed_points:
        assert not counts.diagonal().any()
        counts = counts[~torch.eye(batch, dtype=torch.bool)].view(batch, batch - 1)
    for row in counts:
        assert_uniform(row)


def test_pairs_of_pairings_are_equally_likely(backend):
    index = call(8, 8000, backend).index.view(-1, 8)
    for a, b in ((0, 1), (3, 7)):
        together = (index[:, a] * 8 + index[:, b]).bincount(minlength=64).view(8, 8)
        assert not together.diagonal().any()
        assert_uniform(together[~torch.eye(8, dtype=torch.bool)])


@pytest.mark.parametrize("keep_prob", [0.1, 0.5, 0.9])
def test_every_salient_cell_is_kept_with_probability_p(backend, keep_prob):
    cells = kept(call(3, 4000, backend, keep_prob=keep_prob), 3)
    for b in range(3):
        for c in range(4):
            assert_frequency(cells[:, b, c].sum(), 4000, keep_prob)


def test_no_cell_is_kept_that_is_not_salient(backend):
    mask = call(3, 500, backend).mask
    assert not mask[:, 1].any()


@pytest.mark.parametrize(("keep_prob", "value"), [(0.0, 0.0), (1.0, 1.0)])
def test_p_at_its_ends_is_certain(backend, keep_prob, value):
    assert (kept(call(3, 500, backend, keep_prob=keep_prob), 3) == value).all()


def test_cells_samples_and_augmentations_are_kept_independently(backend):
    cells = kept(call(6, 4000, backend, keep_prob=0.5), 6)
    assert_uncorrelated(cells[:, :, 0], cells[:, :, 1])
    assert_uncorrelated(cells[:, :, 0], cells[:, :, 3])
    assert_uncorrelated(cells[:, 0], cells[:, 1])
    assert_uncorrelated(cells[:, 2], cells[:, 5])
    assert_uncorrelated(cells[:-1], cells[1:])


def test_one_p_is_drawn_for_all_cells_of_an_augmentation(backend):
    cells = kept(call(64, 1500, backend, alpha=0.5), 64)
    p = cells.mean((1, 2))
    assert stats.kstest(p, stats.beta(0.5, 0.5).cdf).statistic < 0.1
    # a p for every sample instead would leave hardly any spread
    assert p.std() > 0.3


def test_p_the_cells_and_the_pairing_are_drawn_independently(backend):
    result = call(8, 6000, backend)
    cells = kept(result, 8)
    index = result.index.view(-1, 8).double().numpy()
    assert_uncorrelated(cells[:, 0].mean(1), index[:, 0])
    assert_uncorrelated(cells[:, 3].mean(1), index[:, 3])


def per_seed(seeds, stream, count):
    """The words of many seeds: (seeds, count)."""
    seed = torch.tensor(seeds)[:, None, None]
    return rng.words(seed, stream, count)[:, 0].double().numpy()


@pytest.mark.parametrize("stream", [rng.Stream.SAMPLING, rng.Stream.KEEP_PROB, rng.Stream.PAIRING])
def test_consecutive_seeds_are_independent(stream):
    drawn = per_seed(list(range(8000)), stream, 2)
    assert_uncorrelated(drawn[:-1], drawn[1:])
    assert_uncorrelated(drawn[:, 0], np.arange(8000))
    assert_uniform(np.histogram(drawn[:, 0], bins=64, range=(0, 2**32))[0])


def test_consecutive_steps_and_ranks_are_independent():
    steps = torch.arange(8000)
    seeds = [rng.call_seed(torch.tensor(5), steps, rank).tolist() for rank in range(2)]
    assert len({*seeds[0], *seeds[1]}) == 16000
    drawn = [per_seed(own, rng.Stream.KEEP_PROB, 1) for own in seeds]
    assert_uncorrelated(drawn[0], drawn[1])
    assert_uncorrelated(drawn[0][:-1], drawn[0][1:])
    for own in drawn:
        assert_uniform(np.histogram(own, bins=64, range=(0, 2**32))[0])


def test_consecutive_seeds_pair_independently():
    seed = torch.arange(6000)[:, None, None]
    index = rng.pairing(seed, 4, 1, False)
    codes = (index * torch.tensor([64, 16, 4, 1])).sum(1)
    _, position = codes.unique(return_inverse=True)
    assert_uniform(position.bincount(minlength=24))
    assert_uniform((position[:-1] * 24 + position[1:]).bincount(minlength=576))


def test_the_streams_of_one_seed_are_independent():
    drawn = [words(8000, stream).double().numpy() for stream in rng.Stream]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert_uncorrelated(first, second)


def test_grid_sizes_are_equally_likely():
    sizes = tuple((1, width) for width in range(1, 8))
    seeds = rng.call_seed(torch.tensor(8), torch.arange(7000), 0).tolist()
    drawn = [rng.draw_grid_size(seed, sizes) for seed in seeds]
    assert_uniform([drawn.count(size) for size in sizes])


def test_prob_is_the_share_of_draws_that_graft(backend):
    images, saliency = torch.zeros(1, 1, 2, 2), torch.rand(1, 2, 2)
    module = SaliencyGraft(prob=0.3, keep_prob=0.0, augmentations=5000, seed=4, backend=backend)
    module(images, saliency=saliency)
    grafted = ~module.result.mask.flatten(1).all(1)
    assert_frequency(float(grafted.sum()), 5000, 0.3)
