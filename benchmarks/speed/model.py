"""What a call of the Triton backend should take on GPUs on which it has not been measured.

A launch takes the time of its bytes at the bandwidth of a copy, of the boundary to the launch
before it, and of the way to its first tile. Launch 2 starts while launch 1 ends, which hides a part
of its boundary. Images count once, as in the floor. Left out are waits within a launch, so
predictions are rather too low.
"""

import math
from typing import NamedTuple

import pandas as pd

from benchmarks.speed import cases
from benchmarks.speed.candidates import FIRST
from benchmarks.speed.cases import COPY_BANDWIDTH, Case, features_bytes, floor_bytes
from benchmarks.speed.compare import N_CALLS, OVER_FLOOR, OVER_LARGER_FLOOR, OVER_STANDARDIZING
from benchmarks.speed.measure import DEVICE_COUNTERS
from benchmarks.speed.step import HALF, OVER_CUTMIX

BOUNDARY, OVERLAP = 1.0e-6, 0.7e-6
"""Seconds from the end of a kernel to the start of the next, and those of them that are hidden."""
CYCLES, CLOCK = 1301, 1.75e9
"""From the start of launch 2 to the last load of its first tile, counted in its machine code for
sm_90 and taken for launch 1 too; and cycles per second."""
FORWARD = 1 / 3
"""Of a training step: the backward pass takes twice as long as the forward pass."""
PASSES, PIXELS = 1 / 2, 1 / 4
"""Of the recipe half at half the resolution: the share of steps with a clean pass, and its size."""
LAUNCHES, SYNCS, _ = DEVICE_COUNTERS
CIFAR, IMAGENET = cases.headline("cuda", quick=False)
UINT8, SEVERAL = cases.standardized("cuda", quick=False), cases.several("cuda", quick=False)
CIFAR_SEVERAL = cases.growth(quick=False)["augmentations"][2]
Key = tuple[str, str, str]
"""A case, a candidate and a figure."""


class Range(NamedTuple):
    low: float
    high: float


def launch_time(size: int, bandwidth: float, overlaps: bool = False) -> float:
    """In seconds."""
    return BOUNDARY - OVERLAP * overlaps + CYCLES / CLOCK + size / bandwidth


def copied_bytes(case: Case) -> int:
    """Of launch 2."""
    return floor_bytes(case) - features_bytes(case)


def call_time(case: Case, bandwidth: float, extra: int = 0) -> float:
    """In seconds, where launch 2 moves ``extra`` bytes beyond the floor's."""
    first = launch_time(features_bytes(case), bandwidth)
    return first + launch_time(copied_bytes(case) + extra, bandwidth, overlaps=True)


def call_times(case: Case, bandwidth: float) -> Range:
    """In seconds: where caches hold images from one augmentation to the next, and where not."""
    again = (case.augmentations - 1) * math.prod(case.images) * case.dtype.itemsize
    return Range(call_time(case, bandwidth), call_time(case, bandwidth, again))


def over_calls(case: Case, bandwidth: float) -> Range:
    """One call over as many calls as it has augmentations."""
    calls = case.augmentations * call_time(case._replace(augmentations=1), bandwidth)
    return Range(*(time / calls for time in call_times(case, bandwidth)))


def standardizing_times(case: Case, bandwidth: float) -> tuple[float, float]:
    """Seconds to standardise in the three kernels of plain PyTorch, and in one."""
    assert case.standardized is not None
    pixels, out = math.prod(case.images), case.standardized.itemsize
    one = launch_time(pixels * (case.dtype.itemsize + out), bandwidth)
    return one + 2 * launch_time(2 * pixels * out, bandwidth), one


def predictions(bandwidth: float) -> dict[Key, Range]:
    """The figures of a GPU whose copy has that bandwidth."""
    time = {case: call_time(case, bandwidth) for case in (CIFAR, IMAGENET, UINT8)}
    floor = {case: floor_bytes(case) / bandwidth for case in (CIFAR, IMAGENET)}
    three, one = standardizing_times(UINT8, bandwidth)
    grafting = call_time(UINT8._replace(dtype=UINT8.map_dtype, standardized=None), bandwidth)
    single = {
        (IMAGENET.name, "triton", OVER_FLOOR): time[IMAGENET] / floor[IMAGENET],
        (IMAGENET.name, "triton", LAUNCHES): launches(IMAGENET),
        (IMAGENET.name, "triton", SYNCS): 0,
        (CIFAR.name, "triton", OVER_LARGER_FLOOR): time[CIFAR] / max(floor[CIFAR], 2 * BOUNDARY),
        (UINT8.name, "triton", OVER_STANDARDIZING): time[UINT8] / three,
        (UINT8.name, FIRST + "triton", "time / triton"): (one + grafting) / time[UINT8],
        ("ResNet-50", HALF.format("triton"), OVER_CUTMIX): 1 + PASSES * PIXELS * FORWARD,
    }
    several = {
        (case.name, "triton", N_CALLS): over_calls(case, bandwidth)
        for case in (SEVERAL, CIFAR_SEVERAL)
    }
    return {key: Range(value, value) for key, value in single.items()} | several


def launches(case: Case) -> int:
    """Counted on tensors without values, so for none of them does the call wait."""
    from benchmarks.compiled.triton_kernels import meta, saliency_graft

    images = meta(*case.images, dtype=case.dtype, channels_last=case.channels_last)
    features = meta(*case.features, dtype=case.map_dtype, channels_last=case.channels_last)
    return len(saliency_graft(images, features=features))


def table() -> pd.DataFrame:
    """What a call moves in each launch, and the microseconds that it takes at least."""
    lines = []
    for case in (IMAGENET, UINT8, SEVERAL, CIFAR, CIFAR_SEVERAL):
        line = {"case": case.name, "launch 1, MB": f"{features_bytes(case) / 1e6:.1f}"}
        line["launch 2, MB"] = f"{copied_bytes(case) / 1e6:.1f}"
        for gpu, bandwidth in COPY_BANDWIDTH.items():
            times = dict.fromkeys(f"{1e6 * time:.1f}" for time in call_times(case, bandwidth))
            line[f"{gpu}: floor, us"] = f"{1e6 * floor_bytes(case) / bandwidth:.1f}"
            line[f"{gpu}: predicted, us"] = " to ".join(times)
        lines.append(line)
    return pd.DataFrame(lines)


def assumptions() -> str:
    copies = ", ".join(
        f"{gpu} {bandwidth / 1e12:.1f} TB/s" for gpu, bandwidth in COPY_BANDWIDTH.items()
    )
    return (
        f"Assumed: bandwidth of a copy {copies}; {1e6 * BOUNDARY:.1f} us from one kernel to the "
        f"next, of which launch 2 hides {1e6 * OVERLAP:.1f} us; {CYCLES} cycles at "
        f"{CLOCK / 1e9:.2f} GHz from the start of a kernel to its first tile."
    )
