"""Counts the cycles of launch 2 until it copies, and until a row's label is written.

    python -m benchmarks.compiled.cycles

A model, to hold one version of the kernel against another; it times nothing. The compiler writes
into each instruction after how many cycles the next may issue, and which of six scoreboards an
instruction of unknown duration sets or waits for. The model adds this up for one warp alone, on the
shortest way through the code past landmarks, such as the loads of a map, as often as they are met.
What the compiler does not know takes MEMORY cycles for images, L2 for what launch 1 has just
written, and ON_CHIP for shuffles, shared memory, conversions and the like. Fetching instructions
and other warps cost nothing here; where several warps share a scheduler, the count of instructions
weighs more than the cycles.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from tabulate import tabulate

from benchmarks.compiled.cuobjdump import dump_kernel
from benchmarks.compiled.requests import Request
from benchmarks.compiled.triton_kernels import (
    Launch,
    compile_launch,
    meta,
    read_ptx,
    saliency_graft,
    size,
)
from sg_kernels.backends.triton.arguments import Cells, Options
from sg_kernels.backends.triton.rows import COLUMNS

MEMORY, L2, ON_CHIP = 650, 280, 25
"""Cycles."""
CONTROL = 41
"""First control bit in the upper half of an instruction, from sm_70 on: four of the stall, one that
is no matter here, three each of the scoreboards it sets, and six of those it waits for."""

INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?(\S[^;]*?) *; +/\* 0x\w{16} \*/\s+/\* 0x(\w{16}) \*/"
)
MAP, IMAGE = r"LDG\.E R", r"LDG\.E\.128 "
COPY, MASK, LABEL = r"STG\.E\.128 ", r"STG\.E\.U8 ", r"STG\.E desc"
"""Landmarks. Labels are what is written of a row in float32: its saliency, lam and target."""


class Instruction(NamedTuple):
    address: int
    conditional: bool
    text: str
    stall: int
    """Cycles until the next may issue."""
    sets: tuple[int, int]
    """The scoreboards of its result and of having read its operands; 7 for none."""
    waits: list[int]

    def duration(self) -> int:
        if not self.text.startswith("LDG"):
            return ON_CHIP
        return MEMORY if re.match(IMAGE, self.text) else L2


def parse(sass: str) -> list[Instruction]:
    code = []
    for address, predicate, text, upper in INSTRUCTION.findall(sass):
        control = int(upper, 16) >> CONTROL
        sets = control >> 5 & 7, control >> 8 & 7
        waits = [board for board in range(6) if control >> 11 + board & 1]
        conditional = bool(predicate or re.match(r"BRA !?U?P\w+,", text))
        code.append(Instruction(int(address, 16), conditional, text, control & 15, sets, waits))
    return code


def successors(code: list[Instruction], position: int) -> Iterator[int]:
    """What may follow. A call, of the slow way of a division, is stepped over."""
    instruction = code[position]
    jumps = instruction.text.startswith("BRA")
    ends = instruction.text.startswith(("EXIT", "RET"))
    if instruction.conditional or not (jumps or ends):
        yield position + 1
    if jumps:
        target = int(re.findall(r"0x(\w+)", instruction.text)[-1], 16)
        yield next(i for i, other in enumerate(code) if other.address == target)


def shortest(code: list[Instruction], start: int, landmark: str) -> list[int]:
    """The fewest instructions after ``start`` that lead to one that begins like the landmark."""
    before: dict[int, int] = {}
    queue = deque([start])
    while queue:
        position = queue.popleft()
        for following in successors(code, position):
            if following in before:
                continue
            before[following] = position
            if re.match(landmark, code[following].text):
                way = [following]
                while before[way[-1]] != start:
                    way.append(before[way[-1]])
                return way[::-1]
            queue.append(following)
    raise ValueError(f"no way from {code[start].address:#x} to {landmark}")


def way_past(code: list[Instruction], landmarks: list[str]) -> list[int]:
    way = [0]
    for landmark in landmarks:
        way += shortest(code, way[-1], landmark)
    return way


def issued(code: list[Instruction], way: list[int]) -> list[int]:
    """The cycle in which each instruction on the way issues."""
    clock, ready, cycles = 0, [0] * 8, []
    for instruction in [code[position] for position in way]:
        clock = max([clock, *(ready[board] for board in instruction.waits)])
        cycles.append(clock)
        result, operands = instruction.sets
        ready[result] = max(ready[result], clock + instruction.duration())
        ready[operands] = max(ready[operands], clock + ON_CHIP)
        clock += instruction.stall + ON_CHIP * instruction.text.startswith("BAR")
    return cycles


class Count(NamedTuple):
    instructions_to_load: int
    load: int
    """Cycles to the first load of an image."""
    last_load: int
    """To the last of the first tile."""
    label: int
    """To the last store of a row's label, by a program that copies nothing."""


def count(launch: Launch, sass: str) -> Count:
    """Of a launch 2 whose grid has the size of the map."""
    group = {type(argument): argument for argument in (*launch.arguments, *launch.constants)}
    cells, rounds = group[Cells], -(-group[Options].num_classes // COLUMNS.value)
    assert not cells.resampled
    held = cells.cells // launch.threads
    grid = [MAP] * held * cells.splits
    saliency = [LABEL] * held * (cells.splits > 1)
    lam_and_target = [LABEL] * (1 + rounds * COLUMNS.value // launch.threads)

    code = parse(sass)
    way = way_past(code, [*grid, COPY])
    images = [step for step, i in enumerate(way) if re.match(IMAGE, code[i].text)]
    cycles = issued(code, way)
    label = way_past(code, [*grid, MASK, *saliency, *grid, *lam_and_target])
    return Count(images[0], cycles[images[0]], cycles[images[-1]], issued(code, label)[-1])


def launches() -> Iterator[Launch]:
    """Launch 2 for a ResNet-50, for CIFAR and for a ViT."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    for name, batch, side, features, dtype, last in (
        ("224x224 bf16 cl, 2048x7x7", 256, 224, (2048, 7, 7), bf16, True),
        ("32x32 fp32, 640x8x8", 128, 32, (640, 8, 8), fp32, False),
        ("224x224 fp16, 768x14x14", 256, 224, (768, 14, 14), fp16, False),
    ):
        images = meta(batch, 3, side, side, dtype=dtype, channels_last=last)
        source = meta(batch, *features, dtype=dtype, channels_last=last)
        yield Launch(name, *saliency_graft(images, features=source)[1], 2 * size(images), True)


def main() -> None:
    rows = []
    for launch in launches():
        kernel = compile_launch(launch, "sm_90")
        compiled = read_ptx(kernel, Request())
        counted = count(launch, dump_kernel("-sass", kernel))
        code = compiled.instructions * 16 / 1024
        rows.append((launch.name, *counted, compiled.registers, compiled.instructions, code))
    print(f"Triton {triton.__version__}, sm_90: cycles of launch 2 by a model; code in KiB")
    heads = ("images, features", *Count._fields, "registers", "instructions", "code")
    print(tabulate(rows, [head.replace("_", " ") for head in heads], floatfmt=".1f"))


if __name__ == "__main__":
    main()
