"""The compiled CPU backend against eager PyTorch, torch.compile and copies of the same bytes.

    python benchmarks/compare_cpu.py            everything, into benchmarks/results/cpu.{csv,png}
    python benchmarks/compare_cpu.py --quick    a smoke run, whose numbers mean little

The candidates of a shape run in turn, round by round, and a ratio is the median of the rounds' own
ratios: a slow spell of the machine meets both sides. All candidates work on the same inputs, each
on what the one before it left in the caches; what a call returns is freed outside of the timing.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import sg_kernels
from sg_kernels import ops, reference, rng

BACKEND = "cpp"
SHAPES = {  # images, features
    "cifar": ((128, 3, 32, 32), (128, 640, 8, 8)),
    "imagenet": ((64, 3, 224, 224), (64, 2048, 7, 7)),
    "tiny": ((2, 3, 8, 8), (2, 16, 4, 4)),
}
RATIOS = {
    ("eager", "cpp"): (">=", 8.0),
    ("compiled", "cpp"): (">=", 3.0),
    ("cpp", "clone of the images"): None,
    ("cpp out=", "copy_ of the same bytes"): ("<=", 1.3),
    ("cpp out=, map given", "copy_ of the images"): None,
    ("cpp channel_saliency", "sum of the features"): None,
}
HOST_TARGET_US = 40.0
CALLS_PER_SAMPLE = 100  # one call of microseconds would drown in the clock's own cost
MEMORY_READINGS = 9
QUANTILES = rng.beta_quantiles(1.0)

Target = tuple[str, float] | None
Call = Callable[[], Any]


class Row(NamedTuple):
    """One number of the report: a median."""

    shape: str
    measure: str
    candidate: str
    value: float
    unit: str
    p20: float
    p80: float
    n: int
    bytes: int | None
    target: Target


def main() -> None:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="measured rounds (101)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--quick", action="store_true", help="5 rounds: does it run at all?")
    parser.add_argument("--output", type=Path, default=results / "cpu.csv", help="the CSV file")
    parser.add_argument("--probe-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if options.probe_memory:
        print(json.dumps(probe_memory(options.probe_memory)))
        return
    rounds = 5 if options.quick else options.rounds
    if BACKEND not in sg_kernels.available_backends():
        print(f"{BACKEND}: absent, {sg_kernels.unavailable_backends()[BACKEND]}")
    print(f"load average at the start: {os.getloadavg()[0]:.2f} (idle, if the times are to count)")
    gc.disable()  # a collection would land on whichever candidate runs just then
    rows = measure_shape("cifar", rounds) + measure_shape("imagenet", rounds)
    rows += measure_host_time(rounds) + measure_memory(options.threads)
    write_csv(rows, options)
    plot(rows, options.output.with_suffix(".png"))
    print_table(rows)


def make_data(shape: str) -> tuple[Tensor, Tensor]:
    # Random: pages of zeros may be one page that was never touched.
    images, features = SHAPES[shape]
    return torch.rand(images), torch.randn(features)


def operator_args(images: Tensor, features: Tensor, seed: Tensor) -> tuple[Any, ...]:
    """What saliency_graft(images, features, seed=seed) hands to its operator."""
    h, w = features.shape[2:]
    draws = (None, None, None, seed, None, 0, QUANTILES)
    selection = ((h, w), 0.2, "max", 1 / (h * w), None)
    return (images, features, *draws, *selection, "l1", 1.0, 1, False, 0, 0.0)


def plain(images: Tensor, features: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return reference.saliency_graft(*operator_args(images, features, seed))


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_shape(shape: str, rounds: int) -> list[Row]:
    images, features = make_data(shape)
    draw_seed = ops.draw_seed
    graft = partial(sg_kernels.saliency_graft, images, backend=BACKEND)
    torch._dynamo.reset()  # else the second shape would compile for dynamic sizes
    counters.clear()
    compiled = torch.compile(plain)

    seed = draw_seed()
    expected = sg_kernels.saliency_graft(images, features, seed=seed, backend="reference")
    masks = {
        "eager": plain(images, features, seed)[3],
        "compiled": compiled(images, features, seed)[3],
    }
    available = BACKEND in sg_kernels.available_backends()
    if available:
        masks["cpp"] = graft(features, seed=seed).mask
    for name, mask in masks.items():
        unlike = int((mask ^ expected.mask).sum())
        print(f"{shape}: {name} draws {unlike} of {mask.numel()} mask cells unlike the operator")
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    print(f"{shape}: torch.compile made {graphs} graph(s), {breaks} graph break(s)")

    whole, alone = nbytes(images, features, images), nbytes(images, images)
    out, saliency = torch.rand_like(images), expected.saliency
    half = features.flatten()[: features.numel() // 2]
    copied_images, copied_half = torch.rand_like(images), torch.rand_like(half)

    def copy_same_bytes() -> None:
        # Half of the features read and written is as many bytes as all of them read.
        copied_images.copy_(images)
        copied_half.copy_(half)

    channel_saliency = partial(sg_kernels.channel_saliency, features, backend=BACKEND)
    candidates: list[tuple[str, str, int, Call]] = [
        ("fresh outputs", "eager", whole, lambda: plain(images, features, draw_seed())),
        ("fresh outputs", "compiled", whole, lambda: compiled(images, features, draw_seed())),
        ("fresh outputs", "cpp", whole, lambda: graft(features)),
        ("fresh outputs", "clone of the images", alone, images.clone),
        ("out= given", "cpp out=", whole, lambda: graft(features, out=out)),
        ("out= given", "copy_ of the same bytes", whole, copy_same_bytes),
        ("map given", "cpp out=, map given", alone, lambda: graft(saliency=saliency, out=out)),
        ("map given", "copy_ of the images", alone, lambda: out.copy_(images)),
        ("saliency alone", "cpp channel_saliency", nbytes(features), channel_saliency),
        ("saliency alone", "sum of the features", nbytes(features), features.sum),
    ]
    if not available:
        candidates = [entry for entry in candidates if not entry[1].startswith("cpp")]
    samples = interleave(shape, {name: call for _, name, _, call in candidates}, rounds, 1)
    ratios = [
        summary(shape, "ratio", f"{a} / {b}", samples[a] / samples[b], "x", target=bound)
        for (a, b), bound in RATIOS.items()
        if a in samples and b in samples
    ]
    return ratios + [
        summary(shape, measure, name, samples[name] / 1e6, "ms", moved)
        for measure, name, moved, _ in candidates
    ]


def measure_host_time(rounds: int) -> list[Row]:
    """Calls on images so small that only the way to the kernels and back is left."""
    images, features = make_data("tiny")
    calls: dict[str, Call] = {}
    for backend in sg_kernels.available_backends():
        function = partial(sg_kernels.saliency_graft, images, features, backend=backend)
        args = operator_args(images, features, ops.draw_seed())
        module = sg_kernels.SaliencyGraft(backend=backend)
        calls[f"{backend} function"] = function
        calls[f"{backend} raw operator"] = partial(ops.overload("saliency_graft", backend), *args)
        calls[f"{backend} module"] = partial(module, images, features=features)
    samples = interleave("tiny", calls, rounds, CALLS_PER_SAMPLE)
    rows = []
    for backend in sg_kernels.available_backends():
        share = samples[f"{backend} raw operator"] / samples[f"{backend} function"]
        rows.append(summary("tiny", "ratio", f"{backend} raw operator / function", share, "x"))
    for name, times in samples.items():
        bound = ("<=", HOST_TARGET_US) if name == f"{BACKEND} function" else None
        rows.append(summary("tiny", "host time", name, times / 1e3, "us", target=bound))
    return rows


def interleave(
    shape: str, calls: dict[str, Call], rounds: int, repeats: int
) -> dict[str, np.ndarray]:
    """Nanoseconds a call, by candidate and round."""
    warmup = max(2, rounds // 10)
    names = list(calls)
    samples = np.empty((warmup + rounds, len(names)))
    for i in tqdm(range(warmup + rounds), desc=shape):
        order = np.roll(np.arange(len(names)), i)
        for j in order if i % 2 else order[::-1]:  # nobody runs after the same neighbour always
            call = calls[names[j]]
            start = perf_counter_ns()
            for _ in range(repeats):
                kept = call()
            samples[i, j] = (perf_counter_ns() - start) / repeats
            del kept
    return {name: samples[warmup:, j] for j, name in enumerate(names)}


def summary(
    shape: str,
    measure: str,
    candidate: str,
    values: np.ndarray,
    unit: str,
    moved: int | None = None,
    target: Target = None,
) -> Row:
    p20, p50, p80 = (float(f"{value:.6g}") for value in np.percentile(values, (20, 50, 80)))
    return Row(shape, measure, candidate, p50, unit, p20, p80, len(values), moved, target)


def measure_memory(threads: int) -> list[Row]:
    """The peak of the resident set during a call, over that before it and the call's own outputs.

    Each candidate has a process of its own, where the kernel keeps the peak (VmHWM) and restarts it
    (clear_refs), so that whatever C++ allocates is seen. The kernel counts pages in batches: a
    reading is good to 128 KiB a CPU. copy_, which allocates nothing, shows the noise, and the
    reference that temporaries are seen.
    """
    _, features = SHAPES["imagenet"]
    budget = ("<=", 1024 + 8 * features[0] * features[2] * features[3] / 1024)
    # With glibc's moving threshold, memory freed by an earlier call would be used again unseen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    for name in ("copy_", *sg_kernels.available_backends()):
        command = [sys.executable, __file__, "--threads", str(threads), "--probe-memory", name]
        probe = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
        if probe.returncode:
            print(f"peak memory: {name} not measured, the probe failed")
            continue
        first, *later = json.loads(probe.stdout)
        for label, readings in (("first call", [first]), ("later calls", later)):
            values, bound = np.array(readings), budget if name == BACKEND else None
            candidate = f"{name}, {label}"
            rows.append(summary("imagenet", "peak memory", candidate, values, "KiB", target=bound))
    return rows


def probe_memory(name: str) -> list[int]:
    """KiB beyond the outputs: of the first call at the shape, then of later ones."""

    def call(images: Tensor, features: Tensor, out: Tensor) -> tuple[Tensor | None, ...]:
        if name == "copy_":
            return (out.copy_(images),)
        return sg_kernels.saliency_graft(images, features, out=out, backend=name)

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    images, features = make_data("cifar")
    call(images, features, torch.rand_like(images))  # starts the threads and pages the code in
    images, features = make_data("imagenet")
    out = torch.rand_like(images)
    readings = []
    for _ in range(1 + MEMORY_READINGS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would not show
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        outputs = call(images, features, out)
        small = nbytes(*(output for output in outputs[1:] if output is not None))
        readings.append(peak() - before - small // 1024)
        del outputs
    return readings


def print_table(rows: list[Row]) -> None:
    print("\n| shape | measure | candidate | median | p20 .. p80 | GB/s | target | |")
    print("|---|---|---|---:|---:|---:|---:|---|")
    for row in sorted(rows, key=lambda row: row.measure != "ratio"):
        rate = f"{row.bytes / row.value / 1e6:.1f}" if row.bytes else ""
        target = verdict = ""
        if row.target is not None:
            sign, bound = row.target
            target = f"{sign} {bound:.4g}"
            met = row.value >= bound if sign == ">=" else row.value <= bound
            verdict = "met" if met else "short"
        print(
            f"| {row.shape} | {row.measure} | {row.candidate} | {row.value:.4g} {row.unit} "
            f"| {row.p20:.4g} .. {row.p80:.4g} | {rate} | {target} | {verdict} |"
        )


def write_csv(rows: list[Row], options: argparse.Namespace) -> None:
    cpu_info = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    run = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": git_commit(),
        "cpu model": cpu_info.partition(":")[2].partition("\n")[0].strip(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*run, *Row._fields[:-1]))
        writer.writerows((*run.values(), *row[:-1]) for row in rows)


def git_commit() -> str:
    """The commit, with a + where tracked files have changed since."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    describe = [*git, "describe", "--always", "--exclude=*", "--dirty=+"]
    run = subprocess.run(describe, stdout=subprocess.PIPE, text=True, check=False)
    return run.stdout.strip() or "unknown"


