"""What arrives at the driver, argument by argument: through Triton's own launcher, and from calls
that are repeated. Needs no GPU.
"""

import inspect
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, get_type_hints

import pytest
import torch
from conftest import operator_call

from sg_kernels import backends, rng
from sg_kernels.backends import reference
from sg_kernels.call import DTYPES, NORM, NORMALIZE, Call

if backends.INTERPRETED or backends._UNLOADED["triton"]:
    pytest.skip(backends._UNLOADED["triton"] or "nothing is compiled", allow_module_level=True)
if torch.version.cuda or torch.version.hip:
    pytest.skip("this PyTorch has a driver of its own", allow_module_level=True)

import driver
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from sg_kernels.backends.triton import launch, operators, plan, repeat
from sg_kernels.backends.triton.saliency import SAMPLES

TYPES = {
    # What a field or parameter declares: its type in PTX, and how Python packs it.
    "i32": ("u32", "<i"),
    "i64": ("u64", "<q"),
    "fp32": ("f32", "<f"),
    "pointer": ("pointer", "<Q"),
}
PRIMITIVES = {tl.int32: "i32", tl.int64: "i64", tl.float32: "fp32"}
SCRATCH = ["pointer", "pointer"]
"""Triton's own two parameters, which come last and are null."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with driver.installed(tmp_path_factory.mktemp("driver")) as recorder:
        yield recorder


@pytest.fixture
def observed(session, monkeypatch):
    """What the operators launch on an H100, and what the plan answered them."""
    monkeypatch.setattr(launch, "_compiled", {})  # so that every test has a first launch
    monkeypatch.setattr(operators, "multiprocessors", lambda device: driver.MULTIPROCESSORS)
    launch._can_overlap.cache_clear()
    monkeypatch.setattr(operators, "overlaps", lambda device, number: launch.overlaps(0, number))
    seen = SimpleNamespace(recorder=session, memory=[], plans={})

    def launched(given):
        seen.memory.append(given.arguments[0])
        launch.launch(given)

    def answering(name, function):
        def ask(*arguments):
            seen.plans[name] = function(*arguments)
            return seen.plans[name]

        return ask

    monkeypatch.setattr(operators, "launch", launched)
    for name in ("saliency", "tile", "saliency_graft"):
        monkeypatch.setattr(plan, name, answering(name, getattr(plan, name)))
    return seen


class Expected(NamedTuple):
    """A launch as the call and the plan have it."""

    function: object
    programs: tuple
    """Along each axis."""
    threads: int
    arguments: dict
    """By name: "group.field". None where there is no such parameter."""
    overlaps: bool = False


def parameters_of(function):
    """The names and types of a kernel's parameters in order: fields one by one, no constants."""
    for name, parameter in inspect.signature(function.fn).parameters.items():
        if parameter.annotation is not tl.constexpr:
            yield from fields_of(name, parameter.annotation)


def fields_of(name, declared):
    if declared in PRIMITIVES:
        yield name, PRIMITIVES[declared]
    elif hasattr(declared, "__metadata__"):
        yield name, declared.__metadata__[0]
    elif hasattr(declared, "_fields"):
        hints = get_type_hints(declared, include_extras=True)
        for field in declared._fields:
            yield from fields_of(f"{name}.{field}", hints[field])
    else:
        yield name, "pointer"


def bits_of(kind, value):
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    return int.from_bytes(struct.pack(TYPES[kind][1], value), "little")


def numbers(name, group):
    """The fields of a group by name."""
    if not isinstance(group, tuple):
        return {name: group}
    return {
        key: number
        for field, value in group._asdict().items()
        for key, number in numbers(f"{name}.{field}", value).items()
    }


