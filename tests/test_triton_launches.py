"""What the Triton backend launches: how many kernels, which, compiled how often. Needs no GPU."""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_rng import KNOWN_ANSWERS, hex_words
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sg_kernels import backends, rng
from sg_kernels.backends import reference
from sg_kernels.backends.triton import cells, launch, operators, philox, plan
from sg_kernels.backends.triton.copy import quotient
from sg_kernels.call import DTYPES, NORM, NORMALIZE, Call, Outputs

HOPPER = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132

needs_compiler = pytest.mark.skipif(backends.INTERPRETED, reason="nothing is compiled")
interpreted = pytest.mark.skipif(
    not backends.INTERPRETED, reason="no compiled kernel runs on the CPU"
)


@pytest.fixture
def launched(monkeypatch):
    """What is launched on a GPU of 132 multiprocessors, instead of launching it."""
    launches = []

    monkeypatch.setattr(operators, "launch", launches.append)
    monkeypatch.setattr(operators, "multiprocessors", lambda device: MULTIPROCESSORS)
    return launches


def meta(*shape, dtype=torch.float32, channels_last=False):
    """A tensor without values: reading one on the host fails."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def saliency_graft(images, **given):
    arguments = {
        "images": images,
        "features": meta(len(images), 64, 7, 7),
        "seed": meta(1, dtype=torch.int64),
        "step": meta(1, dtype=torch.int64),
        "quantiles": meta(1025, dtype=torch.int64),
        "keep_prob": 0.0,
        "grid_size": (7, 7),
        "temperature": 0.2,
        "normalize": NORMALIZE.index("max"),
        "threshold": 1 / 49,
        "norm": NORM.index("l1"),
    }
    return operators.saliency_graft(*Call(**arguments | given))


NO_MAP = {"features": None, "saliency": meta(8, 0, 0), "norm": NORM.index("area")}
OPTIONS = [
    {},
    {"grid_size": (4, 5)},
    {"grid_size": (14, 14)},
    {"quantiles": None},
    {"k": 5},
    {"threshold": 0.5},
    {"normalize": NORMALIZE.index("mean")},
    {"normalize": NORMALIZE.index("none")},
    *({"norm": NORM.index(norm)} for norm in ("l2", "l2sq", "area")),
    {"augmentations": 3},
    {"no_fixed_points": True},
    {"index": meta(8, dtype=torch.int64)},
    {"prob": 0.5},
    {"targets": meta(8, dtype=torch.int64), "num_classes": 5000, "label_smoothing": 0.1},
    {"targets": meta(8, 1000), "num_classes": 1000},
    {"features": None, "saliency": meta(8, 7, 7)},
    {"features": None, "saliency": meta(8, 224, 224)},
    {"features": meta(8, 64, 14, 14, dtype=torch.bfloat16, channels_last=True)},
    {"features": meta(8, 64, 9, 9)[:, :, 1:-1, 2:]},
    {"step": None},
    {"out": meta(8, 3, 64, 64)},
    {"mask": meta(8, 7, 7, dtype=torch.bool)},
    {"mask": meta(24, 14, 5, dtype=torch.bool), "grid_size": (14, 5), "augmentations": 3},
    {"mask": meta(8, 9, 9, dtype=torch.bool), "grid_size": (9, 9), **NO_MAP},
    {"affine": meta(2, 3), "dtype": DTYPES.index(torch.bfloat16)},
]


@pytest.mark.parametrize("given", OPTIONS, ids=lambda given: ",".join(given) or "plain")
@pytest.mark.parametrize("batch", [8])
def test_every_option_takes_two_launches_and_reads_nothing_on_the_host(launched, given, batch):
    saliency_graft(meta(batch, 3, 64, 64), **given)
    assert len(launched) == 2


def test_without_a_map_launch_1_only_draws_the_pairing(launched):
    given = {"mask": meta(8, 2, 2, dtype=torch.bool), "grid_size": (2, 2)}
    saliency_graft(meta(8, 3, 64, 64), **given, **NO_MAP)
    (_, programs, *_), _ = launched
    assert programs == (1, 1, 1)


@pytest.mark.parametrize(
    "given",
    [
        {"features": meta(8, 64, 56, 56), "grid_size": (3, 3)},  # each cell the sum of 400 values
        {"features": meta(8, 64, 56, 56), "grid_size": (56, 56)},  # 3136 cells
    ],
    ids=["large windows", "fine grid"],
)
def test_masks_that_are_costly_to_work_out_again_take_a_third_launch(launched, given):
    saliency_graft(meta(8, 3, 64, 64), **given)
    assert len(launched) == 3


def test_the_gradient_takes_one_launch(launched):
    grad, mask = meta(24, 3, 64, 64), meta(24, 7, 7, dtype=torch.bool)
    operators.graft_backward(grad, mask, meta(24, dtype=torch.int64), 3)
    assert len(launched) == 1


def odd_shapes():
    """Twenty-four batches that no two networks share."""
    sizes = [(3, 33, 31), (1, 28, 28), (3, 64, 48), (4, 17, 90), (3, 299, 299), (3, 224, 224)]
    maps = [(5, 3, 3), (640, 8, 8), (99, 7, 5), (2048, 7, 7)]
    for (channels, height, width), (k, h, w) in itertools.product(sizes, maps):
        yield (channels + k) % 61 + 1, (channels, height, width), (k, h, w)


def key(function, threads, arguments, constants):
    return function, threads, constants, tuple(memory is None for memory in arguments[0])


def keys(launched):
    return {
        key(function, threads, arguments, constants)
        for function, _, threads, arguments, constants in launched
    }


def test_few_kernels_are_compiled_for_many_shapes(launched):
    for batch, image, features in odd_shapes():
        grid = min(features[1], image[1]), min(features[2], image[2])
        saliency_graft(meta(batch, *image), features=meta(batch, *features), grid_size=grid)
    assert len(launched) == 48
    first = {key for key in keys(launched) if key[0] is operators.saliency_kernel}
    assert len(first) <= 4  # one for each map


@pytest.mark.parametrize(
    ("image", "features"),
    [((3, 32, 32), (640, 8, 8)), ((3, 224, 224), (2048, 7, 7)), ((3, 224, 224), (768, 14, 14))],
)
def test_few_kernels_are_compiled_for_all_batches_of_a_network(launched, image, features):
    for batch in range(1, 513):
        saliency_graft(meta(batch, *image), features=meta(batch, *features), grid_size=features[1:])
    first = {key for key in keys(launched) if key[0] is operators.saliency_kernel}
    assert len(first) == 1
    assert len(keys(launched) - first) <= 5  # one for each number of splits


@needs_compiler
def test_what_is_compiled_depends_on_the_key_alone(launched):
    """Not on sizes of 1 and 16, addresses or the dtype of images."""
    seen = {}
    for batch, side, dtype, offset in itertools.product(
        (1, 2, 16, 33), (16, 32, 48), (torch.uint8, torch.float32), (0, 1)
    ):
        launched.clear()
        memory = torch.empty(batch * 3 * side * side + offset, dtype=dtype)
        images = memory[offset:].view(batch, 3, side, side)
        features = torch.empty(batch * 16 * 8 * 8 + offset)[offset:].view(batch, 16, 8, 8)
        saliency_graft(
            images,
            features=features,
            seed=torch.zeros(1, dtype=torch.int64),
            step=torch.zeros(1, dtype=torch.int64),
            quantiles=torch.zeros(1025, dtype=torch.int64),
            grid_size=(8, 8),
            targets=torch.zeros(batch, dtype=torch.int64),
            num_classes=batch,
        )
        for function, _, threads, arguments, constants in launched:
            source = launch.source(function, arguments, constants).hash()
            assert seen.setdefault(key(function, threads, arguments, constants), source) == source


@needs_compiler
@pytest.mark.parametrize("seed", [-(2**63), 1, 2**63 - 1])
def test_every_number_fits_the_type_that_its_group_declares(launched, seed):
    images = torch.empty(1, device="meta").as_strided((2, 3, 8, 8), (2**40, 2**26, 2**23, 1))
    options = {"keep_prob": 1.0, "prob": 1.0, "quantiles": None, "k": 49, "rank": 2**31 - 1}
    saliency_graft(images, seed=torch.tensor([seed]), augmentations=3, **options)
    operators.graft(images, meta(2, 7, 7, dtype=torch.bool), meta(2, dtype=torch.int64))
    assert len(launched) == 3
    checked = 0
    for function, _, _, arguments, constants in launched:
        signature = launch.source(function, arguments, constants).signature
        for kind, number in flat(tuple(signature.values()), arguments):
            if kind in ("i32", "i64"):
                bits = int(kind[1:])
                assert -(2 ** (bits - 1)) <= number < 2 ** (bits - 1)
                checked += 1
            assert (kind == "constexpr") == (number is None)
            assert (kind[0] == "*") == isinstance(number, torch.Tensor)
    assert checked > 60


def flat(signature, arguments):
    for kind, argument in zip(signature, arguments):
        if isinstance(argument, tuple):
            yield from flat(kind, argument)
        else:
            yield kind, argument


def test_launch_1_has_as_many_programs_for_small_batches_as_for_large(launched):
    programs = {}
    for batch in (32, 64, 128, 256, 512):
        launched.clear()
        operators.channel_saliency(meta(batch, 2048, 7, 7, dtype=torch.bfloat16))
        programs[batch] = math.prod(launched[0][1])
    assert min(programs.values()) >= plan.PROGRAMS_1 * MULTIPROCESSORS / 2


def test_partial_sums_stay_small(launched):
    for batch, k, side in itertools.product((1, 7, 64, 513), (64, 768, 2048), (1, 7, 8, 14, 32)):
        launched.clear()
        operators.channel_saliency(meta(batch, k, side, side))
        memory, *_ = launched[0][3]
        assert memory.partials.nbytes <= max(1 << 20, batch * side * side * 4)


def test_the_masks_worked_out_again_stay_few(launched):
    for batch in (1, 32, 256, 4096):
        launched.clear()
        saliency_graft(meta(batch, 3, 224, 224), features=meta(batch, 2048, 7, 7))
        assert math.prod(launched[1][1]) <= max(
            batch, plan.PROGRAMS_2 * MULTIPROCESSORS + 2 * batch
        )


@pytest.mark.parametrize("batch", [1, 256, 1024, 4096])
def test_who_writes_a_label_copies_nothing_where_others_can(launched, batch):
    saliency_graft(meta(batch, 3, 224, 224), features=meta(batch, 2048, 7, 7))
    _, programs, _, (_, rows, *_), _ = launched[1]
    shared = batch < plan.PROGRAMS_2 * MULTIPROCESSORS
    assert programs == (batch, 1, rows.parts + 1 if shared else 1)


def test_what_is_too_large_runs_on_the_reference(launched, monkeypatch):
    images, mask = torch.rand(4, 3, 8, 8), torch.rand(4, 2, 2) < 0.5
    index = torch.tensor([1, 2, 3, 0])
    expected = reference.graft(images, mask, index)
    gradient = reference.graft_backward(images, mask, index, 1)
    for name in ("tile", "saliency_graft"):
        monkeypatch.setattr(plan, name, lambda *_: None)
    assert torch.equal(operators.graft(images, mask, index), expected)
    assert torch.equal(operators.graft_backward(images, mask, index, 1), gradient)
    given = {
        "features": images,
        "seed": torch.tensor([1]),
        "step": None,
        "quantiles": rng.beta_quantiles(1.0),
        "grid_size": (2, 2),
    }
    whole = saliency_graft(images, **given)
    expected = reference.graft(images, whole.mask, whole.index)
    assert torch.equal(whole.images, expected)
    out = torch.empty_like(images)
    assert saliency_graft(images, **given, out=out).images.shape == (0,)
    assert torch.equal(out, expected)
    assert launched == []


@pytest.mark.parametrize(
    ("given", "reads"),
    [
        ({"grid_size": (65, 64)}, False),
        ({"grid_size": (64, 64)}, True),
        ({"features": meta(8, 1, 2**15, 2**15 + 1)}, False),
    ],
)
def test_what_is_too_large_has_no_plan(given, reads, launched, monkeypatch):
    ran = []
    monkeypatch.setattr(
        reference, "saliency_graft", lambda _: ran.append(True) or Outputs(*[meta(1)] * 6)
    )
    saliency_graft(meta(8, 3, 128, 128), **given)
    assert bool(launched) is reads
    assert bool(ran) is not reads


def test_maps_that_32_bits_do_not_count_are_summed_by_the_reference(launched):
    for size, grid in (((2**15, 2**15 + 1), (1, 1)), ((2**25, 1), (64, 1)), ((1, 2**25), (1, 64))):
        assert plan.map_too_large(size, grid)
    assert not plan.map_too_large((2**15, 2**15), (64, 64))
    assert plan.map_too_large((7, 7), (65, 64))
    operators.channel_saliency(meta(1, 1, 2**15, 2**15 + 1))
    assert launched == []


@interpreted
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, output):
    low, high = hex_words(key)
    seed = torch.tensor(np.uint64(low | high << 32).astype(np.int64))
    words = torch.empty(4, dtype=torch.int64)
    store_words[(1,)](words, seed, *hex_words(counter))
    assert tuple(words.tolist()) == hex_words(output)


@triton.jit
def store_words(out, seed, block, row, draw, stream):
    w0, w1, w2, w3 = philox.words(block, row, draw, stream, tl.load(seed))
    tl.store(out + 0, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


@needs_compiler
@pytest.mark.parametrize(("norm", "divisions"), [("area", 1), ("l1", 4)])
def test_lam_is_divided_as_ieee_has_it(norm, divisions):
    """Approximate division would leave lam below 1 for a mask that keeps everything."""
    signature = {"lam": "*fp32", "own": "*fp32", "mask": "*i1", "NORM": "constexpr"}
    source = ASTSource(store_label_ratio, signature, constexprs={"NORM": norm})
    options = launch.options_of(store_label_ratio, 32, (norm,), HOPPER.warp_size)
    ptx = triton.compile(source, target=HOPPER, options=options).asm["ptx"]
    assert ptx.count("div.rn.f32") == divisions


@triton.jit
def store_label_ratio(lam, own, mask, NORM: tl.constexpr):
    cell = tl.arange(0, 32)
    grid, count = tl.load(own + cell), tl.full([], 32, tl.int32)
    tl.store(lam, cells.label_ratio(grid, grid, tl.load(mask + cell), cell < count, count, NORM))


@interpreted
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 224, 641, 2**16, 2**30 + 1, 2**31 - 1])
def test_a_quotient_is_exact_below_2_to_the_31(divisor):
    most = (2**31 - 1) // divisor * divisor
    numerators = [0, 1, divisor - 1, divisor, most - 1, most, 2**31 - 2, 2**31 - 1]
    out = torch.empty(8, dtype=torch.int32)
    numerator = torch.tensor(numerators, dtype=torch.int32)
    store_quotients[(1,)](out, numerator, plan.reciprocal(divisor))
    assert out.tolist() == [n // divisor for n in numerators]


@triton.jit
def store_quotients(out, numerator, reciprocal):
    place = tl.arange(0, 8)
    tl.store(out + place, quotient(tl.load(numerator + place), reciprocal))
