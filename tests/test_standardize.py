"""Images that come out standardised: equal to the bit on every backend, on every path."""

import copy

import numpy as np
import pytest
import torch
import truth
from conftest import LAYOUTS, assert_same_bits, in_layout, operator_call, random_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sg_kernels import SaliencyGraft, backends, ops, saliency_graft
from sg_kernels.backends import reference
from sg_kernels.call import DTYPES
from sg_kernels.checks import STANDARDIZED_DTYPES

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PER_CHANNEL = {1: (33.3, 78.6), 3: (MEAN, STD), 4: ((1.5, 0.0, -20, 7e-3), (0.7, 255, 3, 11.1))}
PAIRS = [(given, dtype) for given in STANDARDIZED_DTYPES for dtype in DTYPES]


def standardized(images, given, dtype, backend):
    """The truth; in Triton's interpreter, which cuts bfloat16 off, cut off."""
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        exact = truth.standardize(images, *given, torch.float32)
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return truth.standardize(images, *given, dtype)


def pixels(shape, dtype, seed=0):
    """Bytes, or numbers of every size."""
    if dtype == torch.uint8:
        return random_bits(shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 90).to(dtype)


def grafted(images, result):
    return truth.graft(images, result.mask, result.index)


def assert_standardized(result, images, given, dtype, backend):
    expected = standardized(grafted(images, result), given, dtype, backend)
    assert_same_bits(result.images, expected)


@pytest.mark.parametrize(("given", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", PER_CHANNEL)
def test_every_dtype_and_layout(backend, given, dtype, layout, channels, poisoned):
    images = in_layout(pixels((3, channels, 11, 10), given), layout)
    options = {"standardize": PER_CHANNEL[channels], "dtype": dtype, "seed": 3}
    result = saliency_graft(images, torch.rand(3, 6, 5, 4), backend=backend, **options)
    assert_standardized(result, images, PER_CHANNEL[channels], dtype, backend)
    channels_last = layout in ("channels_last", "sliced_channels_last")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert result.images.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((32, 32), (8, 8)),
        ((224, 224), (7, 7)),
        ((33, 31), (7, 5)),
        ((1, 50), (1, 49)),
        ((9, 7), (9, 7)),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("given", "dtype"), [(torch.uint8, torch.bfloat16), (torch.float32, torch.float16)], ids=str
)
def test_every_size(backend, size, grid, layout, given, dtype):
    images = in_layout(pixels((2, 3, *size), given), layout)
    options = {"standardize": (MEAN, STD), "dtype": dtype, "seed": 3, "augmentations": 2}
    result = saliency_graft(images, saliency=torch.rand(2, *grid), backend=backend, **options)
    assert_standardized(result, images, (MEAN, STD), dtype, backend)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_third_launch(backend, layout, depth):
    images = in_layout(pixels((2, 3, depth * 33, 32), torch.uint8), layout).unflatten(
        2, (depth, -1)
    )
    options = {"standardize": (MEAN, STD), "dtype": torch.float16, "seed": 3}
    result = saliency_graft(images, torch.rand(2, 3, 33, 32), backend=backend, **options)
    assert_standardized(result, images, (MEAN, STD), torch.float16, backend)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("given", [(MEAN, STD), (100, 50.0)], ids=str)
def test_videos(backend, memory_format, given):
    images = pixels((3, 3, 2, 9, 8), torch.uint8).contiguous(memory_format=memory_format)
    options = {"standardize": given, "dtype": torch.bfloat16, "seed": 3}
    result = saliency_graft(images, torch.rand(3, 6, 5, 4), backend=backend, **options)
    assert_standardized(result, images, given, torch.bfloat16, backend)
    assert result.images.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(own, torch.float32 if own == torch.uint8 else own) for own in STANDARDIZED_DTYPES],
)
def test_the_default_dtype_is_the_images_own_if_floating(backend, given, expected):
    images = pixels((2, 3, 8, 6), given)
    result = saliency_graft(
        images, torch.rand(2, 5, 4, 3), standardize=(MEAN, STD), seed=3, backend=backend
    )
    assert_standardized(result, images, (MEAN, STD), expected, backend)