def assert_arrived(launched, expected):
    kernel, arguments = launched.kernel, expected.arguments
    parameters = list(parameters_of(expected.function))
    assert kernel.name == expected.function.fn.__name__
    assert arguments.keys() == {name for name, _ in parameters}
    present = [(name, kind) for name, kind in parameters if arguments[name] is not None]
    assert kernel.types == [TYPES[kind][0] for _, kind in present] + SCRATCH
    arrived = dict(zip([name for name, _ in present], launched.values))
    assert arrived == {name: bits_of(kind, arguments[name]) for name, kind in present}
    assert launched.values[len(present) :] == [0, 0]
    assert launched.grid == expected.programs
    assert launched.block == (expected.threads, 1, 1)
    assert launched.shared_bytes == kernel.shared_bytes
    assert launched.stream == driver.STREAM
    assert launched.overlaps == expected.overlaps
    assert launched.attributes == int(expected.overlaps)


def check_launches(observed, operator, calls, expected_of):
    """Each of the calls, of which the first compiles, launches what ``expected_of`` its arguments
    and results says.
    """
    kernels = observed.recorder.kernels
    loaded = len(kernels)
    observed.recorder.take()
    for arguments in calls:
        observed.memory.clear()
        results = operator(*arguments)
        launches = observed.recorder.take()
        expected = expected_of(observed, arguments, results)
        assert len(launches) == len(expected)
        for arrived, wanted in zip(launches, expected):
            assert_arrived(arrived, wanted)
        compiled = len({wanted.function for wanted in expected})
        assert len(kernels) == loaded + compiled, "the first call compiles, the second does not"


def tiles_of(planned, images, out, depth=1, standardized=False):
    """The tiles as the plan has them, sides and strides as the images do. With a ``depth`` the
    planes take the channels' place. If ``standardized`` a lane is an element, else some bytes.
    """
    height = images.shape[2] // depth
    names, axes = ("channels", "height", "width"), ("image", "channel", "y", "x")
    given = numbers("tiles", planned.tiles)
    given["tiles.per_across"] = plan.reciprocal(planned.tiles.across)
    for name, size in zip(names, (images.shape[1], height, images.shape[3])):
        given |= {
            f"tiles.sides.{name}": size,
            f"tiles.sides.per_{name}": plan.reciprocal(size),
        }
    chunk = planned.layout.lanes
    if not standardized:
        chunk = planned.unit_bytes * chunk // images.element_size()
    for name, tensor in (("source", images), ("out", out)):
        for axis, count, stride in zip(axes, tensor.shape, tensor.stride()):
            given[f"tiles.{name}.{axis}"] = stride // chunk if count > 1 else 0
        if depth > 1:
            given[f"tiles.{name}.channel"] = height * tensor.stride(2) // chunk
    return given


def sums_of(planned, features):
    """The sums as the plan has them, strides as the features do."""
    given = numbers("sums", planned.sums)
    for axis, name in ((0, "sample"), (2, "y"), (3, "x")):
        stride = features.stride(axis) if features.shape[axis] > 1 else 0
        given[f"sums.{name}_stride"] = stride // planned.block.lanes
    return given


def sizes(size, grid):
    """A map's and its grid's, as arguments of a launch."""
    return {
        "maps.size.height": size[0],
        "maps.size.width": size[1],
        "maps.grid.height": grid[0],
        "maps.grid.width": grid[1],
    }


def expected_channel_saliency(observed, arguments, saliency):
    (features,), (memory,), planned = arguments, observed.memory, observed.plans["saliency"]
    batch, size = len(features), features.shape[2:]
    splits = planned.sums.splits
    assert memory.partials.numel() == splits * saliency.numel()
    given = {
        "memory.source": features,
        "memory.partials": saliency if splits == 1 else memory.partials,
        "batch": batch,
        "maps.window.height": 1,
        "maps.window.width": 1,
        "pairing.programs": 0,
        "pairing.rank": 0,
        "pairing.host_seed": 0,
        "pairing.keep_prob": 0,
        "pairing.prob": 0,
    }
    absent = ("grid", "index", "given_index", "drawn", "seed", "step", "quantiles")
    given |= {f"memory.{name}": None for name in absent}
    given |= sums_of(planned, features) | sizes(size, size)
    programs = batch * splits * planned.sums.tiles, 1, 1
    return [Expected(operators.saliency_kernel, programs, plan.THREADS, given)]


