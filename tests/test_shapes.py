"""Images of five dimensions and more: what stands between C and H shares the mask."""

import pytest
import torch
import truth
from conftest import assert_fulfils_contract, assert_same_bits, random_bits
from test_graft import random_index, random_mask

from sg_kernels import SaliencyGraft, graft, ops, saliency_graft, shapes
from sg_kernels.backends import reference
from sg_kernels.call import NORM, NORMALIZE, Call

LAST = torch.channels_last_3d


def sliced(video):
    """Without the frames before, behind and beside it."""
    b, c, d, h, w = video.shape
    return video.new_zeros(b + 1, c + 2, d + 1, h + 3, w + 2)[1:, 1:-1, 1:, 1:-2, 2:].copy_(video)


def sliced_last(video):
    b, c, d, h, w = video.shape
    around = video.new_zeros(b, c + 1, d, h + 1, w).contiguous(memory_format=LAST)
    return around[:, 1:, :, :h].copy_(video)


LAYOUTS = {
    "contiguous": lambda video: video.contiguous(),
    "channels_last_3d": lambda video: video.contiguous(memory_format=LAST),
    "frames before channels": lambda video: video.transpose(1, 2).contiguous().transpose(1, 2),
    "channels and frames last": lambda video: (
        video.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    ),
    "sliced": sliced,
    "sliced channels_last_3d": sliced_last,
    "transposed": lambda video: video.mT.contiguous().mT,
    "expanded": lambda video: video[:, :1].expand(video.shape),
}
LAST_LAYOUTS = "channels_last_3d", "sliced channels_last_3d"
SHAPES = [(4, 3, 5, 8, 6), (3, 1, 2, 9, 7), (2, 4, 1, 7, 16), (2, 2, 3, 33, 31), (3, 5, 2, 1, 9)]


def format_of(layout):
    return LAST if layout in LAST_LAYOUTS else torch.contiguous_format


