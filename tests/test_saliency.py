"""Stage 1 through its own function, in every dtype and layout, against float64."""

import pytest
import torch
from conftest import in_layout

from sg_kernels import backends, channel_saliency

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["nchw", "channels_last", "sliced", "sliced_channels_last", "transposed", "stepped"]
TINY = 1e-30


def random_features(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within_budget(saliency, features, backend):
    """At most twice the reference's error on the same input, with room for one last float32 bit."""
    exact = features.double().abs().sum(1)
    reference = channel_saliency(features, backend="reference")
    budget = 2 * (reference - exact).abs().max() + exact * torch.finfo(torch.float32).eps + TINY
    assert saliency.dtype == torch.float32
    assert saliency.shape == exact.shape
    assert ((saliency - exact).abs() <= budget).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 8), (14, 14), (5, 3), (1, 17)])
def test_every_dtype_layout_and_size(backend, dtype, layout, size, poisoned):
    features = in_layout(random_features(3, 37, *size, dtype=dtype), layout)
    assert_within_budget(channel_saliency(features, backend=backend), features, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_that_are_one_and_the_same_memory(backend, dtype):
    # sums of equal terms round hardly at all in the reference, so its error is no measure here
    features = in_layout(random_features(3, 37, 5, 3, dtype=dtype), "expanded")
    saliency = channel_saliency(features, backend=backend).double()
    torch.testing.assert_close(saliency, features.double().abs().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 15, 16, 31, 33, 64, 100, 640, 2048])
def test_every_number_of_channels(backend, dtype, layout, channels):
    for size in ((7, 7), (8, 8)):
        features = in_layout(random_features(2, channels, *size, dtype=dtype), layout)
        assert_within_budget(channel_saliency(features, backend=backend), features, backend)


@pytest.mark.parametrize("batch", [0, 1, 2, 67])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_batch_size(backend, batch, layout):
    features = in_layout(random_features(batch, 24, 7, 7), layout)
    torch.testing.assert_close(channel_saliency(features, backend=backend), features.abs().sum(1))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_map_without_cells_has_no_sums(backend, channels):
    features = torch.zeros(2, 1, 1, 0).expand(2, channels, 1, 0)
    assert channel_saliency(features, backend=backend).shape == (2, 1, 0)


def test_no_channels_sum_to_zero(backend, poisoned):
    assert not channel_saliency(torch.zeros(2, 0, 3, 3), backend=backend).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
def test_tokens_unfold_row_by_row_after_the_prefix(backend, dtype, prefix_tokens):
    tokens = random_features(2, prefix_tokens + 15, 24, dtype=dtype)
    options = {"token_grid": (5, 3), "prefix_tokens": prefix_tokens, "backend": backend}
    saliency = channel_saliency(tokens, **options)
    expected = tokens.double().abs().sum(2)[:, prefix_tokens:].view(2, 5, 3)
    torch.testing.assert_close(saliency.double(), expected, rtol=1e-5, atol=0)


def test_strided_tokens(backend):
    tokens = random_features(2, 40, 48)[:, ::2, ::3]
    saliency = channel_saliency(tokens, token_grid=(4, 5), backend=backend)
    torch.testing.assert_close(saliency, tokens.abs().sum(2).view(2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(backend, dtype):
    features = torch.ones(1, 5000, 2, 2, dtype=dtype)
    saliency = channel_saliency(features, backend=backend)
    assert torch.equal(saliency, torch.full((1, 2, 2), 5000.0))


def skip_where_subnormals_are_zero(backend, dtype):
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter reads subnormal bfloat16 as zero")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_half_precision_value_is_read_as_it_is(backend, dtype, layout):
    skip_where_subnormals_are_zero(backend, dtype)
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    features = in_layout(values[values.isfinite()].view(1, 1, -1, 64), layout)
    saliency = channel_saliency(features, backend=backend)
    assert torch.equal(saliency, features[:, 0].float().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_subnormals_count(backend, dtype, layout):
    skip_where_subnormals_are_zero(backend, dtype)
    smallest = 2.0**-149 if dtype == torch.float64 else torch.finfo(dtype).smallest_normal / 4
    features = in_layout(torch.full((2, 9, 7, 7), -smallest, dtype=dtype), layout)
    saliency = channel_saliency(features, backend=backend)
    assert torch.equal(saliency.double(), torch.full((2, 7, 7), 9 * smallest, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [3, 70])
def test_nan_and_infinity_show_in_their_own_cell_only(backend, dtype, layout, channels):
    features = random_features(2, channels, 7, 7, dtype=dtype)
    features[0, -1, 2, 3] = torch.nan
    features[1, 0, 6, 6] = -torch.inf
    features[1, 1, 0, 0] = torch.inf
    features[1, 2, 0, 0] = -torch.inf
    saliency = channel_saliency(in_layout(features, layout), backend=backend)
    assert saliency.isnan().nonzero().tolist() == [[0, 2, 3]]
    assert saliency.isposinf().nonzero().tolist() == [[1, 0, 0], [1, 6, 6]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 40])
def test_negative_zeros_sum_to_positive_zero(backend, dtype, channels):
    saliency = channel_saliency(torch.full((1, channels, 7, 7), -0.0, dtype=dtype), backend=backend)
    assert not saliency.any()
    assert not saliency.signbit().any()


def test_cancelling_signs_do_not_cancel(backend):
    features = random_features(2, 10, 7, 7)
    saliency = channel_saliency(torch.cat([features, -features], 1), backend=backend)
    torch.testing.assert_close(saliency, 2 * features.abs().sum(1))


def test_no_gradient(backend):
    features = random_features(2, 4, 7, 7).requires_grad_()
    assert not channel_saliency(features, backend=backend).requires_grad


def test_features_stay_as_they_are(backend):
    features = random_features(2, 4, 7, 7)
    before = features.clone()
    channel_saliency(features, backend=backend)
    assert torch.equal(features, before)


@pytest.mark.slow
def test_the_same_features_give_the_same_bits(backend):
    features = random_features(8, 300, 14, 14)
    first = channel_saliency(features, backend=backend)
    assert all(torch.equal(channel_saliency(features, backend=backend), first) for _ in range(5))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_of_more_than_2_to_the_30_elements(backend, dim):
    shape, stride = [1, 1, 1, 2], [1, 1, 1, 1]
    shape[dim], stride[dim] = 3, 2**30 + 5
    # Of these gigabytes only the pages that hold a value are ever touched.
    features = torch.empty(2 * stride[dim] + 2, dtype=torch.float16).as_strided(shape, stride)
    features.copy_(torch.randn(shape))
    saliency = channel_saliency(features, backend=backend)
    torch.testing.assert_close(saliency, features.float().abs().sum(1), rtol=1e-3, atol=1e-3)
