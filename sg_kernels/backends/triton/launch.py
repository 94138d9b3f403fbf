"""Compiles a kernel once for its constants, and launches it with little work on the host."""

import os
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 runs the kernels on the CPU, to test them without a GPU."""

OVERLAP = int(os.environ.get("SG_KERNELS_OVERLAP") or 1)
"""How many launches of a call may start while the kernel before them ends, where the GPU can: none,
the second alone, or both.
"""
POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.bool: "*i1"}


class Launch(NamedTuple):
    """Of a kernel, on the current device and stream."""

    function: Any
    programs: tuple[int, int, int]
    """Along three axes, of which the second and third end at 65535 on CUDA."""
    threads: int
    arguments: tuple[Any, ...]
    """Groups and numbers in the order of the kernel's parameters, memory first."""
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], Any] = {}


@lru_cache
def multiprocessors(device: int) -> int:
    """How many a CUDA device has, by its index; 1 for the interpreter, whose index is -1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


def overlaps(device: int, number: int) -> bool:
    """Whether launch 1 or 2 of a call starts while the kernel before it ends, on a CUDA device by
    its index: programmatic dependent launch.
    """
    return number > 2 - OVERLAP and _can_overlap(device)


@lru_cache
def _can_overlap(device: int) -> bool:
    """From compute capability 9.0 on."""
    if device < 0:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def options_of(
    function: Any, threads: int, constants: tuple[Any, ...], warp_size: int
) -> dict[str, Any]:
    """The compiler's options; the constant OVERLAPS sets one of them."""
    named = zip([p.name for p in function.params if p.is_constexpr], constants)
    options = {
        "num_warps": max(1, threads // warp_size),
        "enable_fp_fusion": False,  # a * b + c rounds twice, as in the reference
    }
    return {**options, "launch_pdl": True} if dict(named).get("OVERLAPS") else options


def source(function: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> ASTSource:
    """What is compiled for a launch: the constants, and which memory is None.

    Nothing else decides it. Triton's own launch would type the numbers of a group by their values,
    and compile anew for those that are 1 or multiples of 16. Here a number has the type that its
    group or the kernel declares; alignment is declared in the kernels.
    """
    constexprs: dict[tuple[int, ...], Any] = {}

    def type_of(path: tuple[int, ...], value: Any, declared: Any) -> Any:
        if isinstance(value, tuple):
            group: Any = type(value)
            hints = get_type_hints(group, include_extras=True)
            fields = enumerate(zip(group._fields, value))
            return group(*[type_of((*path, i), field, hints[name]) for i, (name, field) in fields])
        if value is None:
            constexprs[path] = None
            return "constexpr"
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return getattr(declared, "__metadata__", (declared,))[0]

    signature = {}
    for i, (parameter, value) in enumerate(zip(function.params, (*arguments, *constants))):
        if parameter.is_constexpr:
            constexprs[i,] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of((i,), value, parameter.annotation)
    return ASTSource(function, signature, constexprs)


def compiled_for(given: Launch, device: int) -> Any:
    """The kernel of a launch on a CUDA device by its index; compiled where it is a new one."""
    absent = tuple([memory is None for memory in given.arguments[0]])
    key = (given.function, device, given.threads, given.constants, absent)
    compiled = _compiled.get(key)
    if compiled is None:
        warp_size = triton.runtime.driver.active.get_current_target().warp_size
        options = options_of(given.function, given.threads, given.constants, warp_size)
        described = source(given.function, given.arguments, given.constants)
        _compiled[key] = compiled = triton.compile(described, options=options)
    return compiled


def launch(given: Launch) -> None:
    programs, arguments, constants = given.programs, given.arguments, given.constants
    if INTERPRETED:
        given.function[programs](*arguments, *constants)
        return
    device = torch.cuda.current_device()
    compiled = compiled_for(given, device)
    if a_hook_listens():
        compiled[programs](*arguments, *constants)
        return
    # As above, less what only hooks ask for.
    stream = triton.runtime.driver.active.get_current_stream(device)
    run = compiled.run  # loads the kernel at first
    kernel, metadata = compiled.function, compiled.packed_metadata
    run(*programs, stream, kernel, metadata, None, None, None, *arguments, *constants)


def a_hook_listens() -> bool:
    """Whether a profiler wants to know of launches; Triton calls empty chains of hooks, too."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
