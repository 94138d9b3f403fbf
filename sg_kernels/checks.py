"""The tensors that the public functions accept. Errors name the argument and what is accepted."""

import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sg_kernels.options import DEFAULTS, MAX_ROWS, REPLACED_BY_MASK, Options, is_int, is_size

LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))
"""Where the code lies that is not the user's."""
DEBUG = os.environ.get("SG_KERNELS_DEBUG", "0") not in ("", "0")
"""Whether values that lie on a GPU are checked too, which costs a sync."""

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMAGE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.float64,
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)
"""Excludes packed, scaled and scale-only dtypes."""
STANDARDIZED_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


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
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor {shape}; got {kind}")
    if dims and value.dim() not in dims:
        raise ValueError(f"{name} must be {shape}; got {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {accepted}; got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, like the other tensors; got {value.device}")


@lru_cache
def warn_once(message: str) -> None:
    """Warns of what is allowed but surely not meant, once per process, at the user's line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_rows(name: str, rows: int, batch: int) -> None:
    """Refuses rows that are not a multiple of the batch, one set per augmentation."""
    if (rows % batch or not rows) if batch else rows:
        raise ValueError(f"{name} must have a multiple of B = {batch} rows; got {rows}")


def check_row_count(rows: int, augmentations: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(
            f"augmentations * B must be at most {MAX_ROWS} rows; got augmentations={augmentations}"
        )


def check_grid_size(name: str, grid_size: tuple[int, int], height: int, width: int) -> None:
    if not (1 <= grid_size[0] <= height and 1 <= grid_size[1] <= width):
        raise ValueError(
            f"{name} must be at least (1, 1) and at most the (H, W) of images, {(height, width)}; "
            f"got {tuple(grid_size)}"
        )


def check_mask(mask: Any, images: Tensor) -> tuple[int, int, int]:
    """Checks a mask for ``images``, except the number of its rows. Returns its shape."""
    shape = "(n * B, gh, gw)"
    check_tensor("mask", mask, shape, 3, dtypes=(torch.bool,), device=images.device)
    rows, gh, gw = mask.shape
    check_grid_size("mask", (gh, gw), *images.shape[-2:])
    return rows, gh, gw


def check_mask_of_rows(mask: Any, options: Options, images: Tensor, rows: int) -> tuple[int, int]:
    """Checks a mask, one per row, that takes the place of ``options``. Returns its grid."""
    excluded = [
        name for name in REPLACED_BY_MASK if getattr(options, name) != getattr(DEFAULTS, name)
    ]
    if excluded:
        raise ValueError(
            f"mask replaces the grid and the choice of cells; it excludes {', '.join(excluded)}"
        )
    given, gh, gw = check_mask(mask, images)
    if given != rows:
        raise ValueError(f"mask must have {rows} rows, one per output; got {given}")
    return gh, gw


def check_index(index: Any, rows: int, batch: int, device: torch.device) -> None:
    check_tensor("index", index, "(n * B,)", 1, dtypes=(torch.int64,), device=device)
    if index.shape[0] != rows:
        raise ValueError(f"index must have {rows} entries, one per row; got {index.shape[0]}")
    if rows and _values_are_checked(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= batch:
            raise ValueError(f"index must lie in 0 .. {batch - 1}; got {low} .. {high}")


def check_images(images: Any, least_dims: int = 4) -> None:
    shape = "(B, C, H, W) or (B, C, ..., H, W)" + (", or (B, H, W)" if least_dims == 3 else "")
    check_tensor("images", images, shape)
    if images.dim() < least_dims:
        raise ValueError(f"images must be {shape}; got {tuple(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images must hold plain numbers; got {images.dtype}")
    if forward_ad.unpack_dual(images).tangent is not None:
        raise TypeError("images must not carry a tangent: there is no forward-mode derivative")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(images):
        raise TypeError("images must not be under torch.vmap: give the whole batch instead")


def warn_of_last_channels(images: Tensor, grid_size: tuple[int, int]) -> None:
    """Warns of images that look like (B, H, W, K): their sides, so read, fit the mask exactly."""
    (_, channels, height, width), (gh, gw) = images.shape, grid_size
    fits = channels * gw == height * gh and height * gw != width * gh
    if fits and width < height and gh * gw > 1:
        warn_once(
            f"images {tuple(images.shape)} are read as (B, C, H, W), but as (B, H, W, C) their "
            f"sides would fit a mask of {gh} x {gw}: if so, give images.movedim(-1, 1)"
        )


def check_standardize(images: Tensor, options: Options) -> None:
    """Refuses images that cannot be standardised, where ``options`` ask for it."""
    if options.standardize is None:
        return
    if images.dtype not in STANDARDIZED_DTYPES:
        accepted = " or ".join(map(str, STANDARDIZED_DTYPES))
        raise TypeError(
            f"standardize takes images of {accepted}, as it computes in float32; got {images.dtype}"
        )
    count, channels = len(options.mean_and_std()[0]), images.shape[1]
    if count != 1 and count != channels:  # not `in`: Dynamo finds no symbol in a tuple
        raise ValueError(
            f"standardize must have one mean and std, or one for each of the {channels} channels "
            f"of images; got {count}"
        )


def check_out(
    out: Any, images: Tensor, rows: int, others: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Checks ``out`` against the images and the tensors among ``others``, by name."""
    dtypes = (dtype or images.dtype,)
    check_tensor("out", out, "(n * B, ...)", dtypes=dtypes, device=images.device)
    # Dynamo traces neither; a graph that it compiles gives such an out resolved.
    if not torch.compiler.is_compiling() and (out.is_conj() or out.is_neg()):
        raise TypeError("out must not be a lazy conj() or negation; give it resolved")
    expected = (rows, *images.shape[1:])
    if out.shape != expected:
        raise ValueError(f"out must be {expected}; got {tuple(out.shape)}")
    if torch.is_grad_enabled() and (images.requires_grad or out.requires_grad):
        raise ValueError("out excludes gradients; detach images, or leave out away")
    if not (has_values(out) and out.numel()):
        return
    begin, end = _memory(out)
    for name, other in {"images": images, **others}.items():
        if isinstance(other, Tensor) and other.numel():
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
        raise TypeError(f"images must be detached or wider: PyTorch cannot add {images.dtype}")
    return True


