"""``python -m sg_kernels verify``: every backend that runs here against the reference.

The inputs are random: every dtype, memory layout and option. What a user of a new card, driver,
PyTorch or Triton runs first, and what a bug report brings along.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sg_kernels import backends, functional
from sg_kernels.backends import reference
from sg_kernels.call import DTYPES, NORM
from sg_kernels.checks import FEATURE_DTYPES, IMAGE_DTYPES, STANDARDIZED_DTYPES
from sg_kernels.options import Options
from sg_kernels.pipeline import GraftResult

BATCH, CHANNELS, SIDE, CLASSES = 6, 3, 24, 7
FEATURES = 40, 6, 6
UNSURE = 1e-5
"""A cell this close to the threshold, as a share of the sum of the softmax, may be kept or not."""
CLOSE = 1e-4
"""Relative error of sums in float32 that backends may make in different orders."""


class Case(NamedTuple):
    """One call of saliency_graft."""

    group: str
    """What varies; a line of the table."""
    name: str
    images: Tensor
    tensors: dict[str, Tensor]
    """Features or a ready map, and a mask, by name."""
    options: dict[str, Any]


def random_images(dtype: torch.dtype, size: tuple[int, ...] = (SIDE, SIDE)) -> Tensor:
    """Random bits, so that NaNs of every payload are among them."""
    shape = BATCH, CHANNELS, *size
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.flatten(-2).view(dtype)


def random_pixels(dtype: torch.dtype) -> Tensor:
    """0 .. 255: no NaNs, as arithmetic may change their payload."""
    return (255 * torch.rand(BATCH, CHANNELS, SIDE, SIDE)).to(dtype)


def random_features(dtype: torch.dtype = torch.float32) -> Tensor:
    # A gain per cell: sums over many channels alone would be nearly constant.
    gain = torch.empty(BATCH, 1, *FEATURES[1:]).exponential_()
    return (torch.randn(BATCH, *FEATURES) * gain).to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[:, :, :, 1 : 1 + x.shape[3]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "stepped": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :1].contiguous().expand(x.shape),
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.05},
    {"normalize": "mean"},
    {"normalize": "none", "temperature": 50.0},
    {"threshold": 0.0},
    {"threshold": 0.05},
    {"grid_size": (3, 2)},
    {"grid_size": (12, 7)},
    {"grid_size": [(2, 2), (4, 4)]},
    {"alpha": 0.3},
    {"keep_prob": 0.5},
    {"selection": "topk", "k": 9},
    {"label": "area"},
    {"norm": "l2"},
    {"norm": "l2sq"},
    {"augmentations": 3},
    {"no_fixed_points": True},
    {"label_smoothing": 0.1},
]


def cases() -> Iterator[Case]:
    features = {"features": random_features()}
    plain = random_images(torch.float32)
    for dtype in IMAGE_DTYPES:
        yield Case("dtype of images", str(dtype), random_images(dtype), features, {})
    for name, layout in LAYOUTS.items():
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            images = layout(random_images(dtype))
            yield Case("layout of images", f"{name}, {dtype}", images, features, {})
    for size in ((1, 9), (7, 5), (33, 31), (64, 48)):
        images = random_images(torch.float32, size)
        grid_size = min(6, size[0]), min(6, size[1])
        yield Case("size of images", str(size), images, features, {"grid_size": grid_size})
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        for dtype in (torch.uint8, torch.float32):
            videos = random_images(dtype, (3, SIDE, SIDE)).contiguous(memory_format=memory_format)
            yield Case("videos", f"{memory_format}, {dtype}", videos, features, {})
    for pixels in STANDARDIZED_DTYPES:
        for dtype in DTYPES:
            for name, layout in LAYOUTS.items():
                images = layout(random_pixels(pixels))
                options = {"standardize": ((124, 116, 104), (58, 57.1, 57.4)), "dtype": dtype}
                label = f"{pixels} to {dtype}, {name}"
                yield Case("standardised images", label, images, features, options)
    for dtype in FEATURE_DTYPES:
        for name, layout in LAYOUTS.items():
            given = {"features": layout(random_features(dtype))}
            yield Case("features", f"{dtype}, {name}", plain, given, {})
    ready = random_features().abs().sum(1)
    yield Case("ready map", "contiguous", plain, {"saliency": ready}, {})
    yield Case("ready map", "transposed", plain, {"saliency": ready.mT}, {"grid_size": (3, 4)})
    tokens = {"features": torch.randn(BATCH, 37, 40)}
    of_tokens = {"token_grid": "square", "prefix_tokens": 1}
    yield Case("tokens", "(B, N, K)", plain, tokens, of_tokens)
    for option in OPTIONS:
        yield Case("options", str(option), plain, features, option)
    for grid_size in ((1, 1), (4, 9), (SIDE, SIDE)):
        mask = torch.rand(BATCH, *grid_size) < 0.5
        yield Case("mask", str(grid_size), plain, {**features, "mask": mask}, {})
        yield Case("mask", f"{grid_size}, area", plain, {"mask": mask}, {"label": "area"})


def unsure_cells(grid: Tensor, case: Case) -> Tensor:
    """The cells that float32 may put on either side of the threshold."""
    options = Options(**case.options)
    if options.k is not None or "mask" in case.tensors:
        return torch.zeros_like(grid, dtype=torch.bool)
    flat = grid.double().flatten(1)
    scale = reference.normalize_scale(flat.view_as(grid), options.normalize)
    e = torch.exp((flat - flat.amax(1, keepdim=True)) / scale / options.temperature)
    threshold = 1 / flat.shape[1] if options.threshold == "mean" else options.threshold
    total = e.sum(1, keepdim=True)
    return ((e - threshold * total).abs() <= UNSURE * total).view_as(grid)


def differences(case: Case, device: str, backend: str, seed: int) -> list[str]:
    """How a backend's results differ from the reference's; empty where they agree."""
    images = case.images.to(device)
    tensors = {name: value.to(device) for name, value in case.tensors.items()}
    ids = torch.arange(BATCH, device=device) % CLASSES
    given: dict[str, Any] = {"targets": ids, "num_classes": CLASSES, **tensors, **case.options}
    results = [
        functional.saliency_graft(images, **given, seed=seed, backend=name)
        for name in (backend, "reference")
    ]
    (found, expected), options = results, Options(**case.options)
    saliency, expected_saliency = _map_of(found), _map_of(expected)
    grid = reference.resample(expected_saliency, (expected.mask.shape[1], expected.mask.shape[2]))
    unsure = unsure_cells(grid, case).repeat(options.augmentations, 1, 1)
    copied = functional.graft(images, found.mask, found.index, backend="reference")
    if options.standardize is not None:
        affine = reference.affine(*options.mean_and_std(), CHANNELS).to(images.device)
        copied = reference.standardize(copied, affine).to(options.out_dtype(images))
    lam = reference.label_ratio(grid, found.mask, found.index, NORM[options.norm_position()])
    targets = reference.mix_targets(ids, lam, found.index, CLASSES, options.label_smoothing)
    agrees = {
        "index": torch.equal(found.index, expected.index),
        "saliency": torch.allclose(saliency, expected_saliency, rtol=CLOSE),
        "mask": not ((found.mask != expected.mask) & ~unsure).any(),
        "images": torch.equal(_bytes(found.images), _bytes(copied)),
        "lam": torch.allclose(found.lam, lam, rtol=CLOSE, atol=CLOSE),
        "targets": torch.allclose(_values(found.targets), targets, rtol=CLOSE, atol=CLOSE),
        "gradient": _same_gradient(images, found.mask, found.index, backend),
    }
    return [name for name, same in agrees.items() if not same]


def _same_gradient(images: Tensor, mask: Tensor, index: Tensor, backend: str) -> bool:
    if not images.is_floating_point() or images.dtype.itemsize == 1:
        return True
    weight = torch.randn(len(mask), *images.shape[1:], device=images.device).to(images.dtype)
    leaf = images.detach().clone().requires_grad_()
    grafted = functional.graft(leaf, mask, index, backend=backend)
    (found,) = torch.autograd.grad(grafted, leaf, weight)
    plain = functional.graft(leaf, mask, index, backend="reference")
    (expected,) = torch.autograd.grad(plain, leaf, weight)
    tolerance = 4 * torch.finfo(images.dtype).eps
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _bytes(images: Tensor) -> Tensor:
    return images.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _map_of(result: GraftResult) -> Tensor:
    """The saliency of a call; ones where it needed none."""
    if result.saliency is None:
        return torch.ones(BATCH, 1, 1, device=result.lam.device)
    return result.saliency


def _values(targets: Tensor | None) -> Tensor:
    assert targets is not None
    return targets


def verify(device: str, seed: int = 0) -> bool:
    """Prints a table of what agrees, a line per group of cases; whether all does."""
    names = [name for name in backends.available_backends() if device in backends.DEVICES[name]]
    names = [name for name in names if name != "reference"]
    if not names:
        reasons = "; ".join(f"{k}: {v}" for k, v in backends.unavailable_backends().items())
        print(f"no backend to compare with the reference on {device}: {reasons}")
        return False
    torch.manual_seed(seed)
    wrong: list[str] = []
    counts: dict[str, dict[str, list[int]]] = {}
    for case in _with_bar(list(cases())):
        line = counts.setdefault(case.group, {name: [0, 0] for name in names})
        for name in names:
            try:
                found = differences(case, device, name, seed)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
            line[name][0] += not found
            line[name][1] += 1
            wrong += [f"{name}, {case.group}, {case.name}: {what}" for what in found]
    print(f"{'agrees with the reference':<28}" + "".join(f"{name:>12}" for name in names))
    for group, line in counts.items():
        print(f"{group:<28}" + "".join(f"{f'{a} of {n}':>12}" for a, n in line.values()))
    print("\n".join(["these do not:", *wrong]) if wrong else "all agree")
    return not wrong


def _with_bar(items: list[Case]) -> Iterable[Case]:
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:  # then without a bar
        return items
    return tqdm(items, desc="verifying", unit="case", leave=False, disable=None)