def test_every_byte_of_every_dtype(backend):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for dtype in DTYPES:
        options = {"standardize": (MEAN, STD), "dtype": dtype, "index": torch.tensor([0])}
        result = saliency_graft(images, torch.rand(1, 5, 4, 4), backend=backend, **options)
        expected = standardized(images, (MEAN, STD), dtype, backend)
        assert_same_bits(result.images, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_overflows_is_infinite_and_nan_stays_nan(backend, dtype):
    images = torch.tensor([65000.0, -65000, torch.nan, torch.inf, 3e38, 1e-41, -0.0, 0.0])
    images = images.view(1, 1, 1, 8).expand(2, 1, 4, 8).contiguous()
    given = 0.0, 1e-3
    options = {"standardize": given, "dtype": dtype, "seed": 3, "backend": backend}
    images_out = saliency_graft(images, torch.rand(2, 5, 4, 4), **options).images
    np.testing.assert_array_equal(images_out, truth.standardize(images, *given, dtype))


def test_numbers_and_sequences_mean_the_same(backend):
    images, features = pixels((2, 3, 8, 6), torch.uint8), torch.rand(2, 5, 4, 3)
    results = [
        saliency_graft(images, features, standardize=given, seed=3, backend=backend).images
        for given in ((100, 50), ([100.0] * 3, 50.0), (np.float64(100), [50] * 3), [100, (50.0,)])
    ]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("images_layout", ["nchw", "channels_last"])
def test_out_takes_the_rows_and_nothing_beside_them(backend, layout, images_layout):
    images = in_layout(pixels((4, 3, 9, 8), torch.uint8), images_layout)
    out = in_layout(torch.zeros(8, 3, 9, 8, dtype=torch.float16), layout)
    base = out if out._base is None else out._base
    base.fill_(77)
    options = {"standardize": (MEAN, STD), "dtype": torch.float16, "augmentations": 2, "seed": 3}
    result = saliency_graft(images, torch.rand(4, 5, 4, 3), out=out, backend=backend, **options)
    assert result.images is out
    assert_standardized(result, images, (MEAN, STD), torch.float16, backend)
    out.fill_(77)
    assert (base == 77).all()


@pytest.mark.parametrize(
    ("given", "dtype"), [(g, d) for g, d in PAIRS if g != torch.uint8], ids=str
)
@pytest.mark.parametrize("shape", [(4, 3, 9, 10), (4, 3, 2, 9, 10)])
def test_gradients_are_those_of_the_pixels_times_the_scale(backend, given, dtype, shape):
    images = torch.randn(shape).to(given).requires_grad_()
    options = {"standardize": ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), "augmentations": 2, "seed": 3}
    result = saliency_graft(images, torch.rand(4, 5, 3, 4), dtype=dtype, backend=backend, **options)
    weight = torch.randn(result.images.shape).to(dtype)
    (grad,) = torch.autograd.grad(result.images, images, weight)
    assert grad.dtype == given

    exact = images.detach().double().requires_grad_()
    up = result.mask[:, :, torch.arange(10) * 4 // 10][:, torch.arange(9) * 3 // 9]
    up = up.view(8, 1, *[1] * (len(shape) - 4), 9, 10)
    plain = torch.where(up, exact[torch.arange(8) % 4], exact[result.index])
    scale = 1 / torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64)
    plain = plain * scale.view(3, *[1] * (len(shape) - 2))
    (expected,) = torch.autograd.grad(plain, exact, weight.double())
    eps = torch.finfo(given).eps
    torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=2e-6)


def test_gradients_of_gradients(backend):
    images, features = torch.randn(2, 1, 4, 4, requires_grad=True), torch.rand(2, 5, 2, 2)
    options = {"standardize": (0.5, 0.25), "seed": 1, "backend": backend}
    mixed = saliency_graft(images, features, **options).images
    (first,) = torch.autograd.grad((mixed**3).sum() / 3, images, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), images)
    # The second derivative of a pixel is the sum of 2 * mixed * scale**2 over where it went.
    assert second.sum().item() == pytest.approx((2 * mixed * 16).sum().item(), rel=1e-5)


