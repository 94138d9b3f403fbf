"""Stage 6 through its own function: a copy, exact to the bit, and its gradients."""

import pytest
import torch
import truth
from conftest import LAYOUTS, assert_same_bits, in_layout, random_bits, random_mask

from sg_kernels import graft, ops

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]


def random_index(rows, batch, seed=0):
    return torch.randint(batch, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_of_every_dtype_and_layout_is_copied(backend, dtype, layout, poisoned):
    images = in_layout(random_bits((4, 3, 11, 10), dtype), layout)
    mask, index = random_mask(4, 5, 4), torch.tensor([2, 0, 0, 3])
    grafted = graft(images, mask, index, backend=backend)
    assert_same_bits(grafted, truth.graft(images, mask, index))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_payloads_and_signed_zeros_survive(backend, dtype):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    exponent = int(torch.tensor(torch.inf, dtype=dtype).view(bits))
    sign = torch.iinfo(bits).min
    patterns = torch.tensor([exponent + 1, exponent + 5, sign | exponent | 9, sign, 1, exponent])
    images = patterns.to(bits).view(dtype).view(1, 6, 1, 1).expand(2, 6, 9, 9).clone()
    mask = random_mask(2, 3, 3)
    assert_same_bits(graft(images, mask, torch.tensor([1, 0]), backend=backend), images)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 17])
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((32, 32), (8, 8)),
        ((28, 28), (7, 7)),
        ((33, 31), (7, 5)),
        ((5, 64), (5, 3)),
        ((64, 5), (3, 5)),
        ((17, 9), (1, 1)),
        ((1, 1), (1, 1)),
        ((1, 50), (1, 49)),
        ((9, 7), (9, 7)),
        ((20, 70), (2, 69)),
    ],
)
def test_pixel_y_x_belongs_to_the_cell_it_falls_into(backend, channels, size, grid):
    images = torch.arange(3 * channels * size[0] * size[1], dtype=torch.int32)
    images = images.view(3, channels, *size)
    mask, index = random_mask(3, *grid), torch.tensor([1, 2, 0])
    for layout in ("nchw", "channels_last"):
        grafted = graft(in_layout(images, layout), mask, index, backend=backend)
        assert_same_bits(grafted, truth.graft(images, mask, index))


@pytest.mark.parametrize("value", [True, False])
def test_a_uniform_mask_takes_whole_images(backend, value):
    images, index = random_bits((4, 3, 8, 8), torch.float32), torch.tensor([3, 3, 1, 0])
    mask = torch.full((4, 3, 3), value)
    expected = images if value else images[index]
    assert_same_bits(graft(images, mask, index, backend=backend), expected)


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("augmentations", [1, 2, 3])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_batch_and_number_of_augmentations(backend, batch, augmentations, layout):
    images = in_layout(random_bits((batch, 3, 8, 6), torch.float32), layout)
    rows = augmentations * batch
    mask = random_mask(rows, 4, 3)
    index = random_index(rows, batch) if batch else torch.zeros(0, dtype=torch.int64)
    grafted = graft(images, mask, index, backend=backend)
    assert_same_bits(grafted, truth.graft(images, mask, index))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [True, False])
def test_images_without_channels_graft_to_as_little(backend, memory_format, value):
    images = torch.empty(2, 0, 4, 4, memory_format=memory_format, requires_grad=True)
    mask, index = torch.full((2, 2, 2), value), torch.tensor([1, 0])
    grafted = graft(images, mask, index, backend=backend)
    assert grafted.shape == (2, 0, 4, 4)
    assert grafted.dtype == torch.float32
    (grad,) = torch.autograd.grad(grafted.sum(), images)
    assert grad.shape == (2, 0, 4, 4)
    out = torch.empty(2, 0, 4, 4, memory_format=memory_format)
    assert graft(images.detach(), mask, index, out=out, backend=backend) is out


@pytest.mark.parametrize("index", [[0, 0, 0, 0], [3, 3, 1, 1], [0, 1, 2, 3]])
def test_the_index_may_repeat_and_meet_itself(backend, index):
    images, mask = random_bits((4, 3, 9, 9), torch.int16), random_mask(4, 4, 4)
    index = torch.tensor(index)
    assert_same_bits(graft(images, mask, index, backend=backend), truth.graft(images, mask, index))


@pytest.mark.parametrize("strided", ["mask", "index", "mask expanded"])
def test_strided_mask_and_index(backend, strided):
    images = random_bits((4, 3, 8, 8), torch.float32)
    mask, index = random_mask(4, 4, 4), torch.tensor([1, 0, 3, 2])
    if strided == "mask":
        mask = random_mask(8, 4, 4)[::2].transpose(1, 2)
    elif strided == "mask expanded":
        mask = random_mask(1, 4, 4).expand(4, 4, 4)
    else:
        index = torch.tensor([1, 99, 0, 99, 3, 99, 2, 99])[::2]
    assert_same_bits(graft(images, mask, index, backend=backend), truth.graft(images, mask, index))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("strided", [False, True])
