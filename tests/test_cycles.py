"""What `make aot` counts of the cycles of a kernel, on machine code made by hand."""

import pytest

from sg_kernels import backends

if backends._UNLOADED["triton"]:
    pytest.skip(backends._UNLOADED["triton"], allow_module_level=True)

from benchmarks.compiled import cycles
from benchmarks.compiled.cuobjdump import count_instructions, dump_kernel
from benchmarks.compiled.triton_kernels import compile_launch

DUMPED = """
        /*0020*/                   S2UR UR22, SR_CTAID.X ;               /* 0x00000000001679c3 */
                                                                         /* 0x000e220000002500 */
        /*00b0*/                   IABS R3, UR22 ;                       /* 0x0000001600037c13 */
                                                                         /* 0x001fe40008000000 */
        /*00e0*/                   MUFU.RCP R0, R0 ;                     /* 0x0000000000007308 */
                                                                         /* 0x004e300000001000 */
        /*27f0*/              @!P2 BRA 0x51d0 ;                          /* 0x00000018003ca947 */
                                                                         /* 0x000fea0003800000 */
"""
"""As cuobjdump prints it."""

NONE = 7
"""In place of a scoreboard."""


def line(address, text, stall=1, sets=(NONE, NONE), waits=()):
    """An instruction as cuobjdump prints it. Its lower half does not matter here."""
    control = stall | sets[0] << 5 | sets[1] << 8 | sum(1 << 11 + board for board in waits)
    return f"/*{address:04x}*/  {text} ; /* 0x{0:016x} */\n /* 0x{control << 41:016x} */\n"


def cycles_of(sass, *landmarks):
    code = cycles.parse(sass)
    way = cycles.way_past(code, list(landmarks))
    return [code[i].address for i in way], cycles.issued(code, way)


def test_instructions_are_read_as_they_are_printed():
    place, absolute, reciprocal, branch = cycles.parse(DUMPED)
    assert place == (0x20, False, "S2UR UR22, SR_CTAID.X", 1, (0, NONE), [])
    assert absolute == (0xB0, False, "IABS R3, UR22", 2, (NONE, NONE), [0])
    assert reciprocal == (0xE0, False, "MUFU.RCP R0, R0", 8, (0, NONE), [2])
    assert branch[:4] == (0x27F0, True, "BRA 0x51d0", 5)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("LDG.E R2, desc[UR4][R2.64]", cycles.L2),
        ("@P0 LDG.E.128 R4, desc[UR4][R2.64]", cycles.MEMORY),
        ("SHFL.BFLY PT, R7, R4, 0x10, 0x1f", cycles.ON_CHIP),
    ],
)
def test_an_instruction_waits_for_those_that_set_its_scoreboards(text, duration):
    sass = line(0, "MOV R0, R1", stall=3) + line(16, text, stall=4, sets=(2, NONE))
    sass += line(32, "IADD3 R0, R0, 0x1, RZ", stall=5) + line(48, "FADD R3, R2, R2", waits=[2])
    sass += line(64, "STG.E desc[UR4][R2.64], R3", sets=(NONE, 1)) + line(80, "EXIT", waits=[1])
    _, issued = cycles_of(sass, "EXIT")
    assert issued[:3] == [0, 3, 7]
    assert issued[3:] == [3 + duration, 4 + duration, 4 + duration + cycles.ON_CHIP]


def test_instructions_that_share_a_scoreboard_are_all_waited_for():
    sass = line(0, "LDG.E.128 R4, desc[UR4][R2.64]", stall=2, sets=(0, NONE))
    sass += line(16, "LDG.E R2, desc[UR4][R2.64]", sets=(0, NONE)) + line(32, "EXIT", waits=[0])
    assert cycles_of(sass, "EXIT")[1] == [0, 2, cycles.MEMORY]


LOOP = (
    line(0, "MOV R0, R1")
    + line(16, "@!P0 BRA 0x50")  # past the loop
    + line(32, "LDG.E R2, desc[UR4][R2.64]", sets=(0, NONE))
    + line(48, "FADD R3, R3, R2", waits=[0])
    + line(64, "@P1 BRA 0x20")
    + line(80, "@P2 EXIT")
    + line(96, "BRA 0x80")
    + line(112, "STG.E.128 desc[UR4][R2.64], R4")  # reached by nothing
    + line(128, "STG.E desc[UR4][R2.64], R3")
    + line(144, "EXIT")
)


def test_the_way_is_the_shortest_past_the_landmarks():
    ways = {
        0: [0, 16, 80, 96, 128],
        1: [0, 16, 32, 48, 64, 80, 96, 128],
        2: [0, 16, 32, 48, 64, 32, 48, 64, 80, 96, 128],
    }
    for loads, expected in ways.items():
        way, issued = cycles_of(LOOP, *[cycles.MAP] * loads, cycles.LABEL)
        assert way == expected
        assert issued[-1] == loads * cycles.L2 + len(way) - 1 - loads


def test_what_cannot_be_reached_is_an_error():
    with pytest.raises(ValueError, match="no way from 0x0 to STG"):
        cycles_of(LOOP, cycles.COPY)


@pytest.mark.skipif(backends.INTERPRETED, reason="nothing is compiled")
def test_the_compiler_sets_scoreboards_as_they_are_read_here():
    """On a whole kernel: what it knows the duration of sets none, what it does not sets one."""
    launch = next(cycles.launches())
    sass = dump_kernel("-sass", compile_launch(launch, "sm_90"))
    code = cycles.parse(sass)
    assert len(code) == count_instructions(sass)
    loads = [i for i in code if i.text.startswith(("LDG", "SHFL", "MUFU"))]
    sums = [i for i in code if i.text.startswith(("FADD", "IADD3", "LOP3", "IMAD.MOV"))]
    assert sum(i.sets[0] < 6 for i in loads) > 0.9 * len(loads)  # the last of several may do
    assert all(i.sets == (NONE, NONE) for i in sums)
    assert all(i.stall > 0 for i in sums)
    counted = cycles.count(launch, sass)
    assert cycles.L2 < counted.load <= counted.last_load < counted.load + cycles.MEMORY
    assert counted.label > 2 * cycles.L2
