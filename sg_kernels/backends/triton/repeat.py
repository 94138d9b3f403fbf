"""Prepares calls of saliency_graft for csrc/triton/repeat.cpp, which repeats them without Python.

Calls of one layout, that is of equal sizes, strides, dtypes, alignments and choices, launch the
same kernels and differ in few parameters. Python makes the first of them. What it has launched is
kept, with a slot in the place of each parameter that differs.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sg_kernels import backends
from sg_kernels.backends.triton import launch
from sg_kernels.backends.triton.arguments import (
    GraftMemory,
    Options,
    Pairing,
    RowsMemory,
    SaliencyMemory,
)
from sg_kernels.backends.triton.launch import Launch
from sg_kernels.call import Outputs

AVAILABLE = (
    not launch.INTERPRETED
    and torch.version.hip is None
    and os.environ.get("SG_KERNELS_REPEAT", "1") not in ("", "0")
    and backends.load(backends.TRITON_LIBRARY) is None
)
_repeat = torch.ops.sg_kernels.repeat.default


class Slot(IntEnum):
    """The parameters that differ: some fields of the groups DIFFERENT, by their names. repeat.cpp
    counts alike.
    """

    LITERAL = 0
    """No slot: the parameter is the same in every call."""
    IMAGES = 1
    SOURCE = 2
    GIVEN_MASK = 3
    GIVEN_INDEX = 4
    TARGETS = 5
    STEP = 6
    QUANTILES = 7
    AFFINE = 8
    SEED = 9
    HOST_SEED = 10
    KEEP_PROB = 11
    PROB = 12
    TEMPERATURE = 13
    THRESHOLD = 14
    LABEL_SMOOTHING = 15
    OUT = 16
    LAM = 17
    INDEX = 18
    MASK = 19
    SALIENCY = 20
    MIXED = 21
    PARTIALS = 22
    GRID = 23
    DRAWN = 24


SLOTS = {slot.name.lower(): slot for slot in Slot}
DIFFERENT = SaliencyMemory, Pairing, RowsMemory, Options, GraftMemory
OUTPUTS = Slot.OUT, Slot.LAM, Slot.INDEX, Slot.MASK, Slot.SALIENCY, Slot.MIXED
"""Where the operator's outputs go, in their order."""
BITS = {"*": 64, "i64": 64, "i32": 32, "fp32": 32}
"""The bits of a parameter, by its type; that of a pointer begins with a star."""
EXTRAS = "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"
"""What a kernel may ask of its launch, as Triton calls it, and ours do not."""
HIDDEN = 2
"""How many pointers Triton adds at the end: null where a kernel asks for no memory of its own."""


def again(arguments: tuple[Any, ...]) -> Outputs | None:
    """Repeats the operator's call; None where no call of its layout has been kept."""
    if not can_repeat(arguments[0]):
        return None
    outputs = _repeat(*arguments, launch.OVERLAP)
    return Outputs(*outputs) if outputs else None


def keep(arguments: tuple[Any, ...], launches: list[Launch], outputs: Outputs) -> None:
    """Keeps what a call has launched, for the calls of its layout."""
    functions = driver_functions() if can_repeat(arguments[0]) else None
    if functions is None:
        return
    device = torch.cuda.current_device()
    kernels = [launch.compiled_for(given, device) for given in launches]
    if all(map(is_plain, kernels)):
        numbers = chain(functions, _encode(launches, kernels, outputs))
        encoded = torch.from_numpy(np.fromiter(numbers, np.int64))
        _repeat(*arguments, launch.OVERLAP, encoded)


def can_repeat(images: Tensor) -> bool:
    return AVAILABLE and images.is_cuda and not launch.a_hook_listens()


@lru_cache
def is_plain(kernel: Any) -> bool:
    """Whether the driver takes the parameters that we know of, and needs nothing else."""
    metadata, ptx = kernel.metadata, kernel.asm.get("ptx", "")
    entry = re.search(rf"\.entry {metadata.name}\((.*?)\)\n", ptx, re.DOTALL)
    asks_for_more = any(getattr(metadata, name, False) for name in EXTRAS)
    if entry is None or asks_for_more or metadata.num_ctas != 1:
        return False
    bits = re.findall(r"\.param \.[a-z](\d+)", entry[1])
    types = [kind for *_, kind in _fields(tuple(kernel.src.signature.values()))]
    known = [BITS["*" if kind[0] == "*" else kind] for kind in types if kind != "constexpr"]
    return [int(count) for count in bits] == known + [BITS["*"]] * HIDDEN


def _fields(group: tuple[Any, ...]) -> Iterator[tuple[type, str, Any]]:
    """What is in a group, and in its groups: the group's type, the name of the field, the value."""
    names = getattr(group, "_fields", [""] * len(group))
    for name, value in zip(names, group):
        if isinstance(value, tuple):
            yield from _fields(value)
        else:
            yield type(group), name, value


def _encode(launches: list[Launch], kernels: list[Any], outputs: Outputs) -> Iterator[int]:
    """A prepared call as repeat.cpp reads it, after the driver's functions."""
    memory: SaliencyMemory = launches[0].arguments[0]
    scratch = {
        Slot.PARTIALS: None if memory.partials is outputs.saliency else memory.partials,
        Slot.GRID: memory.grid,
        Slot.DRAWN: memory.drawn,
    }
    allocated = {**dict(zip(OUTPUTS, outputs)), **scratch}
    fresh = {slot: tensor for slot, tensor in allocated.items() if tensor is not None}
    yield len(fresh)
    for slot, tensor in fresh.items():
        yield from (slot, tensor.dim(), *tensor.shape, tensor.dim(), *tensor.stride())
    by_identity = {id(tensor): slot for slot, tensor in fresh.items()}
    yield len(launches)
    for given, kernel in zip(launches, kernels):
        yield from _encode_launch(given, kernel, by_identity, seed_on_host=memory.seed is None)


def _encode_launch(
    given: Launch, kernel: Any, fresh: dict[int, Slot], seed_on_host: bool
) -> Iterator[int]:
    """``fresh``: the slots of what the call allocates, by the identity of the tensors."""
    yield from (kernel.function, *given.programs, given.threads)
    yield from (kernel.metadata.shared, kernel.metadata.launch_pdl)
    present = [field for field in _fields(given.arguments) if field[-1] is not None]
    yield len(present) + HIDDEN
    for group, name, value in present:
        slot = fresh.get(id(value))
        if slot is None and group in DIFFERENT:
            slot = SLOTS.get(name)
        if slot is Slot.HOST_SEED and not seed_on_host:
            slot = None
        yield from (Slot.LITERAL, value) if slot is None else (slot, 0)
    yield from (Slot.LITERAL, 0) * HIDDEN


@lru_cache
def driver_functions() -> tuple[int, ...] | None:
    """The addresses of what launches a kernel, and of what tells the current stream; None where
    they are not found.
    """
    try:
        launches = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        streams = ctypes.CDLL("libtorch_cuda.so").aoti_torch_get_current_cuda_stream
    except (AttributeError, OSError):
        return None
    return tuple(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (launches, streams))
