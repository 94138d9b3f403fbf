"""Compiles every Triton kernel ahead of time, for GPUs that need not be there.

    python -m benchmarks.aot [--targets sm_90 gfx942]

Prints what each needs and how wide it reads and writes, with the time that its bytes take at the
copy bandwidth of an H200. Fails on a spill, and in the shapes that matter on an access to images or
features narrower than 16 bytes.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sg_kernels.kernels import operators
from sg_kernels.kernels.launch import OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COPY_BANDWIDTH = 4.3e12
"""Bytes read and written a second, by a large copy on an H200."""
POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.bool: "*i1"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROWS = "{:<32} {:<7} {:>5} {:>6} {:>6} {:>5} {:>6} {:>12} {:>6} {:>9} {:>8}"


class Launch(NamedTuple):
    """One launch of an operator, as it would be."""

    name: str
    function: Any
    programs: int
    threads: int
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    bytes: int
    wide: bool
    """Whether it must read and write 16 bytes at a time."""


class Compiled(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    spills: int
    shared: int
    load: int
    """Bytes of the widest read of global memory."""
    store: int
    wide_loads: int
    predicated_loads: int
    wide_stores: int


def launches_of(operator: Callable[..., Any], *args: Any) -> list[tuple[Any, ...]]:
    """What an operator would launch; its tensors need no memory."""
    recorded: list[tuple[Any, ...]] = []

    def record(function: Any, programs: int, threads: int, arguments: Any, *constants: Any) -> None:
        recorded.append((function, programs, threads, arguments, constants))

    with mock.patch.object(operators, "launch", record):
        operator(*args)
    return recorded


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def saliency_graft(
    images: Tensor,
    features: Tensor | None = None,
    saliency: Tensor | None = None,
    grid_size: tuple[int, int] | None = None,
    k: int | None = None,
) -> list[tuple[Any, ...]]:
    evidence = features if saliency is None else saliency
    assert evidence is not None
    grid = grid_size or (evidence.shape[-2], evidence.shape[-1])
    ids = meta(images.shape[0], dtype=torch.int64)
    table = meta(1025, dtype=torch.int64)
    seed, step = meta(1, dtype=torch.int64), meta(1, dtype=torch.int64)
    options = (
        0,
        table,
        0.0,
        grid,
        0.2,
        "max",
        1 / (grid[0] * grid[1]),
        k,
        "l1",
        1.0,
        1,
        False,
        1000,
        0.0,
    )
    return launches_of(
        operators.saliency_graft, images, features, saliency, None, ids, seed, step, *options
    )


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def main_shapes() -> Iterator[Launch]:
    """The shapes that must read and write 16 bytes at a time."""
    short = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
    }
    for batch, channels, side in ((256, 2048, 7), (128, 640, 8), (256, 768, 14)):
        images = meta(batch, 3, 32, 32, dtype=torch.bfloat16)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for last in (False, True):
                features = meta(batch, channels, side, side, dtype=dtype, channels_last=last)
                recorded = saliency_graft(images, features)[0]
                name = f"saliency {channels}x{side}x{side} {short[dtype]} {'cl' if last else ''}"
                yield Launch(name, *recorded, size(features), True)
    for batch, side, cells in ((128, 32, 8), (256, 224, 7)):
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            for last in (False, True):
                images = meta(batch, 3, side, side, dtype=dtype, channels_last=last)
                features = meta(batch, 2048, cells, cells, dtype=torch.bfloat16)
                recorded = saliency_graft(images, features)[1]
                name = f"graft {side}x{side} {cells}x{cells} {short[dtype]} {'cl' if last else ''}"
                yield Launch(name, *recorded, 2 * size(images), True)


def other_kernels() -> Iterator[Launch]:
    """The rest: every kernel and every layout, once."""
    images = meta(64, 3, 224, 224, dtype=torch.bfloat16)
    odd = meta(64, 3, 33, 31, dtype=torch.bfloat16)
    ready = meta(64, 224, 224, dtype=torch.float32)
    fine = meta(64, 64, 64, dtype=torch.float32)
    features = meta(64, 512, 7, 7, dtype=torch.bfloat16)
    mask, index = meta(64, 7, 7, dtype=torch.bool), meta(64, dtype=torch.int64)
    rows, lam = meta(64, 1000, dtype=torch.float32), meta(64, dtype=torch.float32)
    strided = features[:, :, 1:, 1:]
    alone = launches_of(operators.channel_saliency, features)[0]
    yield Launch("saliency alone", *alone, size(features), True)
    yield Launch(
        "saliency given", *saliency_graft(images, None, ready, (7, 7))[0], size(ready), False
    )
    yield Launch("saliency strided", *saliency_graft(images, strided)[0], size(strided), False)
    yield Launch("graft topk", *saliency_graft(images, features, k=9)[1], 2 * size(images), True)
    yield Launch("graft odd sizes", *saliency_graft(odd, features)[1], 2 * size(odd), False)
    sliced = images[:, :, ::2, ::2]
    yield Launch("graft strided", *saliency_graft(sliced, features)[1], 2 * size(sliced), False)
    large = saliency_graft(images, None, fine)
    yield Launch("cells of 64x64", *large[1], size(fine), False)
    yield Launch("graft from memory", *large[2], 2 * size(images), False)
    plain = launches_of(operators.graft, images, mask, index)[0]
    yield Launch("graft alone", *plain, 2 * size(images), True)
    for dtype in (torch.bfloat16, torch.float32):
        grad = images.to(dtype)
        back = launches_of(operators.graft_backward, grad, mask, index, 1)[0]
        name = f"graft_backward {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        yield Launch(name, *back, 2 * size(grad), True)
    mixed = launches_of(operators.mix_targets, rows, lam, index, 1000, 0.1)[0]
    yield Launch("mix_targets", *mixed, 3 * size(rows), False)


def compile_launch(launch: Launch, target: str) -> Any:
    """Compiles a launch exactly as it would be at run time on ``target``."""
    signature, constants = {}, {}
    values = (*launch.arguments, *launch.constants)
    for position, (parameter, value) in enumerate(zip(launch.function.params, values)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[parameter.name] = parameter.annotation or POINTERS[value.dtype]
    return triton.compile(
        ASTSource(launch.function, signature, constexprs=constants),
        target=TARGETS[target],
        options={"num_warps": max(1, launch.threads // TARGETS[target].warp_size), **OPTIONS},
    )


def read_ptx(kernel: Any) -> Compiled:
    accesses = re.findall(
        r"(@%p\d+ )?(ld|st)\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"]
    )
    widths: dict[str, list[tuple[int, bool]]] = {"ld": [], "st": []}
    for predicate, kind, vector, bits in accesses:
        widths[kind].append((int(vector or 1) * int(bits) // 8, bool(predicate)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        int(found[1]),
        int(found[2]),
        kernel.metadata.shared,
        max(width for width, _ in widths["ld"]),
        max(width for width, _ in widths["st"]),
        sum(width == 16 for width, _ in widths["ld"]),
        sum(width == 16 and predicated for width, predicated in widths["ld"]),
        sum(width == 16 for width, _ in widths["st"]),
    )


def read_amdgcn(kernel: Any) -> Compiled:
    assembly = kernel.asm["amdgcn"]
    words = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    widths: dict[str, list[int]] = {"load": [], "store": []}
    for kind, unit, count in re.findall(
        r"(?:global|buffer|flat)_(load|store)_(ubyte|byte|ushort|short|dword)(?:x(\d))?", assembly
    ):
        widths[kind].append(words[unit] * int(count or 1))

    def note(name: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    wide_loads = widths["load"].count(16)
    return Compiled(
        note("vgpr_count"),
        note("vgpr_spill_count"),  # scalar registers spill to vector registers, not to memory
        kernel.metadata.shared,
        max(widths["load"], default=0),
        max(widths["store"], default=0),
        wide_loads,
        wide_loads,  # by the execution mask
        widths["store"].count(16),
    )


def examine(position: int, target: str) -> Compiled:
    kernel = compile_launch(LAUNCHES[position], target)
    return read_ptx(kernel) if "ptx" in kernel.asm else read_amdgcn(kernel)


LAUNCHES = [*main_shapes(), *other_kernels()]


def faults(launch: Launch, compiled: Compiled) -> list[str]:
    """What a launch must not do."""
    found = []
    if compiled.spills:
        found.append(f"spills {compiled.spills} bytes")
    if launch.wide and compiled.load < 16:
        found.append(f"reads at most {compiled.load} bytes at a time")
    if launch.wide and "graft" in launch.name and compiled.store < 16:
        found.append(f"writes at most {compiled.store} bytes at a time")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    targets = parser.parse_args().targets
    tasks = [(position, target) for position in range(len(LAUNCHES)) for target in targets]
    with ProcessPoolExecutor() as pool:
        found = pool.map(examine, *zip(*tasks))
        results = list(
            tqdm(found, total=len(tasks), unit="kernel", disable=not sys.stderr.isatty())
        )
    print(f"Triton {triton.__version__}; wide loads (predicated): of 16 bytes, a thread's")
    heads = (
        "kernel",
        "target",
        "regs",
        "spills",
        "shared",
        "load",
        "store",
        "wide loads",
        "wide st",
    )
    print(ROWS.format(*heads, "MB", "us"))
    failures = []
    for (position, target), compiled in zip(tasks, results):
        launch = LAUNCHES[position]
        wide_loads = f"{compiled.wide_loads} ({compiled.predicated_loads})"
        moved, time = launch.bytes / 1e6, launch.bytes / COPY_BANDWIDTH * 1e6
        row = (launch.name, target, *compiled[:5], wide_loads, compiled.wide_stores)
        print(ROWS.format(*row, f"{moved:.1f}", f"{time:.1f}"))
        failures += [f"{launch.name}, {target}: {fault}" for fault in faults(launch, compiled)]
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
