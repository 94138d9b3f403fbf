"""The Triton backend's launches: how many, of what, compiled how often. No GPU is needed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_rng import KNOWN_ANSWERS, hex_words
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sg_kernels import backends, reference, rng
from sg_kernels.kernels import cells, launch, operators, philox, table
from sg_kernels.kernels.graft import quotient

HOPPER = GPUTarget("cuda", 90, 32)

needs_compiler = pytest.mark.skipif(backends.INTERPRETED, reason="interpreted kernels have no key")


@pytest.fixture
def launched(monkeypatch):
    """What is launched, instead of launching it."""
    launches = []

    def record(function, programs, threads, arguments, *constants):
        launches.append((function, programs, threads, arguments, constants))

    monkeypatch.setattr(operators, "launch", record)
    return launches


def meta(*shape, dtype=torch.float32, channels_last=False):
    """A tensor without values: whoever reads one on the host fails."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def saliency_graft(images, **given):
    batch = len(images)
    arguments = {
        "features": meta(batch, 64, 7, 7),
        "saliency": None,
        "index": None,
        "targets": None,
        "seed": meta(1, dtype=torch.int64),
        "step": meta(1, dtype=torch.int64),
        "rank": 0,
        "quantiles": meta(1025, dtype=torch.int64),
        "keep_prob": 0.0,
        "grid_size": (7, 7),
        "temperature": 0.2,
        "normalize": "max",
        "threshold": 1 / 49,
        "k": None,
        "norm": "l1",
        "prob": 1.0,
        "augmentations": 1,
        "no_fixed_points": False,
        "num_classes": 0,
        "label_smoothing": 0.0,
    } | given
    return operators.saliency_graft(images, *arguments.values())


OPTIONS = [
    {},
    {"grid_size": (4, 5)},
    {"grid_size": (14, 14)},
    {"quantiles": None},
    {"k": 5},
    {"threshold": 0.5},
    {"normalize": "mean"},
    {"normalize": "none"},
    *({"norm": norm} for norm in ("l2", "l2sq", "area")),
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
]


@pytest.mark.parametrize("given", OPTIONS, ids=lambda given: ",".join(given) or "plain")
@pytest.mark.parametrize("batch", [8])
def test_every_option_takes_two_launches_and_reads_nothing_on_the_host(launched, given, batch):
    saliency_graft(meta(batch, 3, 64, 64), **given)
    assert len(launched) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"features": meta(8, 64, 56, 56), "grid_size": (3, 3)},  # each cell the sum of 400 values
        {"features": meta(8, 64, 56, 56), "grid_size": (56, 56)},  # 3136 cells
    ],
    ids=["large windows", "fine grid"],
)
def test_what_would_cost_much_in_every_program_takes_a_third_launch(launched, given):
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


def keys(launched):
    return {
        (function, threads, constants, tuple(argument is None for argument in arguments))
        for function, _, threads, arguments, constants in launched
    }


def test_few_kernels_are_compiled_for_many_shapes(launched):
    for batch, image, features in odd_shapes():
        grid = min(features[1], image[1]), min(features[2], image[2])
        saliency_graft(meta(batch, *image), features=meta(batch, *features), grid_size=grid)
    assert len(launched) == 48
    first = {key for key in keys(launched) if key[0] is operators.saliency_kernel}
    assert len(first) <= 4  # one for each map
    assert len(keys(launched) - first) <= 16


@needs_compiler
def test_what_is_compiled_once_is_what_triton_would_compile_once(launched):
    """Triton's own key never differs where ours does not: sizes of 1 and 16, addresses, dtypes."""
    backend = make_backend(HOPPER)
    seen = {}
    for batch, side, dtype, offset in itertools.product(
        (1, 2, 16, 33), (16, 32, 48), (torch.uint8, torch.float32), (0, 1)
    ):
        launched.clear()
        memory = torch.empty(batch * 3 * side * side + offset, dtype=dtype)
        images = memory[offset:].view(batch, 3, side, side)
        features = torch.empty(batch * 16 * 8 * 8 + offset)[offset:].view(batch, 16, 8, 8)
        given = {
            "features": features,
            "seed": torch.zeros(1, dtype=torch.int64),
            "step": torch.zeros(1, dtype=torch.int64),
            "quantiles": torch.zeros(1025, dtype=torch.int64),
            "grid_size": (8, 8),
            "targets": torch.zeros(batch, dtype=torch.int64),
            "num_classes": batch,
        }
        saliency_graft(images, **given)
        for function, _, _, arguments, constants in launched:
            bind = create_function_from_signature(function.signature, function.params, backend)
            _, triton_key, _ = bind(*arguments, *constants, debug=False)
            absent = tuple(argument is None for argument in arguments)
            ours = function, constants, absent
            assert seen.setdefault(ours, str(triton_key)) == str(triton_key)