REFUSED = [
    ("dtype must be", {"standardize": (0.0, 1.0), "dtype": torch.float64}),
    ("standardize must have one mean and std", {"standardize": ((1.0, 2.0), 1.0)}),
    (r"dtype goes with standardize", {"dtype": torch.float32}),
    ("standardize takes", {"standardize": (0, 1), "images": torch.zeros(2, 3, 8, 6).double()}),
    ("standardize takes", {"standardize": (0, 1), "images": torch.zeros(2, 3, 8, 6).int()}),
    ("out", {"standardize": (0, 1), "out": torch.zeros(2, 3, 8, 6, dtype=torch.uint8)}),
]


@pytest.mark.parametrize(("match", "change"), REFUSED)
def test_what_is_refused_says_so_and_spends_nothing(match, change):
    given = {"images": torch.zeros(2, 3, 8, 6, dtype=torch.uint8), **change}
    features = torch.rand(2, 5, 4, 3)
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=match):
        saliency_graft(features=features, **given)
    assert torch.equal(torch.get_rng_state(), before)


class Net(nn.Module):
    """Keeps the images of each pass."""

    def __init__(self):
        super().__init__()
        self.body, self.seen = nn.Conv2d(3, 6, 4, 4), []

    def forward(self, images):
        self.seen.append(images)
        return self.body(images).mean((2, 3))


def module(backend, **more):
    options = {"standardize": (MEAN, STD), "dtype": torch.float32, "seed": 1, "num_classes": 6}
    return SaliencyGraft(**{**options, "backend": backend, **more})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_module_standardises_on_every_path(backend, dtype):
    images, ids = pixels((4, 3, 16, 16), torch.uint8), torch.arange(4)
    features = torch.rand(4, 5, 4, 4)
    clean = truth.standardize(images, MEAN, STD, dtype)
    graft = module(backend, dtype=dtype)
    mixed, _ = graft(images, ids, features=features)
    assert_standardized(graft.result, images, (MEAN, STD), dtype, backend)
    assert mixed.dtype == dtype
    assert_same_bits(graft.standardize(images), clean)
    graft.prob = 0.0
    assert_same_bits(graft(images, ids)[0], clean)
    graft.prob = 1.0
    assert_same_bits(graft.eval()(images, ids)[0], clean)
    assert_same_bits(module(backend, dtype=dtype, warmup_epochs=1)(images, ids)[0], clean)


def test_the_clean_pass_and_a_coin_that_says_no(backend):
    images, net = pixels((4, 3, 16, 16), torch.uint8), Net()
    graft = module(backend, layer="body", network=net, prob=0.5, augmentations=2)
    clean = truth.standardize(images, MEAN, STD, torch.float32)
    unmixed = 0
    for _ in range(12):
        needed = graft.needs_pass()
        mixed, _ = graft(images, torch.arange(4))
        if needed:
            assert_same_bits(net.seen.pop(), clean)
            assert_standardized(graft.result, images, (MEAN, STD), torch.float32, backend)
        else:
            assert_same_bits(mixed, torch.cat([clean, clean]))
            unmixed += 1
    assert net.seen == []
    assert 0 < unmixed < 12


def test_a_scaled_pass_takes_bytes(backend):
    images, net = pixels((4, 3, 16, 16), torch.uint8), Net()
    graft = module(backend, layer="body", network=net, pass_scale=0.5)
    graft(images, torch.arange(4))
    clean = truth.standardize(images, MEAN, STD, torch.float32)
    torch.testing.assert_close(net.seen[0], nn.functional.avg_pool2d(clean, 2))


def test_half_to_empty_and_copies_leave_the_scale_as_it_is(backend):
    images, features = pixels((4, 3, 16, 16), torch.uint8), torch.rand(4, 5, 4, 4)
    expected = module(backend)(images, features=features)[0]
    empty = module(backend).to("meta").to_empty(device="cpu")
    empty.reset_parameters()
    for other in (module(backend).half(), copy.deepcopy(module(backend)), empty):
        assert_same_bits(other(images, features=features)[0], expected)
    assert set(module(backend).state_dict()) == {"seed", "step"}


