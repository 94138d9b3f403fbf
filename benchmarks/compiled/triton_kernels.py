"""Compiles every Triton kernel ahead of time, for GPUs that need not be present.

    python -m benchmarks.compiled.triton_kernels [--targets sm_90 gfx942] [--main]

Prints what each kernel needs, the width of its accesses and what one request of a warp touches,
with the time that its bytes take at the copy bandwidth of an H200. Fails on a spill, and in the
main shapes on accesses to images or features that are narrower than 16 bytes or scattered.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks.compiled.cuobjdump import count_instructions, dump_kernel
from benchmarks.compiled.requests import Request, worst_request
from benchmarks.speed.cases import COPY_BANDWIDTH
from sg_kernels.backends.triton import operators
from sg_kernels.backends.triton.launch import options_of, source
from sg_kernels.call import DTYPES, NORM, NORMALIZE, Call

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
"""Of an H100, for which the launches are planned."""
WIDE = 16
"""Bytes of the widest access."""


class Launch(NamedTuple):
    """One launch of an operator, as it would be."""

    name: str
    function: Any
    programs: tuple[int, int, int]
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
    instructions: int
    load: int
    """Bytes of the widest read of global memory."""
    store: int
    wide_loads: int
    predicated: int
    """How many of these are predicated."""
    wide_stores: int
    request: Request = Request()
    """To images or features, where most scattered; none where that was not asked."""


def launches_of(
    operator: Callable[..., Any], *args: Any, overlap: int = 1
) -> list[tuple[Any, ...]]:
    """What an operator would launch; its tensors need no memory."""
    recorded: list[tuple[Any, ...]] = []

    with (
        mock.patch.object(operators, "launch", recorded.append),
        mock.patch.object(operators, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(operators, "overlaps", lambda device, number: overlap > 2 - number),
    ):
        operator(*args)
    return recorded


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def saliency_graft(images: Tensor, overlap: int = 1, **options: Any) -> list[tuple[Any, ...]]:
    """The launches of a call with class ids, a drawn pairing and a drawn p; ``overlap`` of the two
    start while the kernel before ends.
    """
    source = options.get("saliency", options.get("features"))
    grid_size = options.pop("grid_size", tuple(source.shape[-2:]))
    call = Call(
        images=images,
        seed=meta(1, dtype=torch.int64),
        grid_size=grid_size,
        temperature=0.2,
        threshold=1 / (grid_size[0] * grid_size[1]),
        normalize=NORMALIZE.index("max"),
        norm=NORM.index("l1"),
        targets=meta(images.shape[0], dtype=torch.int64),
        num_classes=1000,
        step=meta(1, dtype=torch.int64),
        quantiles=meta(1025, dtype=torch.int64),
        **options,
    )
    return launches_of(operators.saliency_graft, *call, overlap=overlap)


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
                recorded = saliency_graft(images, features=features)[0]
                name = f"saliency {channels}x{side}x{side} {short[dtype]}{' cl' if last else ''}"
                yield Launch(name, *recorded, size(features), True)
    for batch, side, cells in ((128, 32, 8), (256, 224, 7)):
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            for last in (False, True):
                images = meta(batch, 3, side, side, dtype=dtype, channels_last=last)
                features = meta(batch, 2048, cells, cells, dtype=torch.bfloat16)
                recorded = saliency_graft(images, features=features)[1]
                name = f"graft {side}x{side} {cells}x{cells} {short[dtype]}{' cl' if last else ''}"
                yield Launch(name, *recorded, 2 * size(images), True)
    for last in (False, True):
        images = meta(256, 3, 224, 224, dtype=torch.uint8, channels_last=last)
        features = meta(256, 2048, 7, 7, dtype=torch.bfloat16)
        affine = meta(2, 3, dtype=torch.float32)
        dtype = DTYPES.index(torch.bfloat16)
        recorded = saliency_graft(images, features=features, affine=affine, dtype=dtype)[1]
        name = f"graft 224x224 7x7 u8 to bf16{' cl' if last else ''}"
        yield Launch(name, *recorded, 3 * size(images), True)


def other_kernels() -> Iterator[Launch]:
    """The rest: every kernel and every layout, once."""
    images = meta(64, 3, 224, 224, dtype=torch.bfloat16)
    odd, sliced = meta(64, 3, 33, 31, dtype=torch.bfloat16), images[:, :, ::2, ::2]
    ready = meta(64, 224, 224, dtype=torch.float32)
    fine = meta(64, 64, 64, dtype=torch.float32)
    features = meta(64, 512, 7, 7, dtype=torch.bfloat16)
    strided = features[:, :, 1:, 1:]
    mask, index = meta(64, 7, 7, dtype=torch.bool), meta(64, dtype=torch.int64)
    rows, lam = meta(64, 1000, dtype=torch.float32), meta(64, dtype=torch.float32)

    alone = launches_of(operators.channel_saliency, features)[0]
    given = saliency_graft(images, saliency=ready, grid_size=(7, 7))[0]
    large = saliency_graft(images, saliency=fine)
    yield Launch("saliency alone", *alone, size(features), True)
    yield Launch("saliency given", *given, size(ready), False)
    recorded = saliency_graft(images, features=strided)[0]
    yield Launch("saliency strided", *recorded, size(strided), False)
    recorded = saliency_graft(images, features=features, k=9)[1]
    yield Launch("graft topk", *recorded, 2 * size(images), True)
    recorded = saliency_graft(images, features=features, mask=mask)[1]
    yield Launch("graft given mask", *recorded, 2 * size(images), True)
    recorded = saliency_graft(images, overlap=0, features=features)[1]
    yield Launch("graft, no overlap", *recorded, 2 * size(images), True)
    recorded = saliency_graft(images, overlap=2, features=features)[0]
    yield Launch("saliency, overlaps", *recorded, size(features), True)
    for name, tensor in (("graft odd sizes", odd), ("graft strided", sliced)):
        recorded = saliency_graft(tensor, features=features)[1]
        yield Launch(name, *recorded, 2 * size(tensor), False)
    yield Launch("cells of 64x64", *large[1], size(fine), False)
    yield Launch("graft from memory", *large[2], 2 * size(images), False)
    plain = launches_of(operators.graft, images, mask, index)[0]
    yield Launch("graft alone", *plain, 2 * size(images), True)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        grad = images.to(dtype)
        back = launches_of(operators.graft_backward, grad, mask, index, 1)[0]
        yield Launch(f"graft_backward {name}", *back, 2 * size(grad), True)
    mixed = launches_of(operators.mix_targets, rows, lam, index, 1000, 0.1)[0]
    yield Launch("mix_targets", *mixed, 3 * size(rows), False)


def compile_launch(launch: Launch, target: str) -> Any:
    """Compiles a launch exactly as it would be at run time on ``target``."""
    gpu = TARGETS[target]
    function, constants = launch.function, launch.constants
    two = operators.saliency_kernel, operators.saliency_graft_kernel
    if function in two and not (gpu.backend == "cuda" and gpu.arch >= 90):
        constants = (*constants[:-1], False)  # the last is OVERLAPS
    return triton.compile(
        source(function, launch.arguments, constants),
        target=gpu,
        options=options_of(function, launch.threads, constants, gpu.warp_size),
    )


def read_ptx(kernel: Any, request: Request) -> Compiled:
    accesses = re.findall(
        r"(@%p\d+ )?(ld|st)\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"]
    )
    widths: dict[str, list[tuple[int, bool]]] = {"ld": [], "st": []}
    for predicate, kind, vector, bits in accesses:
        widths[kind].append((int(vector or 1) * int(bits) // 8, bool(predicate)))
    usage, sass = dump_kernel("-res-usage", kernel), dump_kernel("-sass", kernel)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]),
        spills=int(found[2]),
        shared=kernel.metadata.shared,
        instructions=count_instructions(sass),
        load=max(width for width, _ in widths["ld"]),
        store=max(width for width, _ in widths["st"]),
        wide_loads=sum(width == WIDE for width, _ in widths["ld"]),
        predicated=sum(width == WIDE and predicated for width, predicated in widths["ld"]),
        wide_stores=sum(width == WIDE for width, _ in widths["st"]),
        request=request,
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

    wide_loads = widths["load"].count(WIDE)
    return Compiled(
        registers=note("vgpr_count"),
        spills=note("vgpr_spill_count"),  # scalar registers spill to vector registers
        shared=kernel.metadata.shared,
        instructions=len(re.findall(r"^\t(?:[vs]|ds|global|buffer|flat)_", assembly, re.MULTILINE)),
        load=max(widths["load"], default=0),
        store=max(widths["store"], default=0),
        wide_loads=wide_loads,
        predicated=wide_loads,  # by the execution mask
        wide_stores=widths["store"].count(WIDE),
    )


def examine(position: int, target: str) -> Compiled:
    launch = LAUNCHES[position]
    kernel = compile_launch(launch, target)
    if "ptx" not in kernel.asm:
        return read_amdgcn(kernel)
    if not launch.wide:
        return read_ptx(kernel, Request())
    arguments = (*launch.arguments, *launch.constants)
    return read_ptx(kernel, worst_request(kernel.asm["ttgir"], arguments))


MAIN_SHAPES = list(main_shapes())
LAUNCHES = [*MAIN_SHAPES, *other_kernels()]


def faults(launch: Launch, target: str, compiled: Compiled) -> list[str]:
    """What a launch must not do."""
    found = []
    # The 64 threads of an AMD warp share the 32 chunks of a tile that is standardised.
    halved = TARGETS[target].warp_size == 64 and "u8 to" in launch.name
    if compiled.spills:
        found.append(f"spills {compiled.spills} bytes")
    if launch.wide and compiled.load < (WIDE // 2 if halved else WIDE):
        found.append(f"reads at most {compiled.load} bytes at a time")
    if launch.wide and "graft" in launch.name and compiled.store < WIDE:
        found.append(f"writes at most {compiled.store} bytes at a time")
    if compiled.request.scattered:
        found.append("a warp touches {} bytes in {} sectors, {} lines".format(*compiled.request))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--main", action="store_true", help="the main shapes alone")
    arguments = parser.parse_args()
    count = len(MAIN_SHAPES if arguments.main else LAUNCHES)
    tasks = [(position, target) for position in range(count) for target in arguments.targets]
    with ProcessPoolExecutor() as pool:
        examined = pool.map(examine, *zip(*tasks))
        results = list(
            tqdm(examined, total=len(tasks), unit="kernel", disable=not sys.stderr.isatty())
        )
    rows, failures = [], []
    for (position, target), compiled in zip(tasks, results):
        launch = LAUNCHES[position]
        request = compiled.request if compiled.request.bytes else (None, None, None)
        rows.append((launch.name, target, *compiled[:-1], *request, launch.bytes / 1e6))
        rows[-1] += (launch.bytes / COPY_BANDWIDTH["H200"] * 1e6,)
        found = faults(launch, target, compiled)
        failures += [f"{launch.name}, {target}: {fault}" for fault in found]
    print(f"Triton {triton.__version__}; load and store: bytes of the widest; wide: 16 bytes")
    print("request: the bytes that a warp touches at once, where most scattered")
    heads = ("kernel", "target", *Compiled._fields, "sectors", "lines", "MB", "us")
    print(tabulate(rows, [head.replace("_", " ") for head in heads], floatfmt=".1f"))
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
