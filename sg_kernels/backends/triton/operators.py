"""The operators of :mod:`sg_kernels.ops` on the Triton kernels: what they allocate and launch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sg_kernels import rng
from sg_kernels.backends import reference
from sg_kernels.backends.triton import plan, repeat
from sg_kernels.backends.triton.arguments import (
    GraftMemory,
    Maps,
    MixMemory,
    Options,
    Pairing,
    RowsMemory,
    SaliencyMemory,
    Size,
    Stages,
)
from sg_kernels.backends.triton.backward import graft_backward_kernel
from sg_kernels.backends.triton.copy import graft_kernel
from sg_kernels.backends.triton.launch import Launch, launch, multiprocessors, overlaps
from sg_kernels.backends.triton.rows import COLUMNS, mix_targets_kernel, saliency_graft_kernel
from sg_kernels.backends.triton.saliency import SAMPLES, saliency_kernel
from sg_kernels.call import NORM, NORMALIZE, Call, Outputs

UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""The integers that images are copied as, by their bytes."""
FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""What features and gradients are read as."""
NUMBERS = {torch.uint8: tl.uint8, **FLOATS}
"""What images are read and written as where they come out standardised."""
NO_PAIRING = Pairing(programs=0, rank=0, host_seed=0, keep_prob=0, prob=0)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)  # triton.cdiv takes 4 us on the host


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    index = tensor.get_device()  # -1: not on a GPU
    if index < 0 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


def _layout(source: Tensor) -> tuple[Any, ...]:
    """What the plan asks of features."""
    return (
        source.shape,
        source.stride(),
        source.element_size(),
        plan.alignment(source.data_ptr()),
    )


def _copy_layout(images: Tensor, out: Tensor) -> tuple[Any, ...]:
    """What the plan asks of images and their copy. Where the elements of one are wider, it counts
    bytes as if they were as narrow as the other's.
    """
    element, address, out_address = images.element_size(), images.data_ptr(), out.data_ptr()
    if (out_element := out.element_size()) != element:
        narrow = min(element, out_element)
        address, out_address = address * narrow // element, out_address * narrow // out_element
        element = narrow
    return (
        out.shape[0],
        images.shape,
        images.stride(),
        out.stride(),
        element,
        plan.alignment(address, out_address),
    )


def _units(images: Tensor, out: Tensor, tile: plan.Tile, standardized: bool) -> tuple[Any, Any]:
    """What images are read and written as."""
    if standardized:
        return NUMBERS[images.dtype], NUMBERS[out.dtype]
    return UNITS[tile.unit_bytes], UNITS[tile.unit_bytes]


def _tile(
    images: Tensor, out: Tensor, grid: tuple[int, int], arithmetic: bool = False, depth: int = 1
) -> plan.Tile | None:
    device = multiprocessors(images.get_device())
    return plan.tile(*_copy_layout(images, out), grid, arithmetic, plan.THREADS, device, depth)


def channel_saliency(features: Tensor) -> Tensor:
    batch, _, h, w = features.shape
    saliency = features.new_empty(batch, h, w, dtype=torch.float32)
    if saliency.numel() == 0:
        return saliency
    size = Size(h, w)
    if plan.map_too_large(size, (1, 1)):
        return reference.channel_saliency(features)
    block, sums = plan.saliency(*_layout(features), multiprocessors(features.get_device()))
    splits = sums.splits
    partials = saliency
    if splits > 1:
        partials = features.new_empty(splits, batch, h, w, dtype=torch.float32)
    with _on(features):
        launch(
            Launch(
                saliency_kernel,
                (batch * splits * sums.tiles, 1, 1),
                plan.THREADS,
                (
                    SaliencyMemory(features.data_ptr(), partials),
                    batch,
                    sums,
                    Maps(size, size, Size(1, 1)),
                    NO_PAIRING,
                ),
                (False, FLOATS[features.dtype], block, False),
            )
        )
    return partials.sum(0) if splits > 1 else saliency


def graft(images: Tensor, mask: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    written = reference.empty_rows(images, mask.shape[0]) if out is None else out
    if written.numel() > 0:
        grid = Size(*mask.shape[1:])
        tile = _tile(images, written, grid)
        if tile is None:
            reference.graft(images, mask, index, written)
        else:
            with _on(images):
                launch(_copy(images, mask, index, written, grid, tile))
    return written if out is None else images.new_empty(0)


def _copy(
    images: Tensor,
    mask: Tensor,
    index: Tensor,
    out: Tensor,
    grid: Size,
    tile: plan.Tile,
    affine: Tensor | None = None,
) -> Launch:
    return Launch(
        graft_kernel,
        (out.shape[0] * tile.tiles.total, 1, 1),
        plan.THREADS,
        (
            GraftMemory(
                images.data_ptr(), out.data_ptr(), mask.contiguous(), index.contiguous(), affine
            ),
            images.shape[0],
            tile.tiles,
            grid,
        ),
        (*_units(images, out, tile, affine is not None), tile.layout),
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
    grid = Size(*mask.shape[1:])
    tile = _tile(grad, out, grid, arithmetic=True)
    if tile is None:
        out.copy_(reference.graft_backward(grad, mask, index, mask.shape[0] // out.shape[0]))
        return
    with _on(grad):
        launch(
            Launch(
                graft_backward_kernel,
                (out.shape[0] * tile.tiles.total, 1, 1),
                plan.THREADS,
                (
                    GraftMemory(
                        grad.data_ptr(), out.data_ptr(), mask.contiguous(), index.contiguous()
                    ),
                    out.shape[0],
                    grad.shape[0],
                    tile.tiles,
                    grid,
                ),
                (FLOATS[grad.dtype], tile.layout),
            )
        )


def mix_targets(
    targets: Tensor, lam: Tensor, index: Tensor, num_classes: int, label_smoothing: float
) -> Tensor:
    rows = lam.shape[0]
    mixed = lam.new_empty(rows, num_classes, dtype=torch.float32)
    if mixed.numel() == 0:
        return mixed
    tiles = _blocks(num_classes, COLUMNS.value)
    with _on(lam):
        launch(
            Launch(
                mix_targets_kernel,
                (rows * tiles, 1, 1),
                plan.THREADS,
                (
                    MixMemory(targets.contiguous(), lam.contiguous(), index.contiguous(), mixed),
                    targets.shape[0],
                    tiles,
                    num_classes,
                    label_smoothing,
                ),
                (_kind(targets),),
            )
        )
    return mixed


def _kind(targets: Tensor | None) -> str:
    return "none" if targets is None else "ids" if targets.dim() == 1 else "rows"


def saliency_graft(*args: Any) -> Outputs:
    if repeated := repeat.again(args):
        return repeated
    call = Call(*args)
    images, out = call.images, call.out
    if out is None:
        out = reference.empty_rows(images, call.augmentations * images.shape[0], call.out_dtype())
    planned = plan.saliency_graft(
        *_copy_layout(images, out),
        *_layout(call.source()),
        call.saliency is not None,
        tuple(call.grid_size),
        multiprocessors(images.get_device()),
        call.depth,
        call.affine is not None,
    )
    if planned is None:
        outputs = reference.saliency_graft(call._replace(out=out))
        return outputs if call.out is not None else outputs._replace(images=out)
    outputs = _empty_outputs(planned, call, out)
    dense = _dense(call)
    with _on(images):
        launches = _launches(planned, dense, out, outputs)
        for each in launches:
            launch(each)
        if dense is call:
            repeat.keep(args, launches, outputs)
    return outputs


def _dense(call: Call) -> Call:
    """The call itself, or with copies of the tensors that are not dense but must be."""
    copied = {}
    for name in ("saliency", "mask", "index", "targets", "affine"):
        tensor = getattr(call, name)
        if tensor is not None and not tensor.is_contiguous():
            copied[name] = tensor.contiguous()
    return call._replace(**copied) if copied else call


def _empty_outputs(planned: plan.Plan, call: Call, out: Tensor) -> Outputs:
    images, rows = call.images, out.shape[0]
    columns = 0 if call.targets is None else call.num_classes
    return Outputs(
        out if call.out is None else out.new_empty(0),
        images.new_empty(rows, dtype=torch.float32),
        images.new_empty(rows, dtype=torch.int64),
        images.new_empty(rows, *planned.maps.grid, dtype=torch.bool),
        images.new_empty(planned.rows.batch, *planned.maps.size, dtype=torch.float32),
        images.new_empty(rows, columns, dtype=torch.float32),
    )


def _launches(planned: plan.Plan, call: Call, out: Tensor, outputs: Outputs) -> list[Launch]:
    first = _launch_1(planned, call, outputs)
    launches = [first, _launch_2(planned, call, first.arguments[0], out, outputs)]
    if not planned.at_once:
        # Not with the plan's own tiles, whose programs have the threads of launch 2.
        grid, standardized = planned.maps.grid, call.affine is not None
        tile = _tile(call.images, out, grid, standardized, call.depth)
        assert tile is not None
        copy = _copy(call.images, outputs.mask, outputs.index, out, grid, tile, call.affine)
        launches.append(copy)
    return launches


def _launch_1(planned: plan.Plan, call: Call, outputs: Outputs) -> Launch:
    """Sums the channels; draws the pairing and p."""
    block, sums = planned.saliency
    images, seed, batch = call.images, call.seed, planned.rows.batch
    source = call.source()
    partials, grid = outputs.saliency, None
    if sums.splits > 1:
        partials = images.new_empty(sums.splits, *partials.shape, dtype=torch.float32)
    if planned.gridded:
        grid = images.new_empty(batch, *planned.maps.grid, dtype=torch.float32)
    on_host = seed.device != images.device
    programs = call.augmentations * _blocks(batch, SAMPLES.value)
    return Launch(
        saliency_kernel,
        (programs + batch * sums.splits * sums.tiles, 1, 1),
        plan.THREADS,
        (
            SaliencyMemory(
                source=source.data_ptr(),
                partials=partials,
                grid=grid,
                index=outputs.index,
                given_index=call.index,
                drawn=images.new_empty(1 + call.augmentations, dtype=torch.int64),
                seed=None if on_host else seed,
                step=call.step,
                quantiles=call.quantiles,
            ),
            batch,
            sums,
            planned.maps,
            Pairing(
                programs=programs,
                rank=call.rank,
                host_seed=int(seed) if on_host else 0,
                keep_prob=int(call.keep_prob * rng.ONE),
                prob=int(call.prob * rng.ONE),
            ),
        ),
        (
            call.no_fixed_points,
            FLOATS[source.dtype],
            block,
            overlaps(images.get_device(), 1),
        ),
    )


def _launch_2(
    planned: plan.Plan, call: Call, written: SaliencyMemory, out: Tensor, outputs: Outputs
) -> Launch:
    """Works out everything of a row from what launch 1 has ``written``; copies it too where the
    plan says so.
    """
    targets, rows, tile = call.targets, planned.rows, planned.tile
    assert written.drawn is not None
    return Launch(
        saliency_graft_kernel,
        (rows.batch, call.augmentations, rows.parts + (rows.parts > 1)),
        planned.threads,
        (
            RowsMemory(
                images=call.images.data_ptr(),
                out=out.data_ptr(),
                maps=written.partials if written.grid is None else written.grid,
                saliency=outputs.saliency if planned.cells.splits > 1 else None,
                drawn=written.drawn,
                step=call.step,
                given_mask=call.mask,
                index=outputs.index,
                targets=targets,
                lam=outputs.lam,
                mask=outputs.mask,
                mixed=outputs.targets,
                affine=call.affine,
            ),
            rows,
            tile.tiles,
            planned.grids,
            Options(
                temperature=call.temperature,
                threshold=call.threshold,
                k=call.k or 0,
                num_classes=call.num_classes,
                label_smoothing=call.label_smoothing,
            ),
        ),
        (
            Stages(
                normalize=NORMALIZE[call.normalize],
                topk=call.k is not None,
                norm=NORM[call.norm],
                targets=_kind(targets),
            ),
            planned.cells,
            planned.at_once,
            *_units(call.images, out, tile, call.affine is not None),
            tile.layout,
            overlaps(call.images.get_device(), 2),
        ),
    )