@needs_compiler
def test_a_second_launch_goes_straight_to_the_compiled_kernel(monkeypatch):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                calls.append((self, grid, arguments))
                return compiled

            return run

    kernel, compiled = Kernel(), Kernel()
    target = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: HOPPER))
    monkeypatch.setattr(triton.runtime, "driver", target)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compiled", {})
    for programs in (5, 6):
        launch.launch(kernel, programs, 128, (1, None), True)
    launch.launch(kernel, 5, 128, (1, 2), True)
    assert calls == [
        (kernel, (5,), (1, None, True)),
        (compiled, (6, 1, 1), (1, None, True)),
        (kernel, (5,), (1, 2, True)),
    ]


def test_launch_1_has_as_many_programs_for_small_batches_as_for_large(launched):
    programs = {}
    for batch in (32, 64, 128, 256, 512):
        launched.clear()
        operators.channel_saliency(meta(batch, 2048, 7, 7, dtype=torch.bfloat16))
        programs[batch] = launched[0][1]
    assert min(programs.values()) >= table.PROGRAMS_1 / 2


def test_partial_sums_stay_small(launched):
    for batch, k, side in itertools.product((1, 7, 64, 513), (64, 768, 2048), (1, 7, 8, 14, 32)):
        launched.clear()
        operators.channel_saliency(meta(batch, k, side, side))
        partials = launched[0][3][1]
        assert partials.nbytes <= max(1 << 20, batch * side * side * 4)


def test_the_masks_worked_out_again_stay_few(launched):
    for batch in (1, 32, 256, 4096):
        launched.clear()
        saliency_graft(meta(batch, 3, 224, 224), features=meta(batch, 2048, 7, 7))
        assert launched[1][1] <= max(batch, table.PROGRAMS_2 + batch)


@pytest.mark.parametrize("batch", [1, 256, 1024, 4096])
def test_who_writes_a_label_copies_nothing_where_others_can(launched, batch):
    saliency_graft(meta(batch, 3, 224, 224), features=meta(batch, 2048, 7, 7))
    function, programs, _, arguments, _ = launched[1]
    parts = dict(zip(function.arg_names, arguments))["parts"]
    assert programs == (batch * (parts + 1) if batch < table.PROGRAMS_2 else batch)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("address", [0, 1, 2, 4, 8, 24])
def test_a_chunk_begins_and_ends_on_its_own_multiples(itemsize, address):
    aligned = table.alignment(address * itemsize)
    for length in (1, 3, 6, 8, 20, 64):
        chunk = table.widest_chunk(itemsize, aligned, length)
        assert chunk <= max(16, itemsize)
        assert chunk == itemsize or (address * itemsize % chunk == length * itemsize % chunk == 0)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 13, 56])
def test_no_window_is_larger_than_its_bound(size):
    for grid in range(1, size + 1):
        windows = [-(-(g + 1) * size // grid) - g * size // grid for g in range(grid)]
        assert max(windows) <= table.window(size, grid)
    assert table.window(size, size + 1) == 1


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 1, 1, 2**16), (1, 2**15)),
        ((1, 1, 2**16, 1), (2**15, 1)),
        ((1, 5, 2**13, 2**13), (1, 1)),
    ],
)
def test_images_that_32_bits_do_not_count_have_no_tile(shape, grid):
    images = meta(*shape)
    assert operators._tile(images, images, grid) is None


def test_strides_that_32_bits_do_not_count_have_no_tile():
    images, strided = meta(1, 2, 8, 8), meta(1, 2, 2**15, 2**15)[:, :, :8, :8]
    assert operators._tile(images, images, (1, 1)) is not None
    assert operators._tile(strided, images, (1, 1)) is None
    assert operators._tile(images, strided, (1, 1)) is None
    largest = meta(1, 3, 2**13, 2**13)
    assert operators._tile(largest, largest, (64, 64)) is not None


def test_maps_that_32_bits_do_not_count_are_summed_by_the_reference(launched):
    for size, grid in (((2**15, 2**15 + 1), (1, 1)), ((2**25, 1), (64, 1)), ((1, 2**25), (1, 64))):
        assert table.map_too_large(size, grid)
    assert not table.map_too_large((2**15, 2**15), (64, 64))
    assert table.map_too_large((7, 7), (65, 64))
    operators.channel_saliency(meta(1, 1, 2**15, 2**15 + 1))
    assert launched == []


