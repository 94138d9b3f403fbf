"""The operators of :mod:`sg_kernels.ops` on the Triton kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sg_kernels import reference, rng
from sg_kernels.kernels import table
from sg_kernels.kernels.graft import (
    COLUMNS,
    graft_backward_kernel,
    graft_kernel,
    mix_targets_kernel,
    saliency_graft_kernel,
)
from sg_kernels.kernels.launch import launch
from sg_kernels.kernels.saliency import SAMPLES, saliency_kernel

UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""Images are copied as integers of so many bytes, whatever they are."""
FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""What features and gradients are read as."""
NO_PAIRING = (None, None, None, 0, None, 0, None, 0)
"""What saliency_kernel takes for the randomness where only the map is wanted."""
_AFTER_IMAGES = list(signature(reference.saliency_graft).parameters)[1:]
_GRID_SIZE, _AUGMENTATIONS = map(_AFTER_IMAGES.index, ("grid_size", "augmentations"))


def _blocks(count: int, size: int) -> int:
    return -(-count // size)  # triton.cdiv takes 4 us on the host


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _layout(source: Tensor) -> tuple[Any, ...]:
    """What the launch table asks of features."""
    return (
        tuple(source.shape),
        source.stride(),
        source.element_size(),
        table.alignment(source.data_ptr()),
    )


def _copy_layout(images: Tensor, out: Tensor) -> tuple[Any, ...]:
    """What it asks of images, and of where they are copied to."""
    return (
        out.shape[0],
        tuple(images.shape),
        images.stride(),
        out.stride(),
        images.element_size(),
        table.alignment(images.data_ptr(), out.data_ptr()),
    )


def _tile(
    images: Tensor,
    out: Tensor,
    mask_size: tuple[int, int],
    arithmetic: bool = False,
) -> table.Tile | None:
    return table.tile(*_copy_layout(images, out), mask_size, arithmetic, table.THREADS)


def _geometry(tile: table.Tile) -> tuple[int, ...]:
    """The arguments from ``tiles`` to the last stride, which all kernels of images share."""
    return (
        tile.tiles,
        tile.tiles_across,
        tile.line_count,
        tile.chunk_count,
        tile.step,
        *tile.sides,
        *tile.strides,
    )


def channel_saliency(features: Tensor) -> Tensor:
    batch, _, h, w = features.shape
    saliency = features.new_empty((batch, h, w), dtype=torch.float32)
    if saliency.numel() == 0:
        return saliency
    if table.map_too_large((h, w), (1, 1)):
        return reference.channel_saliency(features)
    plan = table.saliency(*_layout(features))
    partials = saliency
    if plan.splits > 1:
        partials = features.new_empty((plan.splits, batch, h, w), dtype=torch.float32)
    with _on(features):
        launch(
            saliency_kernel,
            batch * plan.splits * plan.tiles,
            table.THREADS,
            (
                features.data_ptr(),
                partials,
                None,
                batch,
                plan.tiles,
                plan.splits,
                plan.row_count,
                h,
                w,
                *plan.strides,
                h,
                w,
                1,
                1,
                *NO_PAIRING,
            ),
            False,
            FLOATS[features.dtype],
            plan.layout,
            plan.planes,
            plan.rows,
            plan.chunks,
            plan.lanes,
            plan.unroll,
        )
    return partials.sum(0) if plan.splits > 1 else saliency


def graft(images: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    out = reference.empty_rows(images, mask.shape[0])
    graft_out(out, images, mask, index)
    return out


def graft_out(out: Tensor, images: Tensor, mask: Tensor, index: Tensor) -> None:
    if out.numel() == 0:
        return
    gh, gw = mask.shape[1:]
    tile = _tile(images, out, (gh, gw))
    if tile is None:
        reference.graft(images, mask, index, out)
        return
    with _on(images):
        launch(
            graft_kernel,
            out.shape[0] * tile.tiles,
            table.THREADS,
            (
                images.data_ptr(),
                out.data_ptr(),
                mask.contiguous(),
                index.contiguous(),
                images.shape[0],
                *_geometry(tile),
                gh,
                gw,
            ),
            tile.channels_last,
            tile.strided,
            tile.uniform,
            UNITS[tile.unit_bytes],
            tile.lines,
            tile.chunks,
            tile.lanes,
        )


def graft_backward(grad: Tensor, mask: Tensor, index: Tensor, augmentations: int) -> Tensor:
    out = reference.empty_rows(grad, mask.shape[0] // augmentations)
    if grad.is_complex():  # the real and the imaginary numbers, each a strided batch
        _graft_backward(grad.real, mask, index, out.real)
        _graft_backward(grad.imag, mask, index, out.imag)
    else:
        _graft_backward(grad, mask, index, out)
    return out


def _graft_backward(grad: Tensor, mask: Tensor, index: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    gh, gw = mask.shape[1:]
    tile = _tile(grad, out, (gh, gw), arithmetic=True)
    if tile is None:
        out.copy_(reference.graft_backward(grad, mask, index, mask.shape[0] // out.shape[0]))
        return
    with _on(grad):
        launch(
            graft_backward_kernel,
            out.shape[0] * tile.tiles,
            table.THREADS,
            (
                grad.data_ptr(),
                out.data_ptr(),
                mask.contiguous(),
                index.contiguous(),
                out.shape[0],
                grad.shape[0],
                *_geometry(tile),
                gh,
                gw,
            ),
            tile.channels_last,
            tile.strided,
            tile.uniform,
            FLOATS[grad.dtype],
            tile.lines,
            tile.chunks,
            tile.lanes,
        )


def mix_targets(
    targets: Tensor, lam: Tensor, index: Tensor, num_classes: int, label_smoothing: float
) -> Tensor:
    rows = lam.shape[0]
    mixed = lam.new_empty((rows, num_classes), dtype=torch.float32)
    if mixed.numel() == 0:
        return mixed
    tiles = _blocks(num_classes, COLUMNS.value)
    with _on(lam):
        launch(
            mix_targets_kernel,
            rows * tiles,
            table.THREADS,
            (
                targets.contiguous(),
                lam.contiguous(),
                index.contiguous(),
                mixed,
                targets.shape[0],
                tiles,
                num_classes,
                label_smoothing,
            ),
            "ids" if targets.dim() == 1 else "rows",
        )
    return mixed


def saliency_graft(images: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out = reference.empty_rows(images, args[_AUGMENTATIONS] * images.shape[0])
    return out, *saliency_graft_out(out, images, *args)


def saliency_graft_out(out: Tensor, images: Tensor, *args: Any) -> tuple[Tensor, ...]:
    features, saliency = args[:2]
    source = features if saliency is None else saliency
    plan = table.saliency_graft(
        *_copy_layout(images, out),
        *_layout(source),
        saliency is not None,
        tuple(args[_GRID_SIZE]),
    )
    if plan is not None:
        return _saliency_graft_out(plan, out, images, *args)
    _, lam, index, *rest = reference.saliency_graft(images, *args, out=out)  # type: ignore[misc]
    return lam, index.clone(), *rest


def _saliency_graft_out(
    plan: table.Plan,
    out: Tensor,
    images: Tensor,
    features: Tensor | None,
    saliency: Tensor | None,
    index: Tensor | None,
    targets: Tensor | None,
    seed: Tensor,
    step: Tensor | None,
    rank: int,
    quantiles: Tensor | None,
    keep_prob: float,
    grid_size: tuple[int, int],
    temperature: float,
    normalize: str,
    threshold: float,
    k: int | None,
    norm: str,
    prob: float,
    augmentations: int,
    no_fixed_points: bool,
    num_classes: int,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    gh, gw = grid_size
    source = features if saliency is None else saliency.contiguous()
    assert source is not None
    batch, (h, w) = images.shape[0], source.shape[-2:]
    rows = out.shape[0]
    lam = images.new_empty((rows,), dtype=torch.float32)
    paired = images.new_empty((rows,), dtype=torch.int64)
    mask = images.new_empty((rows, gh, gw), dtype=torch.bool)
    mapped = images.new_empty((batch, h, w), dtype=torch.float32)
    mixed = images.new_empty((rows, 0 if targets is None else num_classes), dtype=torch.float32)

    summed, cells, tile, (window_h, window_w), parts, at_once = plan
    grid, partials, whole_map = None, mapped, None
    if summed.splits > 1:
        partials, whole_map = (
            images.new_empty((summed.splits, batch, h, w), dtype=torch.float32),
            mapped,
        )
    elif saliency is not None and (gh, gw) != (h, w):
        grid = images.new_empty((batch, gh, gw), dtype=torch.float32)
    call_seed = images.new_empty((1,), dtype=torch.int64)
    on_host = seed.device != images.device
    pairing_programs = augmentations * _blocks(batch, SAMPLES.value)
    with _on(images):
        launch(
            saliency_kernel,
            pairing_programs + batch * summed.splits * summed.tiles,
            table.THREADS,
            (
                source.data_ptr(),
                partials,
                grid,
                batch,
                summed.tiles,
                summed.splits,
                summed.row_count,
                h,
                w,
                *summed.strides,
                gh,
                gw,
                window_h,
                window_w,
                None if index is None else index.contiguous(),
                paired,
                None if on_host else seed,
                int(seed) if on_host else 0,
                step,
                rank,
                call_seed,
                pairing_programs,
            ),
            no_fixed_points,
            FLOATS[source.dtype],
            summed.layout,
            summed.planes,
            summed.rows,
            summed.chunks,
            summed.lanes,
            summed.unroll,
        )
        if grid is not None:
            h, w, window_h, window_w = gh, gw, 1, 1
        launch(
            saliency_graft_kernel,
            rows * (parts + (parts > 1)),
            cells.threads,
            (
                images.data_ptr(),
                out.data_ptr(),
                partials if grid is None else grid,
                whole_map,
                call_seed,
                step,
                quantiles,
                paired,
                None if targets is None else targets.contiguous(),
                lam,
                mask,
                mixed,
                batch,
                rows,
                parts,
                *_geometry(tile),
                summed.splits,
                h,
                w,
                gh,
                gw,
                window_h,
                window_w,
                temperature,
                threshold,
                k or 0,
                int(keep_prob * rng.ONE),
                int(prob * rng.ONE),
                num_classes,
                label_smoothing,
            ),
            normalize,
            k is not None,
            norm,
            "none" if targets is None else "ids" if targets.dim() == 1 else "rows",
            cells.cells,
            cells.terms,
            cells.unroll,
            at_once,
            tile.channels_last,
            tile.strided,
            tile.uniform,
            UNITS[tile.unit_bytes],
            tile.lines,
            tile.chunks,
            tile.lanes,
        )
    if not at_once:
        graft_out(out, images, mask, paired)
    return lam, paired, mask, mapped, mixed


OPERATORS: dict[str, Callable[..., Any]] = {
    "channel_saliency": channel_saliency,
    "graft": graft,
    "graft_out": graft_out,
    "graft_backward": graft_backward,
    "mix_targets": mix_targets,
    "saliency_graft": saliency_graft,
    "saliency_graft_out": saliency_graft_out,
}