def test_the_module_has_its_scale_on_the_device_for_any_channels(backend, monkeypatch):
    monkeypatch.setattr(ops, "affine", None)  # which a captured call could not copy to a GPU
    images, features = pixels((4, 3, 16, 16), torch.uint8), torch.rand(4, 5, 4, 4)
    graft = module(backend, standardize=(3.0, 2.0))
    graft(images, features=features)
    assert_standardized(graft.result, images, (3.0, 2.0), torch.float32, backend)


def test_without_standardize_the_module_returns_what_it_is_given(backend):
    images = pixels((4, 3, 8, 8), torch.uint8)
    graft = SaliencyGraft(num_classes=3, backend=backend)
    assert graft.standardize(images) is images
    assert graft.eval()(images)[0] is images


def call_of(images, dtype, **more):
    given = {
        "features": torch.rand(len(images), 5, 4, 3),
        "affine": reference.affine(MEAN, STD, 3),
        "dtype": DTYPES.index(dtype),
    }
    return operator_call(images=images, **given | more)


@pytest.mark.operators
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("given", "dtype"), [(torch.uint8, torch.bfloat16), (torch.float32, torch.float32)], ids=str
)
@pytest.mark.parametrize("out", [False, True])
def test_opcheck(backend, memory_format, given, dtype, out):
    images = pixels((4, 3, 8, 6), given).contiguous(memory_format=memory_format)
    more = {"out": torch.empty(4, 3, 8, 6, dtype=dtype)} if out else {}
    operator = ops.overload("saliency_graft", backend)
    torch.library.opcheck(operator, call_of(images, dtype, **more))


@pytest.mark.operators
def test_opcheck_affine():
    given = [1.0, 2.0], [3.0, 4.0], 6, torch.device("cpu")
    torch.library.opcheck(torch.ops.sg_kernels.affine.default, given)
    _, shift = torch.ops.sg_kernels.affine(*given).tolist()
    assert shift == pytest.approx([-1 / 3] * 3 + [-0.5] * 3)


@pytest.mark.operators
@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
@pytest.mark.parametrize("whole", ["function", "module", "eval"])
def test_compiled_with_dynamic_shapes_is_eager_and_compiles_once(backend, given, whole):
    torch.compiler.reset()
    ops._tables.clear()
    graft = module(backend)
    if whole == "eval":
        graft.eval()

    def step(images, features):
        if whole == "function":
            options = {"standardize": (MEAN, STD), "dtype": torch.bfloat16}
            return saliency_graft(images, features, seed=3, backend=backend, **options).images
        return graft(images, features=features)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch, side in ((5, 16), (3, 24), (6, 20)):
        images, features = pixels((batch, 3, side, side), given), torch.rand(batch, 6, 4, 4)
        found = compiled(images, features)
        graft.step.sub_(int(graft.step > 0))
        assert_same_bits(found, step(images, features))
        frames.append(counter.frame_count)
    assert frames[1:] == frames[:-1]


@pytest.mark.operators
def test_compiled_gradients_are_eager(backend):
    torch.compiler.reset()
    features = torch.rand(4, 6, 4, 4)

    def step(images, out):
        options = {"standardize": (MEAN, STD), "dtype": torch.float16, "seed": 3}
        result = saliency_graft(images.detach(), features, out=out, backend=backend, **options)
        mixed = saliency_graft(images, features, backend=backend, **options).images
        return result.images.float().sum(), mixed.float().square().sum()

    grads = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        torch.manual_seed(0)
        images = torch.randn(4, 3, 8, 8, requires_grad=True)
        written, loss = call(images, torch.empty(4, 3, 8, 8, dtype=torch.float16))
        grads.append((written, *torch.autograd.grad(loss, images)))
    torch.testing.assert_close(*grads)


@pytest.mark.operators
def test_a_table_is_made_once_and_not_captured(monkeypatch):
    given = (0.25, 0.5), (0.125, 1.0), 2
    cpu = torch.device("cpu")
    assert ops.affine(*given, cpu) is ops.affine(*given, cpu)
    assert ops.affine(*given, cpu).tolist() == [[8.0, 1.0], [-2.0, -0.5]]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="standardize: the first call with such a value copies"):
        ops.affine(*given, torch.device("cuda"))