def feature_map(features: Any, options: Options, images: Tensor | None = None) -> Tensor:
    """Checked features as a (B, K, h, w) view, without gradient.

    ``images``, where there are any, tell the device, and whether the map has their proportions.
    """
    device = None if images is None else images.device
    if options.token_grid is not None:
        shape = "(B, N, K) with token_grid"
        check_tensor("features", features, shape, 3, dtypes=FEATURE_DTYPES, device=device)
        return _tokens_as_map(features.detach(), options, images)
    if isinstance(features, Tensor) and features.dim() == 3:
        raise ValueError(
            f"features (B, N, K) need token_grid, the (h, w) of the tokens or 'square', and "
            f"prefix_tokens for those before them; got {tuple(features.shape)}"
        )
    check_tensor("features", features, "(B, K, h, w)", 4, dtypes=FEATURE_DTYPES, device=device)
    if options.prefix_tokens:
        raise ValueError("prefix_tokens goes with token_grid")
    detached = features.detach()
    if options.channel_dim != 1:
        detached = detached.movedim(options.channel_dim, 1)
    if images is not None:
        _check_proportions(detached, features, images)
    return detached


def _check_proportions(channels_first: Tensor, features: Tensor, images: Tensor) -> None:
    """Refuses a map whose sides do not fit the images where those of another reading do."""
    (height, width), (_, _, h, w) = images.shape[-2:], channels_first.shape
    # A network rounds each side of its map by less than one cell.
    if abs(h * width - w * height) <= height + width:
        return
    other = -1 if features.shape == channels_first.shape else 1
    _, channels, other_h, other_w = features.movedim(other, 1).shape
    fits = abs(other_h * width - other_w * height) <= max(height, width)
    if fits and min(other_h, other_w, channels) > 1:
        raise ValueError(
            f"features {tuple(features.shape)} have sides of {h} x {w}, unlike images of "
            f"{height} x {width}; {other_h} x {other_w} would fit: give channel_dim={other}, or a "
            "ready map as saliency"
        )


def _tokens_as_map(features: Tensor, options: Options, images: Tensor | None) -> Tensor:
    count, grid = features.shape[1] - options.prefix_tokens, options.token_grid
    if grid == "square":
        side = int(max(0, count) ** 0.5)  # torch.compile traces no isqrt of a dynamic shape
        h, w = side, side
    elif callable(grid):
        if images is None:
            raise ValueError("token_grid must be (h, w) or 'square' where there are no images")
        size = grid(images)
        if not is_size(size):
            raise ValueError(f"token_grid must return (h, w), ints >= 1; got {size!r}")
        h, w = size
    else:
        assert grid is not None
        h, w = grid
    tokens = options.prefix_tokens + h * w
    if features.shape[1] != tokens:
        raise ValueError(
            f"token_grid {(h, w)} and prefix_tokens {options.prefix_tokens} make {tokens} tokens; "
            f"features has {features.shape[1]}"
        )
    return features[:, options.prefix_tokens :].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def ready_map(saliency: Any, options: Options, device: torch.device | None = None) -> Tensor:
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
        if targets.shape[1] == 1 and num_classes is None and not targets.is_floating_point():
            raise ValueError(
                "targets (B, 1) of integers look like class ids: give them as (B,) with "
                "num_classes, or as float rows"
            )
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
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.is_meta:
            raise ValueError(
                f"seed must be an int or one int64; got {seed.dtype}, {tuple(seed.shape)} on "
                f"{seed.device}"
            )
        return seed.reshape(1)
    if not (is_int(seed) and -(1 << 63) <= seed < 1 << 64):
        raise ValueError(f"seed must be an int of 64 bits; got {seed!r}")
    if isinstance(seed, np.integer):
        seed = int(seed)
    signed = seed if seed < 1 << 63 else seed - (1 << 64)
    return torch.tensor([signed], dtype=torch.int64, device="cpu")


def has_values(tensor: Tensor) -> bool:
    """False while tracing, when tensors hold no data."""
    of_its_own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not (torch.compiler.is_compiling() or of_its_own)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one past its last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.itemsize


def _values_are_checked(values: Tensor) -> bool:
    """Whether values can be read without a GPU sync, or SG_KERNELS_DEBUG pays for one."""
    return has_values(values) and (DEBUG or values.device.type == "cpu")
