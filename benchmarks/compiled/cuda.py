"""Reads what nvcc made of csrc/cuda from the library that is built.

    python -m benchmarks.aot_cuda [LIBRARY]

Prints registers, spills, shared memory and occupancy of each kernel on each GPU it is built for.
Fails on a spill, and where the kernels of images and features have no access of 16 bytes.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.aot import CUOBJDUMP
from sg_kernels import backends

THREADS = 256
REGISTERS = 65536
LIMITS = {"sm_80": (164, 2048), "sm_90": (228, 2048), "sm_100": (228, 2048), "sm_120": (100, 1536)}
"""KiB of shared memory, and threads, of a multiprocessor (CUDA C++ Programming Guide)."""
WIDE = (
    "saliency_kernel",
    "saliency_graft_kernel",
    "graft_rows_kernel",
    "graft_kernel",
    "graft_backward_kernel",
)
ROWS = "{:<32} {:<7} {:>5} {:>6} {:>7} {:>7} {:>10} {:>11} {:>11}"


class Kernel(NamedTuple):
    name: str
    target: str
    registers: int
    stack: int
    """Bytes: what is spilled lies there, and nothing else does."""
    shared: int
    wide_loads: int
    wide_stores: int

    def blocks(self) -> int:
        """How many run at once on a multiprocessor."""
        shared, threads = LIMITS[self.target]
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        by_shared = shared // (-(-self.shared // 1024) + 1)  # one KiB is the system's
        return min(by_registers, by_shared, threads // THREADS)

    def occupancy(self) -> float:
        return self.blocks() * THREADS / LIMITS[self.target][1]


def dump(what: str, library: str) -> list[str]:
    """The library's code by target."""
    command = [CUOBJDUMP, what, library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]


def readable(mangled: str) -> str:
    match = re.search(r"\d([a-z][a-z_]*_kernel)(?!s)(?:I(?:N3c1\d+)?([a-zA-Z]\w*?)E)?", mangled)
    assert match
    numbers = {"d": "double", "f": "float", "Half": "half", "BFloat16": "bfloat16"}
    return f"{match[1]}<{numbers[match[2]]}>" if match[2] in numbers else match[1]


def kernels(library: str) -> Iterator[Kernel]:
    accesses = {}
    for section in dump("--dump-sass", library):
        target = re.search(r"arch = (sm_\w+)", section)
        for function in section.split("Function : ")[1:]:
            code = function.partition("\n")
            assert target
            accesses[target[1], code[0].strip()] = (
                len(re.findall(r"\bLDG?\.E[.\w]*\.128", code[2])),
                len(re.findall(r"\bSTG?\.E[.\w]*\.128", code[2])),
            )
    usage = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    for section in dump("--dump-resource-usage", library):
        target = re.search(r"arch = (sm_\w+)", section)
        for mangled, *numbers in usage.findall(section):
            assert target
            wide = accesses[target[1], mangled]
            yield Kernel(readable(mangled), target[1], *map(int, numbers), *wide)


def faults(kernel: Kernel) -> list[str]:
    """What a kernel must not do."""
    found = []
    name = kernel.name.partition("<")[0]
    if kernel.stack:
        found.append(f"spills {kernel.stack} bytes")
    if name in WIDE and not kernel.wide_loads:
        found.append("reads no 16 bytes at a time")
    if name in WIDE[1:] and not kernel.wide_stores:
        found.append("writes no 16 bytes at a time")
    return found


def main() -> None:
    library = sys.argv[1] if len(sys.argv) > 1 else str(backends.CUDA_LIBRARY)
    heads = ("kernel", "target", "regs", "spills", "shared", "blocks", "occupancy")
    print(ROWS.format(*heads, "wide loads", "wide stores"))
    failures = []
    for kernel in sorted(kernels(library)):
        occupancy = f"{kernel.occupancy():.0%}"
        print(ROWS.format(*kernel[:5], kernel.blocks(), occupancy, *kernel[5:]))
        failures += [f"{kernel.name}, {kernel.target}: {fault}" for fault in faults(kernel)]
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
