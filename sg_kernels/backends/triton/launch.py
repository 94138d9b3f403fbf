"""How a kernel is launched: compiled once for its constants, then with little on the way."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 runs the kernels on the CPU, to test them without a GPU."""

OPTIONS = {"enable_fp_fusion": False}
"""a * b + c rounds twice, as in the reference."""

_compiled: dict[tuple[Any, ...], Any] = {}


def kernel(function: Callable[..., None]) -> Any:
    """A Triton kernel whose machine code depends on its constexprs alone, and on what is None.

    Triton would also compile anew for an integer that is 1 or a multiple of 16, and for an address
    that is. What the kernels need to know of alignment is in their constexprs; so is what lies at
    the addresses of images and features, while pointers have one type always.
    """
    runtime = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


def launch(
    function: Any, programs: int, threads: int, arguments: tuple[Any, ...], *constants: Any
) -> None:
    """Runs ``programs`` of a :func:`kernel`, on the current device and stream."""
    if INTERPRETED:
        function[programs,](*arguments, *constants)
        return
    absent = tuple([argument is None for argument in arguments])
    key = (function, torch.cuda.current_device(), threads, constants, absent)
    compiled = _compiled.get(key)
    if compiled is None:
        warp_size = triton.runtime.driver.active.get_current_target().warp_size
        num_warps = max(1, threads // warp_size)
        _compiled[key] = function[programs,](*arguments, *constants, num_warps=num_warps, **OPTIONS)
    else:
        # Triton's own way takes 5 us longer: it works out the same key from every argument.
        compiled[programs, 1, 1](*arguments, *constants)