def test_what_is_too_large_runs_on_the_reference(launched, monkeypatch):
    images, mask = torch.rand(4, 3, 8, 8), torch.rand(4, 2, 2) < 0.5
    index = torch.tensor([1, 2, 3, 0])
    expected = reference.graft(images, mask, index)
    gradient = reference.graft_backward(images, mask, index, 1)
    for name in ("tile", "saliency_graft"):
        monkeypatch.setattr(table, name, lambda *_: None)
    assert torch.equal(operators.graft(images, mask, index), expected)
    assert torch.equal(operators.graft_backward(images, mask, index, 1), gradient)
    whole = saliency_graft(
        images,
        features=images,
        seed=torch.tensor([1]),
        step=None,
        **{"quantiles": rng.beta_quantiles(1.0), "grid_size": (2, 2)},
    )
    assert torch.equal(whole[0], reference.graft(images, whole[3], whole[2]))
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
        reference, "saliency_graft", lambda *_, **__: ran.append(True) or [meta(1)] * 6
    )
    saliency_graft(meta(8, 3, 128, 128), **given)
    assert bool(launched) is reads
    assert bool(ran) is not reads


@pytest.mark.skipif(not backends.INTERPRETED, reason="no compiled kernel runs on the CPU")
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
    """Approximate division would leave lam of a mask that keeps all short of 1."""
    signature = {"lam": "*fp32", "own": "*fp32", "mask": "*i1", "NORM": "constexpr"}
    source = ASTSource(store_label_ratio, signature, constexprs={"NORM": norm})
    ptx = triton.compile(source, target=HOPPER, options=launch.OPTIONS).asm["ptx"]
    assert ptx.count("div.rn.f32") == divisions


@triton.jit
def store_label_ratio(lam, own, mask, NORM: tl.constexpr):
    cell = tl.arange(0, 32)
    grid, count = tl.load(own + cell), tl.full([], 32, tl.int32)
    tl.store(lam, cells.label_ratio(grid, grid, tl.load(mask + cell), cell < count, count, NORM))


@pytest.mark.skipif(not backends.INTERPRETED, reason="no compiled kernel runs on the CPU")
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 224, 641, 2**16, 2**30 + 1, 2**31 - 1])
def test_a_quotient_is_exact_below_2_to_the_31(divisor):
    most = (2**31 - 1) // divisor * divisor
    numerators = [0, 1, divisor - 1, divisor, most - 1, most, 2**31 - 2, 2**31 - 1]
    out = torch.empty(8, dtype=torch.int32)
    numerator = torch.tensor(numerators, dtype=torch.int32)
    store_quotients[(1,)](out, numerator, table.reciprocal(divisor))
    assert out.tolist() == [n // divisor for n in numerators]


@triton.jit
def store_quotients(out, numerator, reciprocal):
    place = tl.arange(0, 8)
    tl.store(out + place, quotient(tl.load(numerator + place), reciprocal))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [1, 7, 224, 384, 1040, 5000])
def test_a_tile_of_any_width_holds_a_line_and_a_chunk(itemsize, channels_last, width):
    shape = (2, 3, 9, width)
    image = 27 * width
    strides = (image, 1, 3 * width, 3) if channels_last else (image, 9 * width, width, 1)
    for grid, whole, threads in itertools.product((1, 7, 9), (False, True), (32, 128, 1024)):
        tile = table.tile(
            2,
            shape,
            strides,
            strides,
            itemsize,
            16,
            (min(9, grid), min(width, grid)),
            whole,
            threads,
        )
        assert tile.lines >= 1
        assert tile.chunks >= 1
        line = 3 * width if tile.channels_last else width
        assert tile.chunk_count * tile.lanes * tile.unit_bytes == line * itemsize
        assert tile.tiles * tile.lines * tile.chunks >= tile.line_count * tile.chunk_count
        assert tile.lines * tile.chunks <= 1024 * 4


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_a_tile_leaves_as_few_lanes_idle_as_its_shortest_run_of_a_line_allows(chunk):
    assert table.chunks_across(84, 16, 128) == 32  # 1344 bytes, of 224 pixels in 3 channels
    for count in range(1, 600):
        most = min(triton.next_power_of_2(count), 256)
        found = table.chunks_across(count, chunk, most)
        powers = [2**bit for bit in range(9) if 2**bit <= most]
        allowed = [n for n in powers if n * chunk >= table.MIN_RUN] or [most]
        assert found in allowed
        assert -count % found == min(-count % n for n in allowed)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("cell", [1, 2, 4, 8, 12, 16])
def test_a_lane_is_the_most_of_a_chunk_that_lies_in_one_cell(itemsize, cell):
    shape, strides = (2, 3, 16, 16 * cell), (16 * 16 * cell * 3, 16 * 16 * cell, 16 * cell, 1)
    tile = table.tile(2, shape, strides, strides, itemsize, 16, (16, 16), False, 128)
    chunk, inside = 16, cell * itemsize & -(cell * itemsize)
    assert tile.lanes * tile.unit_bytes == chunk
    assert tile.uniform == (inside >= chunk)
    assert tile.unit_bytes == min(inside, 8)
    assert tile.step * itemsize == (chunk if tile.uniform else tile.unit_bytes)