def plot(rows: list[Row], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("eager", "compiled", "cpp", "cpp out=", "clone of the images")
    figure, panels = plt.subplots(2, 1, figsize=(8, 5.6), layout="constrained")
    for panel, shape in zip(panels, ("cifar", "imagenet"), strict=True):
        times = {row.candidate: row for row in rows if row.shape == shape and row.unit == "ms"}
        shown = [times[name] for name in names if name in times]
        spread = [[row.value - row.p20 for row in shown], [row.p80 - row.value for row in shown]]
        colors = ["#d95f02" if row.candidate.startswith("cpp") else "#8c9bab" for row in shown]
        labels = [row.candidate for row in shown]
        panel.barh(
            labels, [row.value for row in shown], xerr=spread, color=colors, ecolor="#444444"
        )
        for y, row in enumerate(shown):
            label = f"{row.value:.2f}"
            panel.annotate(label, (row.p80, y), (5, 0), textcoords="offset points", va="center")
        floor = times["copy_ of the same bytes"].value
        panel.axvline(
            floor, color="black", linestyle="--", label=f"copy_ of the same bytes, {floor:.2f}"
        )
        panel.legend(loc="lower right", frameon=False)
        images, features = ("x".join(map(str, extents)) for extents in SHAPES[shape])
        panel.set_title(f"{shape}: images {images}, features {features}", loc="left")
        panel.set_xlabel("ms a call, median; whiskers p20 .. p80")
        panel.invert_yaxis()
        panel.margins(x=0.1)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