def test_segmentation_maps_need_no_channels(backend, dtype, strided):
    maps = random_bits((4, 8, 9), dtype)
    maps = maps.transpose(1, 2) if strided else maps
    mask, index = random_mask(8, 3, 4), random_index(8, 4)
    grafted = graft(maps, mask, index, backend=backend)
    assert_same_bits(grafted, truth.graft(maps[:, None], mask, index)[:, 0])


@pytest.mark.parametrize("layout", [*LAYOUTS[:-1]])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_memory_format_is_kept(backend, layout, dtype):
    images = in_layout(random_bits((4, 3, 8, 6), dtype), layout)
    grafted = graft(images, random_mask(4, 2, 2), torch.tensor([1, 0, 3, 2]), backend=backend)
    channels_last = layout in ("channels_last", "sliced_channels_last")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert grafted.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("layout", [*LAYOUTS[:-1]])
@pytest.mark.parametrize("images_layout", ["nchw", "channels_last"])
def test_out_takes_the_rows_and_nothing_beside_them(backend, dtype, layout, images_layout):
    images = in_layout(random_bits((4, 3, 9, 7), dtype), images_layout)
    mask, index = random_mask(8, 4, 3), random_index(8, 4)
    out = in_layout(torch.zeros(8, 3, 9, 7, dtype=dtype), layout)
    base = out if out._base is None else out._base
    base.fill_(77)
    assert graft(images, mask, index, out=out, backend=backend) is out
    assert_same_bits(out, truth.graft(images, mask, index))
    out.fill_(77)
    assert (base == 77).all()


def test_out_of_segmentation_maps(backend):
    maps, mask = random_bits((4, 8, 9), torch.uint8), random_mask(4, 3, 4)
    index = torch.tensor([1, 0, 3, 2])
    base = torch.full((4, 10, 20), 77, dtype=torch.uint8)
    out = base[:, 1:9, 2:20:2]
    graft(maps, mask, index, out=out, backend=backend)
    assert_same_bits(out, truth.graft(maps[:, None], mask, index)[:, 0])
    out.fill_(77)
    assert (base == 77).all()


def test_a_call_with_out_returns_out_for_segmentation_maps_too(backend):
    maps, out = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
    grafted = graft(maps, random_mask(2, 2, 2), torch.tensor([1, 0]), out=out, backend=backend)
    assert grafted.data_ptr() == out.data_ptr()
    assert torch.equal(grafted, maps)


def test_inputs_stay_as_they_are(backend):
    images, mask = random_bits((4, 3, 8, 8), torch.float32), random_mask(4, 4, 4)
    index = torch.tensor([1, 1, 3, 2])
    before = [tensor.clone() for tensor in (images, mask, index)]
    graft(images, mask, index, backend=backend)
    for tensor, copy in zip((images, mask, index), before, strict=True):
        assert_same_bits(tensor, copy)


def test_the_result_shares_no_memory_with_the_images(backend):
    images = random_bits((2, 3, 8, 8), torch.float32)
    mask = torch.ones(2, 1, 1, dtype=torch.bool)
    grafted = graft(images, mask, torch.tensor([0, 1]), backend=backend)
    assert grafted.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


def plain_graft(images, mask, index):
    """The same in operations whose gradients torch knows."""
    (gh, gw), (height, width) = mask.shape[1:], images.shape[2:]
    ys, xs = torch.arange(height) * gh // height, torch.arange(width) * gw // width
    up = mask[:, None][:, :, ys][..., xs]
    return torch.where(up, images[torch.arange(len(mask)) % len(images)], images[index])