def expected_graft(observed, images, mask, index, out, affine=None):
    planned = observed.plans["tile"]
    given = tiles_of(planned, images, out, standardized=affine is not None) | {
        "memory.affine": affine,
        "memory.images": images,
        "memory.out": out,
        "memory.mask": mask,
        "memory.index": index,
        "batch": images.shape[0],
        "grid.height": mask.shape[1],
        "grid.width": mask.shape[2],
    }
    programs = out.shape[0] * planned.tiles.total, 1, 1
    return [Expected(operators.graft_kernel, programs, plan.THREADS, given)]


def expected_graft_backward(observed, arguments, gradient):
    grad, mask, index, _ = arguments
    (expected,) = expected_graft(observed, grad, mask, index, gradient)
    batches = {"batch": gradient.shape[0], "rows": grad.shape[0]}
    return [
        expected._replace(
            function=operators.graft_backward_kernel, arguments=expected.arguments | batches
        )
    ]


def expected_mix_targets(observed, arguments, mixed):
    targets, lam, index, num_classes, label_smoothing = arguments
    tiles = -(-num_classes // operators.COLUMNS.value)
    given = {
        "memory.targets": targets,
        "memory.lam": lam,
        "memory.index": index,
        "memory.mixed": mixed,
        "batch": targets.shape[0],
        "tiles": tiles,
        "num_classes": num_classes,
        "label_smoothing": label_smoothing,
    }
    programs = lam.shape[0] * tiles, 1, 1
    return [Expected(operators.mix_targets_kernel, programs, plan.THREADS, given)]


def expected_saliency_graft(observed, arguments, outputs):
    call, planned = Call(*arguments), observed.plans["saliency_graft"]
    out = outputs.images if call.out is None else call.out
    expected = [
        expected_launch_1(observed, call, planned, outputs),
        expected_launch_2(observed, call, planned, outputs, out),
    ]
    if not planned.at_once:
        expected += expected_graft(
            observed, call.images, outputs.mask, outputs.index, out, call.affine
        )
    return expected


def expected_launch_1(observed, call, planned, outputs):
    memory, sums, splits = observed.memory[0], planned.saliency.sums, planned.saliency.sums.splits
    batch, ready = len(call.images), call.saliency is not None
    source = call.saliency if ready else call.features
    drawing = call.augmentations * -(-batch // SAMPLES.value)
    on_host = isinstance(call.seed, OnHost)
    resampled = ready and splits > 0 and tuple(source.shape[1:]) != call.grid_size
    assert memory.partials.numel() == splits * outputs.saliency.numel()  # both 0 without a map
    assert memory.drawn.dtype == torch.int64
    assert memory.drawn.shape == (1 + call.augmentations,)
    given = numbers("sums", sums) if ready else sums_of(planned.saliency, source)
    given |= numbers("maps", planned.maps) | sizes(source.shape[-2:], call.grid_size)
    given |= {
        "memory.source": source,
        "memory.partials": outputs.saliency if splits <= 1 else memory.partials,
        "memory.grid": memory.grid if resampled else None,
        "memory.index": outputs.index,
        "memory.given_index": call.index,
        "memory.drawn": memory.drawn,
        "memory.seed": None if on_host else call.seed,
        "memory.step": call.step,
        "memory.quantiles": call.quantiles,
        "batch": batch,
        "pairing.programs": drawing,
        "pairing.rank": call.rank,
        "pairing.host_seed": int(call.seed) if on_host else 0,
        "pairing.keep_prob": int(call.keep_prob * 2**32),
        "pairing.prob": int(call.prob * 2**32),
    }
    programs = drawing + batch * splits * sums.tiles, 1, 1
    overlaps = launch.OVERLAP == 2
    return Expected(operators.saliency_kernel, programs, plan.THREADS, given, overlaps=overlaps)


def expected_launch_2(observed, call, planned, outputs, out):
    first, splits = observed.memory[0], planned.saliency.sums.splits
    source = call.features if call.saliency is None else call.saliency
    size = source.shape[-2:] if first.grid is None else call.grid_size
    given = tiles_of(planned.tile, call.images, out, call.depth, call.affine is not None)
    given |= numbers("maps", planned.grids) | sizes(size, call.grid_size)
    given |= {
        "memory.images": call.images,
        "memory.out": out,
        "memory.maps": first.partials if first.grid is None else first.grid,
        "memory.saliency": None if splits <= 1 else outputs.saliency,
        "memory.drawn": first.drawn,
        "memory.step": call.step,
        "memory.given_mask": call.mask,
        "memory.index": outputs.index,
        "memory.targets": call.targets,
        "memory.lam": outputs.lam,
        "memory.mask": outputs.mask,
        "memory.mixed": outputs.targets,
        "memory.affine": call.affine,
        "rows.batch": len(call.images),
        "rows.parts": planned.rows.parts,
        "options.temperature": call.temperature,
        "options.threshold": call.threshold,
        "options.k": call.k or 0,
        "options.num_classes": call.num_classes,
        "options.label_smoothing": call.label_smoothing,
    }
    parts = planned.rows.parts
    programs = len(call.images), call.augmentations, parts + 1 if parts > 1 else 1
    kernel = operators.saliency_graft_kernel
    return Expected(kernel, programs, planned.threads, given, overlaps=launch.OVERLAP > 0)


class OnHost(torch.Tensor):
    """A seed on the host, where the images, although on the CPU, are taken to lie on a device."""

    device = torch.device("meta")


def host(seed):
    return torch.tensor([seed]).as_subclass(OnHost)


def channels_last(*shape, dtype):
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def call_of(**options):
    defaults = {
        "images": torch.rand(2, 3, 10, 8),
        "features": torch.rand(2, 16, 5, 4) if options.get("saliency") is None else None,
        "seed": torch.tensor([1]),
        "quantiles": None,
        "grid_size": (5, 4),
        "threshold": 1 / 20,
    }
    return operator_call(**defaults | options)


VARIANTS = {
    # The options of the first call, and those that are others in the second.
    "seed on the host": (
        {"seed": host(-(2**63)), "temperature": 1, "threshold": 0, "keep_prob": 1},
        {"seed": host(2**62), "temperature": 0.3, "threshold": 1e-40, "keep_prob": 0.3, "prob": 0},
    ),
    "seed and step on the device": (
        {"step": torch.tensor([0]), "rank": 2**31 - 1, "quantiles": rng.beta_quantiles(1.0)},
        {"step": torch.tensor([2]), "rank": 1, "quantiles": rng.beta_quantiles(2.0), "prob": 0.5},
    ),
    "index": ({"index": torch.tensor([1, 0])}, {"index": torch.tensor([0, 0])}),
    "ready map": (
        {"saliency": torch.rand(2, 6, 5), "norm": NORM.index("area")},
        {"saliency": torch.rand(2, 9, 7)},
    ),
    "mask": (
        {"mask": torch.rand(2, 3, 4) < 0.5, "grid_size": (3, 4)},
        {"mask": torch.rand(2, 3, 4) < 0.5, "prob": 0.5},
    ),
    "mask without a map": (
        {
            "mask": torch.rand(4, 3, 4) < 0.5,
            "grid_size": (3, 4),
            "augmentations": 2,
            "saliency": torch.empty(2, 0, 0),
            "norm": NORM.index("area"),
        },
        {"index": None, "seed": torch.tensor([3])},
    ),
    "k": ({"k": 5}, {"k": 16}),
    "augmentations and out": (
        {"augmentations": 3, "no_fixed_points": True, "out": torch.empty(6, 3, 10, 8)},
        {"out": torch.empty(6, 3, 10, 8)},
    ),
    "class ids": (
        {"targets": torch.tensor([3, 1]), "num_classes": 10, "label_smoothing": 0.1},
        {"targets": torch.tensor([0, 1]), "num_classes": 2, "label_smoothing": 1},
    ),
    "dense targets": (
        {"targets": torch.rand(2, 10), "num_classes": 10},
        {"targets": torch.rand(2, 300), "num_classes": 300},
    ),
    "splits": (
        {"features": torch.rand(2, 1024, 5, 4), "seed": host(5)},
        {"features": torch.rand(2, 1024, 5, 4), "seed": host(6)},
    ),
    "third launch": (
        {
            "images": torch.rand(1, 3, 40, 44),
            "features": torch.rand(1, 4, 40, 44),
            "grid_size": (40, 44),
        },
        {"temperature": 0.1},
    ),
    "standardised": (
        {
            "images": torch.randint(256, (2, 3, 10, 16), dtype=torch.uint8),
            "affine": reference.affine((1, 2, 3), (4, 5, 6), 3),
            "dtype": DTYPES.index(torch.bfloat16),
        },
        {"affine": reference.affine((3,), (2,), 3)},
    ),
    "standardised, third launch": (
        {
            "images": channels_last(1, 3, 40, 44, dtype=torch.float32),
            "features": torch.rand(1, 4, 40, 44),
            "grid_size": (40, 44),
            "affine": reference.affine((3,), (2,), 3),
            "dtype": DTYPES.index(torch.float16),
        },
        {"temperature": 0.1},
    ),
    "bytes, channels_last": (
        {
            "images": channels_last(2, 4, 16, 24, dtype=torch.uint8),
            "features": channels_last(2, 64, 5, 4, dtype=torch.bfloat16),
            "normalize": NORMALIZE.index("none"),
        },
        {"images": channels_last(2, 4, 16, 24, dtype=torch.uint8)},
    ),
    "videos": (
        {"images": channels_last(2, 3, 3 * 10, 8, dtype=torch.bfloat16), "depth": 3},
        {"images": channels_last(2, 3, 3 * 10, 8, dtype=torch.bfloat16)},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saliency_graft(observed, variant):
    first, second = VARIANTS[variant]
    calls = call_of(**first), call_of(**first | second)
    check_launches(observed, operators.saliency_graft, calls, expected_saliency_graft)


@pytest.fixture
def repeating(observed, monkeypatch):
    """The same, where Python makes only the first call of each layout."""
    if not repeat.AVAILABLE:
        pytest.skip("libsg_kernels_triton.so is not built")
    monkeypatch.setattr(repeat, "can_repeat", lambda images: not launch.a_hook_listens())
    torch.ops.sg_kernels.forget()
    yield observed
    torch.ops.sg_kernels.forget()


def same_layout(first):
    """The options of a call with other memory and numbers than ``first``."""
    others = {"temperature": 0.7, "threshold": 0.11, "keep_prob": 0.2, "prob": 0.9}
    others["label_smoothing"] = 0.3
    others["seed"] = host(-12) if isinstance(first.get("seed"), OnHost) else torch.tensor([9])
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and name != "seed":
            others[name] = value.clone()
    return first | others


def assert_same_but_for_fresh_memory(launches, expected, known):
    """``known``: by an address in ``expected``, the one that ``launches`` must have."""
    for arrived, wanted in zip(launches, expected, strict=True):
        assert arrived._replace(values=[]) == wanted._replace(values=[])
        for kind, value, other in zip(wanted.kernel.types, arrived.values, wanted.values):
            # The address of an image is no pointer to the kernel.
            if kind == "pointer" or other in known:
                assert known.setdefault(other, value) == value
            else:
                assert value == other


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_repeated_call_launches_what_python_does(repeating, variant):
    first, _ = VARIANTS[variant]
    operators.saliency_graft(*call_of(**first))
    call = call_of(**same_layout(first))
    repeating.memory.clear()
    repeating.recorder.take()
    outputs = operators.saliency_graft(*call)
    launches = repeating.recorder.take()
    assert not repeating.memory, "Python made the call"
    torch.ops.sg_kernels.forget()
    wanted = operators.saliency_graft(*call)
    assert repeating.memory
    given = [value for value in call if isinstance(value, torch.Tensor)]
    known = {tensor.data_ptr(): tensor.data_ptr() for tensor in given} | {0: 0}
    for tensor, other in zip(outputs, wanted, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        assert tensor.stride() == other.stride()
        known[other.data_ptr()] = tensor.data_ptr()
    assert_same_but_for_fresh_memory(launches, repeating.recorder.take(), known)


def made_by_python(repeating, **options):
    repeating.plans.clear()
    operators.saliency_graft(*call_of(**options))
    return bool(repeating.plans)


OTHER_LAYOUTS = {
    "images": torch.rand(2, 3, 12, 8),
    "grid_size": (4, 4),
    "normalize": NORMALIZE.index("none"),
    "norm": NORM.index("l2"),
    "features": torch.rand(2, 4, 5, 4, dtype=torch.float64),
    "saliency": torch.rand(2, 5, 4),
    "mask": torch.rand(2, 5, 4) < 0.5,
    "index": torch.tensor([1, 0]),
    "targets": torch.tensor([1, 0]),
    "out": torch.empty(2, 3, 10, 8),
    "step": torch.tensor([0]),
    "rank": 1,
    "quantiles": rng.beta_quantiles(1.0),
    "k": 3,
    "augmentations": 2,
    "no_fixed_points": True,
    "num_classes": 5,
    "depth": 2,
    "affine": reference.affine((1, 2, 3), (4, 5, 6), 3),
    "dtype": 1,
}
SAME_LAYOUT = {"seed", "temperature", "threshold", "keep_prob", "prob", "label_smoothing"}


def test_both_languages_count_the_slots_alike():
    source = Path(__file__).parents[1].joinpath("csrc/triton/repeat.cpp").read_text()
    body = re.search(r"enum Slot[^{]*\{(.*?)\};", source, re.DOTALL)[1]
    *names, count = re.findall(r"\bk(\w+),", body)
    assert count == "Slots"
    assert names == [slot.name.title().replace("_", "") for slot in repeat.Slot]


def test_a_layout_is_all_of_a_call_but_what_is_passed_on():
    assert OTHER_LAYOUTS.keys() | SAME_LAYOUT == set(Call._fields)
    assert not OTHER_LAYOUTS.keys() & SAME_LAYOUT


@pytest.mark.parametrize("option", OTHER_LAYOUTS)
def test_another_layout_is_not_repeated(repeating, option):
    given = {"features": None} if option == "saliency" else {}
    assert made_by_python(repeating)
    assert not made_by_python(repeating)
    assert made_by_python(repeating, **given, **{option: OTHER_LAYOUTS[option]})
    assert not made_by_python(repeating)


def test_images_at_another_alignment_are_not_repeated(repeating):
    memory = torch.rand(2 * 3 * 10 * 8 + 1)
    aligned, odd = (memory[i : i + 480].view(2, 3, 10, 8) for i in (0, 1))
    assert made_by_python(repeating, images=aligned)
    assert made_by_python(repeating, images=odd)
    assert not made_by_python(repeating, images=aligned)


def test_other_overlaps_are_not_repeated(repeating, monkeypatch):
    assert made_by_python(repeating)
    monkeypatch.setattr(launch, "OVERLAP", 0)
    assert made_by_python(repeating)


def test_a_call_with_copies_of_its_tensors_is_not_repeated(repeating):
    mask = (torch.rand(4, 3, 4) < 0.5)[::2]
    for _ in range(2):
        assert made_by_python(repeating, mask=mask, grid_size=(3, 4))


def test_nothing_is_repeated_where_the_driver_is_not_found(repeating, monkeypatch):
    monkeypatch.setattr(repeat, "driver_functions", lambda: None)
    for _ in range(2):
        assert made_by_python(repeating)


def test_a_kernel_with_a_parameter_more_is_not_repeated(repeating, monkeypatch):
    monkeypatch.setattr(repeat, "HIDDEN", 1)
    for _ in range(2):
        assert made_by_python(repeating)


def test_a_kernel_whose_entry_is_not_found_is_not_repeated(repeating):
    assert made_by_python(repeating)
    kernel = next(iter(launch._compiled.values()))
    assert repeat.is_plain(kernel)
    ptx = kernel.asm["ptx"].replace(".entry", ".func")
    for asm in ({}, {"ptx": ptx}):
        other = SimpleNamespace(metadata=kernel.metadata, src=kernel.src, asm=asm)
        assert not repeat.is_plain.__wrapped__(other)


def test_python_makes_a_call_that_the_driver_refuses_to_repeat(repeating):
    assert made_by_python(repeating)
    repeating.recorder.take()
    repeating.recorder.refuse(0)
    assert made_by_python(repeating)
    assert len(repeating.recorder.take()) == 2
    repeating.recorder.refuse(1)
    with pytest.raises(RuntimeError, match="launch 2 of saliency_graft: CUDA error 201"):
        operators.saliency_graft(*call_of())


@pytest.mark.parametrize("launches", [0, 2])
def test_saliency_graft_with_other_overlaps(observed, monkeypatch, launches):
    monkeypatch.setattr(launch, "OVERLAP", launches)
    calls = call_of(), call_of()
    check_launches(observed, operators.saliency_graft, calls, expected_saliency_graft)


def test_a_gpu_before_hopper_does_not_overlap(session, monkeypatch):
    launch._can_overlap.cache_clear()
    ampere = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", ampere)
    assert not launch.overlaps(0, 2)
    launch._can_overlap.cache_clear()


@pytest.mark.parametrize("channels", [16, 1024], ids=["whole", "splits"])
def test_channel_saliency(observed, channels):
    calls = [(torch.rand(batch, channels, 5, 4),) for batch in (2, 3)]
    check_launches(observed, operators.channel_saliency, calls, expected_channel_saliency)


MASK = torch.rand(4, 2, 4) < 0.5
INDEX = torch.tensor([1, 0, 0, 1])


def test_graft(observed):
    calls = [(torch.rand(2, 3, 10, 8), MASK, INDEX) for _ in range(2)]

    def expected(observed, arguments, out):
        return expected_graft(observed, *arguments, out)

    check_launches(observed, operators.graft, calls, expected)


def test_graft_with_out(observed):
    calls = [(torch.rand(2, 3, 10, 8), MASK, INDEX, torch.empty(4, 3, 10, 8)) for _ in range(2)]

    def expected(observed, arguments, result):
        return expected_graft(observed, *arguments)

    check_launches(observed, operators.graft, calls, expected)


def test_graft_backward(observed):
    calls = [(torch.rand(4, 3, 10, 8), MASK, INDEX, 2) for _ in range(2)]
    check_launches(observed, operators.graft_backward, calls, expected_graft_backward)


@pytest.mark.parametrize("dense", [False, True], ids=["class ids", "dense"])
def test_mix_targets(observed, dense):
    calls = []
    for classes, smoothing in ((10, 0.1), (300, 1)):
        targets = torch.rand(2, classes) if dense else torch.tensor([1, 3])
        calls.append((targets, torch.rand(4), INDEX, classes, smoothing))
    check_launches(observed, operators.mix_targets, calls, expected_mix_targets)


def test_a_profiler_is_told_of_each_launch(repeating):
    names = []
    hook = triton.knobs.runtime.launch_enter_hook

    def listener(metadata):
        names.append(metadata.get()["name"])

    operators.saliency_graft(*call_of())
    hook.add(listener)
    try:
        operators.saliency_graft(*call_of())
    finally:
        hook.remove(listener)
    operators.saliency_graft(*call_of())
    assert names == ["saliency_kernel", "saliency_graft_kernel"]
