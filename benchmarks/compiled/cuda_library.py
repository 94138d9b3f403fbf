"""Reads what nvcc made of csrc/cuda from the library that is built.

    python -m benchmarks.compiled.cuda_library [LIBRARY]

Prints registers, spills, shared memory and occupancy of each kernel on each GPU it is built for.
Fails on a spill, and if a kernel of images or features has no access of 16 bytes.
"""

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from tabulate import tabulate

from benchmarks.compiled.cuobjdump import count_instructions, dump
from sg_kernels import backends

THREADS = 256
"""Of a block: kThreads in csrc/cuda."""
REGISTERS = 65536
"""Of a multiprocessor."""
LIMITS = {"sm_80": (164, 2048), "sm_90": (228, 2048), "sm_100": (228, 2048), "sm_120": (100, 1536)}
"""KiB of shared memory, and threads, of a multiprocessor (CUDA C++ Programming Guide)."""
READERS = {"saliency_kernel"}
"""Kernels that must read 16 bytes at a time."""
COPIERS = {"saliency_graft_kernel", "graft_rows_kernel", "graft_kernel", "graft_backward_kernel"}
"""Kernels that must read and write 16 bytes at a time."""


class Kernel(NamedTuple):
    name: str
    target: str
    registers: int
    spills: int
    """Bytes of stack, which holds nothing else."""
    shared: int
    instructions: int
    wide_loads: int
    wide_stores: int

    def blocks(self) -> int:
        """How many run at once on a multiprocessor."""
        shared, threads = LIMITS[self.target]
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        by_shared = shared // (-(-self.shared // 1024) + 1)  # the system reserves one KiB
        return min(by_registers, by_shared, threads // THREADS)

    def occupancy(self) -> float:
        return self.blocks() * THREADS / LIMITS[self.target][1]


def by_target(option: str, library: str) -> Iterator[tuple[str, str]]:
    """Each target and what cuobjdump prints of its code."""
    text = dump(option, library)
    for section in re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]:
        target = re.search(r"arch = (sm_\w+)", section)
        assert target
        yield target[1], section


def readable(mangled: str) -> str:
    match = re.search(r"\d([a-z][a-z_]*_kernel)(?!s)(?:I(?:N3c1\d+)?([a-zA-Z]\w*?)E)?", mangled)
    assert match
    numbers = {"d": "double", "f": "float", "Half": "half", "BFloat16": "bfloat16"}
    numbers["Lb1"] = "standardised"
    return f"{match[1]}<{numbers[match[2]]}>" if match[2] in numbers else match[1]


def kernels(library: str) -> Iterator[Kernel]:
    code = {}
    for target, section in by_target("--dump-sass", library):
        for function in section.split("Function : ")[1:]:
            name, _, sass = function.partition("\n")
            code[target, name.strip()] = (
                count_instructions(sass),
                len(re.findall(r"\bLDG?\.E[.\w]*\.128", sass)),
                len(re.findall(r"\bSTG?\.E[.\w]*\.128", sass)),
            )
    usage = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    for target, section in by_target("--dump-resource-usage", library):
        for mangled, *numbers in usage.findall(section):
            yield Kernel(readable(mangled), target, *map(int, numbers), *code[target, mangled])


def faults(kernel: Kernel) -> list[str]:
    """What a kernel must not do."""
    found = []
    name = kernel.name.partition("<")[0]
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes")
    if name in READERS | COPIERS and not kernel.wide_loads:
        found.append("never reads 16 bytes at a time")
    if name in COPIERS and not kernel.wide_stores:
        found.append("never writes 16 bytes at a time")
    return found


def main() -> None:
    library = sys.argv[1] if len(sys.argv) > 1 else str(backends.CUDA_LIBRARY)
    found = sorted(kernels(library))
    rows = [(*kernel, kernel.blocks(), f"{kernel.occupancy():.0%}") for kernel in found]
    heads = (*Kernel._fields, "blocks", "occupancy")
    print(tabulate(rows, [head.replace("_", " ") for head in heads]))
    failures = [f"{k.name}, {k.target}: {fault}" for k in found for fault in faults(k)]
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
