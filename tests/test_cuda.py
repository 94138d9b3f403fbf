"""csrc: CUDA's launches, counted in the emulation, and what both compiled libraries share."""

import ctypes
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from conftest import assert_same_bits, random_bits

import sg_kernels
from sg_kernels import backends
from sg_kernels.call import NORM, NORMALIZE, Call
from sg_kernels.ops import overload

# The compiled backends that take CPU tensors here.
COMPILED = [
    name
    for name in ("cpp", "cuda")
    if name in sg_kernels.available_backends() and "cpu" in backends.DEVICES[name]
]
EMULATION = os.environ.get("SG_KERNELS_EMULATION")
emulated = pytest.mark.skipif(not EMULATION, reason="the emulation counts launches")


def launches(call):
    """How many kernels ``call`` launches."""
    count = ctypes.CDLL(EMULATION).emulated_launches
    before = count()
    call()
    return count() - before


def saliency_graft(batch, grid_size=None, map_size=(4, 4), channels=6, **options):
    images = torch.rand(batch, 3, 16, 16)
    if options.pop("ready", False):
        options["saliency"] = torch.rand(batch, *map_size)
    else:
        options["features"] = torch.rand(batch, channels, *map_size)
    return sg_kernels.saliency_graft(images, backend="cuda", seed=1, grid_size=grid_size, **options)


@emulated
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 8},
        {"batch": 8, "k": 3, "selection": "topk"},
        {"batch": 8, "grid_size": (2, 3)},
        {"batch": 1, "grid_size": (2, 2), "map_size": (8, 8), "channels": 4096},
        {"batch": 8, "mask": torch.rand(8, 3, 3) < 0.5},
    ],
)
def test_a_small_batch_takes_one_launch(options):
    # The emulated device runs 12 blocks at once: 3 on each of 4 multiprocessors.
    assert launches(lambda: saliency_graft(**options)) == 1


@emulated
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 16},
        {"batch": 8, "augmentations": 2},
        {"batch": 16, "ready": True, "grid_size": (2, 2)},
        {"batch": 16, "targets": torch.arange(16), "num_classes": 16},
        {"batch": 16, "grid_size": (16, 16)},
        {"batch": 16, "grid_size": (4, 4), "map_size": (64, 64)},
        {"batch": 16, "mask": torch.rand(16, 16, 16) < 0.5},
        {"batch": 16, "ready": True, "mask": torch.rand(16, 3, 3) < 0.5},
    ],
)
def test_a_larger_batch_takes_two_launches(options):
    assert launches(lambda: saliency_graft(**options)) == 2


@emulated
@pytest.mark.parametrize(("batch", "expected"), [(8, 1), (16, 2)])
def test_a_mask_without_a_map_takes_no_more_launches(batch, expected):
    images, mask = torch.rand(batch, 3, 16, 16), torch.rand(batch, 5, 5) < 0.5
    options = {"label": "area", "seed": 1, "backend": "cuda"}
    assert launches(lambda: sg_kernels.saliency_graft(images, mask=mask, **options)) == expected


@emulated
@pytest.mark.filterwarnings("ignore:.*grid of one cell")
@pytest.mark.parametrize(
    ("grid_size", "map_size", "expected"),
    [
        # 32 threads share the values of a cell, at most 64 each.
        ((1, 1), (64, 32), 2),
        ((1, 1), (46, 45), 3),
        # 256 threads share 128 x 128 values, 64 each.
        ((8, 8), (128, 128), 2),
        ((8, 8), (129, 128), 3),
        ((16, 16), (200, 200), 3),
    ],
)
def test_more_values_than_threads_can_add_up_take_a_third_launch(grid_size, map_size, expected):
    assert launches(lambda: saliency_graft(16, grid_size, map_size, channels=1)) == expected


