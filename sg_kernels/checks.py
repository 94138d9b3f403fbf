"""What the public functions accept: options, shapes, dtypes, values. Errors name the argument."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

Normalize = Literal["max", "mean", "none"]
Selection = Literal["bernoulli", "topk"]
Label = Literal["saliency", "area"]
Norm = Literal["l1", "l2", "l2sq"]
GridSize = tuple[int, int] | Sequence[tuple[int, int]] | None

DEBUG = os.environ.get("SG_KERNELS_DEBUG", "0") not in ("", "0")
"""Whether values that lie on a GPU are checked too, which costs a sync."""

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMAGE_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)
"""Not those that pack several numbers into a byte, carry a scale, or are nothing but one."""


@dataclass(slots=True, frozen=True)
class Options:
    """The options of a call that are not tensors; saliency_graft says what they mean."""

    temperature: float = 0.2
    normalize: Normalize = "max"
    threshold: float | Literal["mean"] = "mean"
    grid_size: GridSize = None
    alpha: float = 1.0
    keep_prob: float | None = None
    selection: Selection = "bernoulli"
    k: int | None = None
    label: Label = "saliency"
    norm: Norm = "l1"
    augmentations: int = 1
    no_fixed_points: bool = False
    num_classes: int | None = None
    label_smoothing: float = 0.0
    token_grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    prob: float = 1.0
    backend: str | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be a finite number > 0; got {self.temperature!r}")
        if self.normalize not in ("max", "mean", "none"):
            raise ValueError(f"normalize must be 'max', 'mean' or 'none'; got {self.normalize!r}")
        named = isinstance(self.threshold, str) and self.threshold == "mean"
        if not (named or (_is_number(self.threshold) and 0 <= self.threshold < 1)):
            raise ValueError(f"threshold must be 'mean' or in [0, 1); got {self.threshold!r}")
        if not (_is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be a finite number > 0; got {self.alpha!r}")
        if self.keep_prob is not None:
            _check_probability("keep_prob", self.keep_prob)
        _check_probability("label_smoothing", self.label_smoothing)
        _check_probability("prob", self.prob)
        if self.selection not in ("bernoulli", "topk"):
            raise ValueError(f"selection must be 'bernoulli' or 'topk'; got {self.selection!r}")
        if (self.selection == "topk") != (self.k is not None):
            raise ValueError(f"k goes with selection='topk'; got k={self.k!r}, {self.selection!r}")
        if self.label not in ("saliency", "area"):
            raise ValueError(f"label must be 'saliency' or 'area'; got {self.label!r}")
        if self.norm not in ("l1", "l2", "l2sq"):
            raise ValueError(f"norm must be 'l1', 'l2' or 'l2sq'; got {self.norm!r}")
        if self.k is not None:
            check_int("k", self.k, 1)
        if self.num_classes is not None:
            check_int("num_classes", self.num_classes, 1)
        check_int("augmentations", self.augmentations, 1)
        check_int("prefix_tokens", self.prefix_tokens, 0)
        if not isinstance(self.no_fixed_points, bool):
            raise TypeError(f"no_fixed_points must be a bool; got {self.no_fixed_points!r}")
        if self.grid_size is not None and not (
            is_size(self.grid_size) or _is_sizes(self.grid_size)
        ):
            raise ValueError(
                f"grid_size must be (gh, gw), ints >= 1, a sequence of such sizes, or None; "
                f"got {self.grid_size!r}"
            )
        if self.token_grid is not None and not is_size(self.token_grid):
            raise ValueError(f"token_grid must be (h, w), ints >= 1; got {self.token_grid!r}")


def check_int(name: str, value: Any, least: int) -> None:
    if not (_is_int(value) and value >= least):
        raise ValueError(f"{name} must be an int >= {least}; got {value!r}")


def check_tensor(
    name: str,
    value: Any,
    shape: str,
    *dims: int,
    dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}; got layout {value.layout}")
    if dims and value.dim() not in dims:
        raise ValueError(f"{name} must be {shape}; got {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {accepted}; got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, as the rest is; got {value.device}")


def check_rows(name: str, rows: int, batch: int) -> None:
    """Rows come as a multiple of the batch: one set an augmentation."""
    if (rows % batch or not rows) if batch else rows:
        raise ValueError(f"{name} must have a multiple of B = {batch} rows; got {rows}")


def check_grid_size(name: str, grid_size: tuple[int, int], images: Tensor) -> None:
    height, width = images.shape[2:]
    if not (1 <= grid_size[0] <= height and 1 <= grid_size[1] <= width):
        raise ValueError(
            f"{name} must have 1 .. H x 1 .. W = {height} x {width} cells, no more than images has "
            f"pixels; got {tuple(grid_size)}"
        )


def check_index(index: Any, rows: int, batch: int, device: torch.device) -> None:
    check_tensor("index", index, "(n * B,)", 1, dtypes=(torch.int64,), device=device)
    if index.shape[0] != rows:
        raise ValueError(f"index must have {rows} entries, one a row; got {index.shape[0]}")
    if rows and _values_are_checked(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= batch:
            raise ValueError(f"index must lie in 0 .. {batch - 1}; got {low} .. {high}")


def check_images(images: Any, shape: str, *dims: int) -> None:
    check_tensor("images", images, shape, *dims)
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images must hold plain numbers; got {images.dtype}")
    if forward_ad.unpack_dual(images).tangent is not None:
        raise TypeError("images must not carry a tangent: there is no forward-mode derivative")


def check_out(out: Any, images: Tensor, rows: int, **others: Tensor | None) -> None:
    """``others``: the tensors, by name, that the call reads besides the images."""
    check_tensor("out", out, "(n * B, C, H, W)", 4, dtypes=(images.dtype,), device=images.device)
    if out.is_conj() or out.is_neg():
        raise TypeError("out must hold its numbers as they are, not as a lazy conj() or negation")
    expected = (rows, *images.shape[1:])
    if out.shape != expected:
        raise ValueError(f"out must be {expected}; got {tuple(out.shape)}")
    if torch.is_grad_enabled() and (images.requires_grad or out.requires_grad):
        raise ValueError("out does not go with gradients; detach images, or drop out")
    if not (has_values(out) and out.numel()):
        return
    begin, end = _memory(out)
    for name, other in {"images": images, **others}.items():
        if other is not None and other.numel():
            other_begin, other_end = _memory(other)
            if begin < other_end and other_begin < end:
                raise ValueError(f"out must not lie in the memory that {name} spans")
    if out.is_contiguous():
        return
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape)):
        if size > 1 and stride <= reach:
            raise ValueError(f"out must not overlap itself; got strides {out.stride()}")
        reach += (size - 1) * stride


def needs_gradient(images: Tensor) -> bool:
    if not (torch.is_grad_enabled() and images.requires_grad):
        return False
    if images.is_floating_point() and images.dtype.itemsize == 1:
        raise TypeError(f"images must be detached, or wider: {images.dtype} gradients do not add")
    return True


def feature_map(features: Any, options: Options, device: torch.device | None = None) -> Tensor:
    """Checked features as a (B, K, h, w) view, without gradient."""
    if options.token_grid is None:
        check_tensor("features", features, "(B, K, h, w)", 4, dtypes=FEATURE_DTYPES, device=device)
        if options.prefix_tokens:
            raise ValueError("prefix_tokens goes with token_grid")
        return features.detach()
    shape = "(B, N, K) with token_grid"
    check_tensor("features", features, shape, 3, dtypes=FEATURE_DTYPES, device=device)
    h, w = options.token_grid
    tokens = options.prefix_tokens + h * w
    if features.shape[1] != tokens:
        raise ValueError(
            f"token_grid {(h, w)} and prefix_tokens {options.prefix_tokens} make {tokens} tokens; "
            f"features has {features.shape[1]}"
        )
    return features.detach()[:, options.prefix_tokens :].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def ready_map(saliency: Any, options: Options, device: torch.device) -> Tensor:
    """A checked saliency map as float32, without gradient."""
    check_tensor("saliency", saliency, "(B, h, w)", 3, dtypes=FEATURE_DTYPES, device=device)
    if options.token_grid is not None or options.prefix_tokens:
        raise ValueError("token_grid and prefix_tokens go with features, not with saliency")
    if _values_are_checked(saliency) and bool((saliency < 0).any()):
        raise ValueError("saliency must be >= 0; got negative values")
    return saliency.detach().float()


def ids_or_rows(
    targets: Any, options: Options, batch: int, device: torch.device
) -> tuple[Tensor, int]:
    """Checked targets, class ids as int64 and dense rows as float32, and the number of classes."""
    check_tensor("targets", targets, "(B,) or (B, num_classes)", 1, 2, device=device)
    if targets.shape[0] != batch:
        raise ValueError(f"targets must have B = {batch} rows; got {tuple(targets.shape)}")
    num_classes = options.num_classes
    if targets.dim() == 2:
        if targets.is_complex():
            raise TypeError(f"targets must be real; got {targets.dtype}")
        if num_classes is not None and num_classes != targets.shape[1]:
            raise ValueError(
                f"num_classes must be the targets' {targets.shape[1]} columns; got {num_classes}"
            )
        return targets.detach().float(), targets.shape[1]
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets (B,) must be integer class ids; got {targets.dtype}")
    if num_classes is None:
        raise ValueError("num_classes is needed to mix class ids")
    targets = targets.long()
    if batch and _values_are_checked(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"targets must lie in 0 .. {num_classes - 1}; got {low} .. {high}")
    return targets, num_classes


def seed_tensor(seed: Any) -> Tensor:
    """A checked seed as int64 (1,)."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed must be an int or one int64; got {seed.dtype}, {tuple(seed.shape)}"
            )
        return seed.reshape(1)
    if not (_is_int(seed) and -(1 << 63) <= seed < 1 << 64):
        raise ValueError(f"seed must be an int of 64 bits; got {seed!r}")
    if isinstance(seed, np.integer):
        seed = int(seed)
    signed = seed if seed < 1 << 63 else seed - (1 << 64)
    return torch.tensor([signed], dtype=torch.int64, device="cpu")


def sizes(grid_size: Any, own: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The sizes that a call may use: the map's own, the one given, or those to draw from."""
    if grid_size is None:
        return (own,)
    given = (grid_size,) if is_size(grid_size) else grid_size
    return tuple((gh, gw) for gh, gw in given)


def is_size(value: Any) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(_is_int(extent) and extent >= 1 for extent in value)
    )


def has_values(tensor: Tensor) -> bool:
    """Not where a compiler or a mode traces without any."""
    of_its_own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not (torch.compiler.is_compiling() or of_its_own)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(is_size(size) for size in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (float, int, np.floating, np.integer)) and not isinstance(value, bool)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's first element begins, and where its last one ends."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.itemsize


def _check_probability(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")


def _values_are_checked(values: Tensor) -> bool:
    """Not those that it takes a sync to see."""
    return has_values(values) and (DEBUG or values.device.type == "cpu")
