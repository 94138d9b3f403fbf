"""Philox, its counter layout, and what is made of its words."""

import hashlib

import numpy as np
import pytest
import torch
import truth

from sg_kernels import rng

KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def hex_words(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, output):
    low, high = hex_words(key)
    assert rng.philox(*hex_words(counter), low | high << 32) == hex_words(output)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_on_tensors(counter, key, output):
    low, high = hex_words(key)
    seed = torch.tensor(np.uint64(low | high << 32).astype(np.int64))
    words = rng.philox(*map(torch.tensor, hex_words(counter)), seed)
    assert tuple(int(word) for word in words) == hex_words(output)


@pytest.mark.parametrize("stream", list(rng.Stream))
def test_word_i_of_a_row_and_draw_sits_in_block_i_over_4(stream):
    seed = -0x123456789ABCDEF0
    words = rng.words(torch.tensor([seed]), stream, 11, rows=3, draws=2)
    for a in range(2):
        for b in range(3):
            expected = [truth.word(seed, int(stream), i, row=b, draw=a) for i in range(11)]
            assert words[a, b].tolist() == expected


def test_a_word_does_not_depend_on_how_many_are_asked_for():
    seed = torch.tensor([5])
    many = rng.words(seed, rng.Stream.SAMPLING, 49, rows=8, draws=3)
    assert torch.equal(rng.words(seed, rng.Stream.SAMPLING, 6, rows=2, draws=2), many[:2, :2, :6])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32 + 7])
@pytest.mark.parametrize("rank", [0, 3])
def test_call_seed_is_the_call_streams_first_two_words(seed, step, rank):
    expected = truth.call_seed(seed, step, rank)
    assert rng.call_seed(seed, step, rank) == expected
    on_tensors = rng.call_seed(torch.tensor([seed]), torch.tensor([step]), rank)
    assert int(on_tensors) % (1 << 64) == expected


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 8, 33])
@pytest.mark.parametrize("no_fixed_points", [False, True])
def test_pairing_ranks_the_tickets(batch, no_fixed_points):
    index = rng.pairing(torch.tensor([77]), batch, 3, no_fixed_points)
    for a in range(3):
        assert index[a].tolist() == truth.pairing(77, batch, a, no_fixed_points)


@pytest.mark.parametrize("batch", [1, 2, 5, 64, 1000])
def test_pairing_is_a_permutation(batch):
    index = rng.pairing(torch.tensor([3]), batch, 4, False)
    assert torch.equal(index.sort(dim=1).values, torch.arange(batch).expand(4, batch))


@pytest.mark.parametrize("batch", [2, 3, 64, 1000])
def test_no_fixed_points_makes_one_cycle_of_the_whole_batch(batch):
    index = rng.pairing(torch.tensor([3]), batch, 1, True)[0].tolist()
    seen, b = [], 0
    for _ in range(batch):
        seen.append(b)
        b = index[b]
    assert b == 0
    assert sorted(seen) == list(range(batch))


def test_equal_tickets_rank_the_lower_sample_first(monkeypatch):
    monkeypatch.setattr(rng, "words", lambda *_, **__: torch.tensor([[[7, 3, 7, 3]]]))
    assert rng.pairing(torch.tensor([0]), 4, 1, False).tolist() == [[2, 0, 3, 1]]
    assert rng.pairing(torch.tensor([0]), 4, 1, True).tolist() == [[2, 3, 1, 0]]


ALPHAS = [0.05, 0.2, 0.5, 1.0, 2.0, 8.0, 300.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta_quantiles_are_scipys(alpha):
    stats = pytest.importorskip("scipy.stats")
    nodes = np.arange(1, 1024) / 1024
    expected = stats.beta(alpha, alpha).ppf(nodes) * 2**32
    np.testing.assert_allclose(rng.beta_quantiles(alpha)[1:-1], expected, atol=2**10)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, *ALPHAS, 1e4, 1e8])
def test_beta_quantiles_have_the_variance_of_beta(alpha):
    low = rng.beta_quantiles(alpha).double()[:-1] / 2**32
    high = rng.beta_quantiles(alpha).double()[1:] / 2**32
    # E[p^2] of a p that is uniform in each bin.
    variance = ((low**2 + low * high + high**2) / 3).mean() - 0.25
    assert variance == pytest.approx(1 / (8 * alpha + 4), rel=2e-3)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, *ALPHAS, 1e4, 1e300])
def test_beta_quantiles_rise_and_are_symmetric(alpha):
    table = rng.beta_quantiles(alpha)
    assert table[0] >= 0
    assert (table.diff() >= 0).all()
    assert torch.equal(table + table.flip(0), torch.full_like(table, 1 << 32))


def test_beta_quantiles_of_alpha_1_are_the_uniform_ones():
    assert torch.equal(rng.beta_quantiles(1.0), torch.arange(1025) << 22)


GOLDEN = {
    0.05: "8e9204e5d56487f6",
    0.2: "a5cb6411a3d28753",
    0.5: "90110f8b08c27e5c",
    1.0: "ab76993f8bcf9e70",
    2.0: "4fe010134f2e9c0c",
    4.0: "93e3bb73de72d213",
    100.0: "ece124c6f61b84f0",
}


@pytest.mark.parametrize("alpha", GOLDEN)
def test_beta_quantiles_never_change(alpha):
    table = rng.beta_quantiles(alpha).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(table).hexdigest()[:16] == GOLDEN[alpha]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_keep_threshold_interpolates_the_table_in_integers(alpha):
    words = rng.words(torch.tensor([9]), rng.Stream.KEEP_PROB, 200)[0, 0]
    words = torch.cat([words, torch.tensor([0, 1, (1 << 22) - 1, 1 << 22, (1 << 32) - 1])])
    thresholds = rng.keep_threshold(words, rng.beta_quantiles(alpha))
    assert thresholds.tolist() == [truth.keep_threshold(word, alpha) for word in words.tolist()]


def test_draw_grid_size_scales_one_word_to_the_number_of_sizes():
    sizes = ((1, 1), (2, 3), (7, 7), (4, 4), (8, 8))
    for seed in range(50):
        position = truth.word(seed, truth.GRID_SIZE, 0) * len(sizes) >> 32
        assert rng.draw_grid_size(seed, sizes) == sizes[position]