@emulated
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("map_size", [(7, 7), (40, 40)])
@pytest.mark.parametrize("augmentations", [1, 2])
def test_a_call_holds_8_bytes_a_cell_and_little_else(tmp_path, ready, map_size, augmentations):
    images, seed = torch.rand(2, 1, 40, 40), torch.tensor([1])
    shape = (2, *map_size) if ready else (2, 3, *map_size)
    options = {"saliency" if ready else "features": torch.rand(shape), "grid_size": (40, 40)}
    options |= {"augmentations": augmentations, "keep_prob": 0.5, "seed": seed, "backend": "cuda"}
    with torch.profiler.profile(profile_memory=True) as profile:
        result = sg_kernels.saliency_graft(images, **options)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = [event["args"] for event in events if event["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    kept = sum(output.nbytes for output in result if output is not None)
    peak = max(event["Total Allocated"] for event in memory) - before
    assert kept < peak <= kept + 8 * result.mask.numel() + 64


@emulated
def test_the_graft_and_its_gradient_take_one_launch_each():
    images = torch.rand(16, 3, 16, 16, requires_grad=True)
    mask, index = torch.rand(16, 4, 4) < 0.5, torch.randperm(16)
    grafted = []
    assert launches(lambda: grafted.append(overload("graft", "cuda")(images, mask, index))) == 1
    backward = overload("graft_backward", "cuda")
    assert launches(lambda: backward(grafted[0], mask, index, 1)) == 1


@emulated
@pytest.mark.parametrize("batch", [5, 20])
def test_splits_change_nothing_but_rounding(batch):
    features = torch.rand(batch, 512, 7, 7)
    saliency = overload("channel_saliency", "cuda")(features)
    torch.testing.assert_close(saliency, features.sum(1), rtol=1e-5, atol=0)
    whole = saliency_graft(batch, map_size=(7, 7), channels=512).saliency
    assert whole.shape == (batch, 7, 7)
    assert (whole > 100).all()


@emulated
def test_all_parts_of_a_row_use_the_same_mask():
    images, saliency = random_bits((3, 3, 64, 64), torch.float32), torch.rand(3, 16, 16)
    options = {"saliency": saliency, "keep_prob": 0.5, "seed": 1, "backend": "cuda"}
    result = sg_kernels.saliency_graft(images, **options)
    grafted = overload("graft", "reference")(images, result.mask, result.index)
    assert_same_bits(result.images, grafted)


@emulated
@pytest.mark.parametrize("width", [8, 15, 24, 32, 64])
@pytest.mark.parametrize("columns", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_cells_that_end_within_a_chunk(width, columns, dtype):
    images = random_bits((5, 2, 13, width), dtype)
    mask, index = torch.rand(5, 4, columns) < 0.5, torch.randperm(5)
    for layout in (images, images.contiguous(memory_format=torch.channels_last)):
        out = overload("graft", "cuda")(layout, mask, index)
        assert_same_bits(out, overload("graft", "reference")(images, mask, index))


@pytest.mark.parametrize("source", ["features", "saliency"])
@pytest.mark.parametrize("grid_size", [None, (2, 3), (6, 6)])
def test_an_empty_batch_gives_empty_outputs_and_spends_a_step(backend, source, grid_size):
    saliency = torch.rand(0, 5, 4, 4) if source == "features" else torch.rand(0, 4, 4)
    graft = sg_kernels.SaliencyGraft(num_classes=7, grid_size=grid_size, backend=backend)
    images, targets = torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    mixed, labels = graft(images, targets, **{source: saliency})
    assert (mixed.shape, labels.shape) == ((0, 3, 8, 8), (0, 7))
    assert graft.result.mask.shape == (0, *(grid_size or (4, 4)))
    assert graft.result.saliency.shape == (0, 4, 4)
    assert graft.step.item() == 1


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])
def test_an_infinite_norm_gives_the_area_ratio(backend, norm):
    saliency = torch.tensor([[[1.0, 0.1], [0.1, 0.1]], [[torch.inf, 1.0], [1.0, 1.0]]])
    result = sg_kernels.saliency_graft(
        torch.rand(2, 1, 4, 4),
        saliency=saliency,
        index=torch.tensor([1, 0]),
        keep_prob=1.0,
        norm=norm,
        seed=0,
        backend=backend,
    )
    # Only the infinite cell is grafted over, so the norm that is left is finite.
    assert result.mask.flatten(1).tolist() == [[True, False, False, False], [False] * 4]
    assert result.lam.tolist() == [0.25, 0.0]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm lists a library's symbols")
@pytest.mark.parametrize(
    "library",
    [backends.CPP_LIBRARY, backends.CUDA_LIBRARY, backends.TRITON_LIBRARY],
    ids=["cpu", "cuda", "triton"],
)
def test_a_library_uses_only_the_stable_abi_of_torch(library):
    if not library.exists():
        pytest.skip(f"{library.name} is not built")
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", "--format=posix", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.removesuffix(" U ").rsplit(" U", 1)[0] for line in listed.splitlines()]
    shim = [name for name in symbols if re.match(r"(aoti_)?torch_", name)]
    assert "torch_library_impl" in shim  # the symbols were read
    strangers = re.compile(r"(at|c10|torch|caffe2|pybind11)::|_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]")
    assert [name for name in symbols if strangers.match(name)] == []


def raw_call(**fields):
    fields = {
        "images": torch.rand(2, 3, 8, 8),
        "seed": torch.tensor([1]),
        "grid_size": (2, 2),
        "temperature": 0.2,
        "threshold": 0.25,
        "normalize": NORMALIZE.index("max"),
        "norm": NORM.index("l1"),
        "features": torch.rand(2, 4, 2, 2),
        **fields,
    }
    return Call(**fields)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(("field", "names"), [("normalize", NORMALIZE), ("norm", NORM)])
def test_positions_of_no_name_are_refused(compiled, field, names):
    operator = overload("saliency_graft", compiled)
    for position in (-1, len(names)):
        with pytest.raises(RuntimeError, match=rf"{field} must be in 0 \.\. {len(names) - 1}; got"):
            operator(*raw_call(**{field: position}))
    for position in range(len(names)):
        operator(*raw_call(**{field: position}))


class Allocations(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


@pytest.fixture
def allocated():
    """A function that gives the bytes that C and C++ hold."""
    try:
        statistics = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("mallinfo2 came with glibc 2.33")
    statistics.restype = Allocations
    return lambda: statistics().uordblks


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("out", [False, True])
def test_calls_leave_no_memory_behind(allocated, compiled, out):
    operator = overload("saliency_graft", compiled)
    arguments = raw_call(
        targets=torch.tensor([0, 1]),
        num_classes=2,
        step=torch.tensor([0]),
        out=torch.empty(2, 3, 8, 8) if out else None,
    )
    calls, growth = 200, []
    for _ in range(4):
        before = allocated()
        for _ in range(calls):
            operator(*arguments)
        growth.append(allocated() - before)
    # Caches that fill up show once, a leak in every round.
    assert min(growth) < 8 * calls, growth