# Few rows are cut into strips, and outputs of 16 MiB and more may be written past the caches, where
# every run of pixels begins and ends on 16 bytes: grids 7 and 8 do there, 9 does not.
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(64, 3, 64, 64), (1, 3, 400, 400), (3, 4, 256, 320), (30, 3, 224, 224)]
)
@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (9, 9)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_large_images_are_copied_without_seams(backend, shape, grid, layout):
    images = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    mask, index = random_mask(shape[0], *grid), random_index(shape[0], shape[0])
    expected = plain_graft(images, mask, index)
    assert torch.equal(graft(in_layout(images, layout), mask, index, backend=backend), expected)
    out = in_layout(torch.full_like(images, -1), layout)
    graft(images, mask, index, out=out, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("augmentations", [1, 3])
def test_gradients_go_to_the_image_that_a_pixel_came_from(backend, dtype, layout, augmentations):
    rows = 4 * augmentations
    mask, index = random_mask(rows, 3, 4), random_index(rows, 4)
    images = torch.randn(4, 3, 9, 10, dtype=dtype, requires_grad=True)
    weight = in_layout(torch.randn(rows, 3, 9, 10, dtype=dtype), layout)
    grafted = graft(images, mask, index, backend=backend)
    (grad,) = torch.autograd.grad(grafted, images, weight)

    exact = images.detach().double().requires_grad_()
    plain = plain_graft(exact, mask, index)
    (expected,) = torch.autograd.grad(plain, exact, weight.double())
    eps = torch.finfo(dtype).eps
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=8 * eps)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradients_keep_the_memory_format(backend, layout):
    images = in_layout(torch.randn(4, 3, 8, 8), layout).requires_grad_()
    grafted = graft(images, random_mask(4, 2, 2), torch.tensor([1, 0, 3, 2]), backend=backend)
    weight = in_layout(torch.randn(4, 3, 8, 8), layout)
    (grad,) = torch.autograd.grad(grafted, images, weight)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert grad.is_contiguous(memory_format=memory_format)


def test_gradients_of_a_repeated_index_add_up(backend):
    images = torch.randn(4, 1, 2, 2, requires_grad=True)
    mask = torch.zeros(4, 1, 1, dtype=torch.bool)
    grafted = graft(images, mask, torch.tensor([2, 2, 2, 0]), backend=backend)
    (grad,) = torch.autograd.grad(grafted.sum(), images)
    assert grad[:, 0, 0, 0].tolist() == [1.0, 0.0, 3.0, 0.0]


@pytest.mark.slow
def test_half_precision_gradients_are_summed_in_float32(backend):
    images = torch.zeros(2, 1, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    mask, index = torch.zeros(600, 1, 1, dtype=torch.bool), (torch.arange(600) >= 512).long()
    grafted = graft(images, mask, index, backend=backend)
    (grad,) = torch.autograd.grad(grafted, images, torch.ones_like(grafted))
    assert (grad[0] == 512).all()
    assert (grad[1] == 88).all()


def test_complex_images_have_gradients(backend):
    images = torch.randn(3, 2, 4, 4, dtype=torch.complex64, requires_grad=True)
    mask, index = random_mask(3, 2, 2), torch.tensor([1, 1, 0])
    weight = torch.randn(3, 2, 4, 4, dtype=torch.complex64)
    grafted = graft(images, mask, index, backend=backend)
    (grad,) = torch.autograd.grad(grafted, images, weight)
    (expected,) = torch.autograd.grad(plain_graft(images, mask, index), images, weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(backend, check):
    images = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    mask, index = random_mask(4, 2, 2), torch.tensor([1, 1, 0, 1])
    assert check(lambda images: graft(images, mask, index, backend=backend), (images,))


def test_gradients_of_segmentation_maps(backend):
    maps = torch.randn(3, 4, 4, requires_grad=True)
    mask, index = random_mask(3, 2, 2), torch.tensor([1, 1, 0])
    (grad,) = torch.autograd.grad(graft(maps, mask, index, backend=backend).sum(), maps)
    plain = plain_graft(maps[:, None], mask, index)
    (expected,) = torch.autograd.grad(plain.sum(), maps)
    torch.testing.assert_close(grad, expected)


SIDES_OF_ONE = {
    "a transposed matrix": lambda: torch.randn(2, 20, 4).mT[..., None],
    "strides without meaning": lambda: torch.randn(5000).as_strided((2, 3, 8, 1), (24, 8, 1, 1000)),
    "one channel": lambda: torch.randn(2, 1, 4, 4).contiguous(memory_format=torch.channels_last),
    "one channel, channels_last": lambda: torch.empty(
        2, 1, 4, 4, memory_format=torch.channels_last
    ).fill_(1.0),
    "one pixel": lambda: torch.randn(2, 5, 1, 1),
    "one pixel, channels_last": lambda: torch.empty(
        2, 5, 1, 1, memory_format=torch.channels_last
    ).fill_(1.0),
    "swapped sides": lambda: torch.randn(2, 4, 5, 3).permute(0, 3, 2, 1),
    "no images": lambda: torch.empty(0, 3, 4, 4, memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", SIDES_OF_ONE)
def test_the_memory_format_is_the_one_that_torch_suggests(backend, kind):
    images = SIDES_OF_ONE[kind]()
    batch = len(images)
    mask, index = torch.ones(batch, 1, 1, dtype=torch.bool), torch.arange(batch)
    suggested = torch._prims_common.suggest_memory_format(images)
    expected = torch.empty(images.shape, memory_format=suggested).stride()
    assert graft(images, mask, index, backend=backend).stride() == expected
    operator = ops.overload("graft", backend)
    torch.library.opcheck(operator, (images, mask, index), test_utils="test_faketensor")