def grid_of(shape):
    return min(4, shape[-2]), min(3, shape[-1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_of_every_dtype_and_layout_is_copied(backend, dtype, layout, poisoned):
    video = LAYOUTS[layout](random_bits((3, 3, 2, 9, 8), dtype))
    mask, index = random_mask(6, 4, 3), random_index(6, 3)
    grafted = graft(video, mask, index, backend=backend)
    assert_same_bits(grafted, truth.graft(video, mask, index))
    assert grafted.is_contiguous(memory_format=format_of(layout))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_call_grafts_every_frame_alike(backend, shape, layout, dtype):
    video = LAYOUTS[layout](random_bits(shape, dtype))
    features = torch.rand(shape[0], 7, 5, 5)
    options = {"grid_size": grid_of(shape), "augmentations": 2, "seed": 3}
    result = saliency_graft(video, features, backend=backend, **options)
    options.pop("seed")
    assert_fulfils_contract(result, video, 3, features=features, **options)
    assert result.images.is_contiguous(memory_format=format_of(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_third_launch_grafts_every_frame_alike(backend, layout):
    video = LAYOUTS[layout](random_bits((2, 3, 2, 33, 32), torch.int16))
    features = torch.rand(2, 3, 33, 32)
    result = saliency_graft(video, features, seed=3, backend=backend)
    assert_same_bits(result.images, truth.graft(video, result.mask, result.index))


@pytest.mark.parametrize("layout", [*LAYOUTS][:-1])
@pytest.mark.parametrize("images_layout", ["contiguous", *LAST_LAYOUTS])
@pytest.mark.parametrize("whole", [False, True])
def test_out_takes_the_rows_and_nothing_beside_them(backend, layout, images_layout, whole):
    video = LAYOUTS[images_layout](random_bits((4, 3, 2, 9, 7), torch.float32))
    out = LAYOUTS[layout](torch.zeros(8, 3, 2, 9, 7))
    base = out if out._base is None else out._base
    base.fill_(77)
    if whole:
        result = saliency_graft(
            video, torch.rand(4, 5, 4, 3), augmentations=2, seed=3, out=out, backend=backend
        )
        written, mask, index = result.images, result.mask, result.index
    else:
        mask, index = random_mask(8, 4, 3), random_index(8, 4)
        written = graft(video, mask, index, out=out, backend=backend)
    assert written is out
    assert_same_bits(out, truth.graft(video, mask, index))
    out.fill_(77)
    assert (base == 77).all()


@pytest.mark.parametrize("shape", [(3, 2, 1, 2, 3, 8, 6), (2, 3, 4, 2, 5, 7)])
def test_more_dimensions_than_five(backend, shape):
    images, mask = random_bits(shape, torch.int32), random_mask(shape[0], 4, 3)
    index = random_index(shape[0], shape[0])
    for layout in (images, images.movedim(1, -1).contiguous().movedim(-1, 1)):
        grafted = graft(layout, mask, index, backend=backend)
        assert_same_bits(grafted, truth.graft(images, mask, index))
        assert grafted.stride() == layout.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 8, 6), (2, 0, 2, 8, 6), (2, 3, 0, 8, 6)])
def test_empty_videos_graft_to_empty_ones(backend, layout, shape):
    video = LAYOUTS[layout](torch.zeros(shape)).requires_grad_()
    batch = shape[0]
    grafted = graft(
        video, random_mask(batch, 2, 2), torch.zeros(batch, dtype=torch.long), backend=backend
    )
    assert grafted.shape == shape
    (grad,) = torch.autograd.grad(grafted.sum(), video)
    assert grad.shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_copy_is_made_of_the_two_formats_that_are_kept(layout, shape):
    video = LAYOUTS[layout](torch.zeros(shape))
    folded = shapes.fold(video)
    assert folded.images.data_ptr() == video.data_ptr()
    out = LAYOUTS[layout](torch.zeros(2 * shape[0], *shape[1:]))
    assert shapes.fold(video, out).out.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_go_to_the_image_that_a_pixel_came_from(backend, layout, dtype, whole):
    video = LAYOUTS[layout](torch.randn(4, 3, 2, 9, 10, dtype=dtype)).requires_grad_()
    weight = LAYOUTS[layout](torch.randn(8, 3, 2, 9, 10, dtype=dtype))
    if whole:
        features = torch.rand(4, 5, 3, 4)
        result = saliency_graft(video, features, augmentations=2, seed=3, backend=backend)
        grafted, mask, index = result.images, result.mask, result.index
    else:
        mask, index = random_mask(8, 3, 4), random_index(8, 4)
        grafted = graft(video, mask, index, backend=backend)
    (grad,) = torch.autograd.grad(grafted, video, weight)

    exact = video.detach().double().requires_grad_()
    up = mask[:, :, torch.arange(10) * 4 // 10][:, torch.arange(9) * 3 // 9][:, None, None]
    plain = torch.where(up, exact[torch.arange(8) % 4], exact[index])
    (expected,) = torch.autograd.grad(plain, exact, weight.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=8 * eps)
    assert grad.is_contiguous(memory_format=format_of(layout))


def test_the_module_takes_videos(backend):
    video, ids = LAYOUTS["channels_last_3d"](torch.randn(4, 3, 2, 8, 6)), torch.arange(4)
    features = torch.rand(4, 5, 4, 3)
    module = SaliencyGraft(num_classes=4, seed=1, prob=0.5, augmentations=2, backend=backend)
    for _ in range(8):
        mixed, _ = module(video, ids, features=features)
        expected = truth.graft(video, module.result.mask, module.result.index)
        assert_same_bits(mixed, expected)
    module.prob = 0.0
    assert module(video, ids)[0] is video
    layer = torch.nn.Conv3d(3, 5, (2, 1, 1))
    own_pass = SaliencyGraft(
        layer, network=layer, pass_scale=0.5, to_features=lambda f: f[:, :, 0], backend=backend
    )
    own_pass(video)
    assert own_pass.result.mask.shape == (4, 4, 3)


def test_a_draw_that_grafts_nothing_repeats_the_videos_in_their_format(backend):
    video = LAYOUTS["channels_last_3d"](torch.randn(4, 3, 2, 8, 6))
    network = torch.nn.Conv3d(3, 5, (2, 1, 1))
    module = SaliencyGraft(network, network=network, augmentations=2, prob=1e-9, backend=backend)
    mixed, _ = module(video)
    assert_same_bits(mixed, torch.cat([video, video]))
    assert mixed.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("wrong", [torch.zeros(4, 8), torch.zeros(4, 8, 8), torch.zeros(4)])
def test_fewer_dimensions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\) or \(B, C, ..., H, W\)"):
        saliency_graft(wrong, torch.rand(4, 5, 4, 3))


def call_of(images, depth):
    return Call(
        images=images,
        features=torch.rand(len(images), 5, 4, 3),
        seed=torch.tensor([5]),
        quantiles=None,
        keep_prob=0.7,
        grid_size=(4, 3),
        temperature=0.2,
        threshold=1 / 12,
        normalize=NORMALIZE.index("max"),
        norm=NORM.index("l1"),
        depth=depth,
    )


@pytest.mark.operators
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strided", [False, True])
def test_the_operator_takes_a_depth_in_every_layout(backend, channels, memory_format, strided):
    images = torch.randn(3, channels, 3 * 8, 12).contiguous(memory_format=memory_format)
    images = images[..., ::2] if strided else images[..., :6]
    call = call_of(images, 3)
    torch.library.opcheck(ops.overload("saliency_graft", backend), call)
    images, _, index, mask, *_ = ops.overload("saliency_graft", backend)(*call)
    assert not mask.all()
    assert_same_bits(images, truth.graft(call.images, mask.repeat(1, 3, 1), index))
    assert images.stride() == reference.empty_rows(call.images, 3).stride()


@pytest.mark.operators
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "sliced"])
def test_compiled_is_eager(backend, layout):
    torch.compiler.reset()

    def step(video, features, mask, index, out):
        result = saliency_graft(video, features, seed=3, backend=backend)
        grafted = graft(video, mask, index, backend=backend)
        graft(video, mask, index, out=out, backend=backend)
        return result.images, grafted, out

    mask, index = random_mask(4, 2, 3), random_index(4, 4)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames in (2, 3):
        video = LAYOUTS[layout](torch.randn(4, 3, frames, 8, 6))
        given = video, torch.rand(4, 5, 4, 3), mask, index
        results = [call(*given, torch.zeros_like(video)) for call in (compiled, step)]
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("standardize", [None, (100.0, 50.0)])
def test_a_given_mask_covers_every_frame(backend, layout, standardize):
    video = LAYOUTS[layout](random_bits((4, 3, 2, 9, 8), torch.uint8))
    mask = random_mask(8, 4, 3)
    options = {"mask": mask, "label": "area", "augmentations": 2, "standardize": standardize}
    result = saliency_graft(video, seed=3, backend=backend, **options)
    expected = truth.graft(video, mask, result.index)
    if standardize:
        expected = truth.standardize(expected, *standardize, torch.float32)
    assert_same_bits(result.images, expected)
