"""The public functions; saliency_graft runs the pipeline, each of the others one operator."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from sg_kernels import backends, checks, ops, shapes
from sg_kernels.backends import reference
from sg_kernels.options import (
    Norm,
    Options,
    OptionTypes,
    TokenGrid,
    check_bool,
    lists_options,
    options_of,
)
from sg_kernels.pipeline import GraftResult, Randomness, Tensors, mark_written, run


@lists_options
def saliency_graft(
    images: Tensor,
    features: Tensor | None = None,
    *,
    saliency: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    out: Tensor | None = None,
    **options: Unpack[OptionTypes],
) -> GraftResult:
    """Saliency Grafting (Park et al., AAAI 2022) of a batch.

    Salient patches of image i, each kept with probability p, are grafted onto image j = index[i].
    The labels are mixed by the saliency that survived of each: ``lam`` weighs the row's OWN label,
    so the target is ``lam * y_i + (1 - lam) * y_j``. Gradients flow to ``images``; no input is
    modified. docs/method.md has the formulas.

    Args:
        images: (B, C, H, W), any strides, any dtype of plain numbers: bool, integers, floats of 8
            bits and more, complex. Or (B, C, ..., H, W): what stands between C and H, such as the
            frames of a video or the slices of a volume, shares the mask. These are read in place
            if they are contiguous or in channels_last_3d, slices of the batch included, and else
            copied first.
        features: the feature map, (B, K, h, w), float16, bfloat16, float32 or float64, any strides;
            or transformer tokens (B, N, K) with ``token_grid``. The saliency of a cell is the sum
            of the absolute values of its channels.
        saliency: a ready map instead of ``features``, (B, h, w), floating, >= 0.
        channel_dim: which dimension of 4-D ``features`` is K; -1 for (B, h, w, K), as of Swin.
        token_grid: the grid of the patch tokens: (h, w), ``"square"``, or a function of ``images``
            that returns (h, w).
        prefix_tokens: how many tokens precede the patches, such as CLS and registers.
        targets: class ids (B,), any integer dtype, or dense rows (B, num_classes), multi-label too.
        num_classes: the width of the mixed targets; needed for class ids.
        label_smoothing: s in [0, 1]: targets become (1 - s) * mixed + s / num_classes.
        grid_size: (gh, gw), to which the map is resampled, area average down and nearest up; at
            most (H, W). None keeps (h, w). Of a sequence of sizes each call draws one, as the paper
            draws the scale per mini-batch.
        normalize: what the map is divided by before the softmax: its ``"max"``, its ``"mean"``, or
            ``"none"``, as in the paper, where the temperature that fits depends on K.
        temperature: T of the softmax over the cells, from 1e-38 to 1e38.
        threshold: sigma of the patch selection: a cell is salient if its softmax exceeds it.
            ``"mean"`` is 1 / cells; else a number in [0, 1), of which 0 keeps every cell. A map
            whose values all lie within 2**-16 of its largest, relatively, counts as constant and
            has no salient cell.
        selection: ``"bernoulli"``, or ``"topk"``: the ``k`` most salient cells and no sampling, the
            paper's deterministic ablation.
        k: how many cells ``"topk"`` keeps, 1 .. gh * gw.
        alpha: p is drawn from Beta(alpha, alpha), once per augmentation; > 0, at most 1e6.
        keep_prob: a fixed p in [0, 1] instead.
        mask: a mask of your own, such as CutMix boxes, bool (n * B, gh, gw), no finer than the
            images: True where a row keeps its own pixels. The map is resampled to (gh, gw). It
            excludes ``grid_size``, ``normalize``, ``temperature``, ``threshold``, ``selection``,
            ``k``, ``alpha`` and ``keep_prob``. With ``label="area"`` it needs neither ``features``
            nor ``saliency``.
        label: ``"saliency"``, the paper's calibrated label mixing, or ``"area"``: lam is the share
            of cells kept.
        norm: how surviving saliency is measured: ``"l1"``, ``"l2"`` or ``"l2sq"`` (squared l2). The
            paper's formula reads as l2, its footnote as l1 or squared l2.
        augmentations: n independent draws on one grid from one saliency pass: n * B rows.
        index: the pairing, instead of a drawn permutation: int64 (n * B,), in 0 .. B - 1;
            duplicates are allowed.
        no_fixed_points: draw a pairing in which no image meets itself; a batch of one image is not
            mixed.
        standardize: (mean, std), each a number or a sequence of one number per channel, in the
            units of ``images``: for uint8 in 0 .. 255, so 255 times the constants of timm and
            torchvision. Images, uint8, float16, bfloat16 or float32, come out as (images - mean) /
            std, computed as images * (1 / std) - mean / std in float32; gradients are multiplied by
            1 / std. ``features`` must come from standardised images.
        dtype: what standardised images come out in, float16, bfloat16 or float32; default: their
            own dtype if floating, else float32.
        seed: the 64-bit seed that decides the whole call: an int, or a one-element int64 tensor on
            the CPU or on the device of ``images``. The same seed gives the same draws on every
            backend and device. Default: drawn from ``generator``.
        generator: a torch.Generator on the CPU or on the device of ``images``; default: torch's own
            on the CPU.
        out: (n * B, C, ..., H, W), to be overwritten with the images, on their device and of the
            dtype that they come out in; not with gradients.
        backend: one of :func:`sg_kernels.available_backends`; default: SG_KERNELS_BACKEND, else
            ``triton`` or ``cuda`` on a GPU, ``cpp`` or ``reference`` on the CPU.

    Returns:
        A :class:`GraftResult`: images, lam, index, mask, saliency, targets.

    Raises:
        TypeError, ValueError: a bad argument, by its name. Values that lie on a GPU are not checked
            unless SG_KERNELS_DEBUG=1, nor are any under torch.compile: there a row whose index or
            class id is out of range gets lam = NaN and NaN targets.
        RuntimeError: ``backend`` cannot run here, or a CUDA graph would replay one draw.
    """
    checked = options_of("saliency_graft", options)
    if seed is not None and generator is not None:
        raise ValueError("generator and seed exclude each other; give one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    source = generator if seed is None else checks.seed_tensor(seed)
    tensors = Tensors(images, features, saliency, mask, index, targets, out)
    return run(checked, tensors, Randomness(source))


def channel_saliency(
    features: Tensor,
    *,
    channel_dim: int = 1,
    token_grid: TokenGrid = None,
    prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The saliency map S[b, y, x] = sum over k of |features[b, k, y, x]|, without gradient.

    Args:
        features: (B, K, h, w), or tokens (B, N, K) with ``token_grid``; float16, bfloat16, float32
            or float64; any strides.
        channel_dim: which dimension of 4-D ``features`` is K; -1 for (B, h, w, K).
        token_grid: the grid of the patch tokens, (h, w) or ``"square"``.
        prefix_tokens: how many tokens precede the patches.
        backend: as in :func:`saliency_graft`.

    Returns:
        (B, h, w), float32, summed in float32.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """
    options = Options(channel_dim=channel_dim, token_grid=token_grid, prefix_tokens=prefix_tokens)
    features = checks.feature_map(features, options)
    name = backends.choose(backend, features.device.type)
    return ops.overload("channel_saliency", name)(features)


def graft(
    images: Tensor,
    mask: Tensor,
    index: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Row r takes image r % B where its mask is True and image index[r] elsewhere, bit for bit.

    For masks of any kind, such as CutMix boxes, and for tensors that must be cut like the images,
    such as segmentation maps. Pixel (y, x) lies in cell (y * gh // H, x * gw // W). Gradients flow
    to ``images``.

    Args:
        images: (B, C, H, W), (B, C, ..., H, W) or (B, H, W), any dtype that
            :func:`saliency_graft` takes; one-hot maps with the classes first.
        mask: bool (n * B, gh, gw), no finer than the images.
        index: int64 (n * B,), in 0 .. B - 1; duplicates are allowed.
        out: n * B images of the same dtype, to be overwritten; not with gradients.
        backend: as in :func:`saliency_graft`.

    Returns:
        n * B images, in the dtype and memory format of ``images``.

    Raises:
        TypeError, ValueError: a bad argument, by its name. On a GPU, where values are not checked,
            a row whose index is out of range is a copy of its own image.
    """
    checks.check_images(images, least_dims=3)
    batch, device = images.shape[0], images.device
    rows, gh, gw = checks.check_mask(mask, images)
    checks.check_rows("mask", rows, batch)
    if images.dim() == 4 and not torch.compiler.is_compiling():
        checks.warn_of_last_channels(images, (gh, gw))
    checks.check_index(index, rows, batch, device)
    name = backends.choose(backend, device.type)
    if out is not None:
        checks.check_out(out, images, rows, {"mask": mask, "index": index})
    folded, written, depth = shapes.fold(images, out)
    if depth > 1:
        mask = mask.repeat(1, depth, 1)
    if out is not None and written is not None:
        ops.overload("graft", name)(folded, mask, index, written)
        mark_written(out)
        return out
    if checks.needs_gradient(images):
        grafted = ops.Graft.apply(folded, mask, index, name)
    else:
        grafted = ops.overload("graft", name)(folded, mask, index)
    if images.dim() != 4:
        grafted = grafted.view(rows, *images.shape[1:])
    return grafted if out is None else out.copy_(grafted)


def mix_targets(
    targets: Tensor,
    lam: Tensor,
    index: Tensor,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """lam * y_i + (1 - lam) * y_j, with i the row's own image and j = index[row]; no gradient.

    Args:
        targets: class ids (B,), any integer dtype, or dense rows (B, num_classes), multi-label too.
        lam: the weight of the row's own label, float32 (n * B,).
        index: int64 (n * B,), in 0 .. B - 1.
        num_classes: needed for class ids.
        label_smoothing: in [0, 1]; the result is (1 - s) * mixed + s / num_classes.
        backend: as in :func:`saliency_graft`.

    Returns:
        (n * B, num_classes), float32.

    Raises:
        TypeError, ValueError: a bad argument, by its name. On a GPU, where values are not checked,
            a row whose index or class id is out of range is NaN.
    """
    options = Options(num_classes=num_classes, label_smoothing=label_smoothing)
    checks.check_tensor("targets", targets, "(B,) or (B, num_classes)", 1, 2)
    batch, device = targets.shape[0], targets.device
    checks.check_tensor("lam", lam, "(n * B,)", 1, dtypes=(torch.float32,), device=device)
    rows = lam.shape[0]
    checks.check_rows("lam", rows, batch)
    checks.check_index(index, rows, batch, device)
    targets, width = checks.ids_or_rows(targets, options, batch, device)
    mix = ops.overload("mix_targets", backends.choose(backend, device.type))
    return mix(targets, lam.detach(), index, width, label_smoothing)


class Shares(NamedTuple):
    """How much saliency survives in each row, float32 (rows,); see :func:`label_ratio`."""

    own: Tensor
    """I(S_i, M), of the row's own image."""
    other: Tensor
    """I(S_j, 1 - M), of the image that it is grafted onto."""


@overload
def label_ratio(
    saliency: Tensor,
    mask: Tensor,
    index: Tensor,
    *,
    norm: Norm = "l1",
    shares: Literal[False] = False,
) -> Tensor: ...


@overload
def label_ratio(
    saliency: Tensor, mask: Tensor, index: Tensor, *, norm: Norm = "l1", shares: Literal[True]
) -> Shares: ...


def label_ratio(
    saliency: Tensor, mask: Tensor, index: Tensor, *, norm: Norm = "l1", shares: bool = False
) -> Tensor | Shares:
    """The weight of a row's own label: lam = own / (own + other), without gradient.

    own = I(S_i, M) and other = I(S_j, 1 - M) are the shares of saliency that survive in the
    row, with I(S, M) = ||S M|| / ||S||, i the row's own image and j = index[row].

    Args:
        saliency: (B, h, w), floating, >= 0; resampled to the grid of the mask, area average down
            and nearest up.
        mask: bool (n * B, gh, gw), True where a row keeps its own pixels.
        index: int64 (n * B,), in 0 .. B - 1; duplicates are allowed.
        norm: ``"l1"``, ``"l2"`` or ``"l2sq"`` (squared l2). By area lam would be
            ``mask.float().mean((1, 2))``.
        shares: return own and other instead of lam.

    Returns:
        lam, float32 (n * B,), in [0, 1]: the share of True cells where a norm or own + other is 0
        or not finite. Or :class:`Shares`, NaN where ||S|| is 0 or not finite.

    Raises:
        TypeError, ValueError: a bad argument, by its name. Values that lie on a GPU are not checked
            unless SG_KERNELS_DEBUG=1: where an index is out of range, lam and other are NaN.
    """
    options = Options(norm=norm)
    check_bool("shares", shares)
    saliency = checks.ready_map(saliency, options)
    batch, device = saliency.shape[0], saliency.device
    checks.check_tensor("mask", mask, "(n * B, gh, gw)", 3, dtypes=(torch.bool,), device=device)
    rows, gh, gw = mask.shape
    for name, size in (("saliency", saliency.shape), ("mask", mask.shape)):
        if not (size[1] and size[2]):
            raise ValueError(f"{name} must have at least one cell; got {tuple(size)}")
    checks.check_rows("mask", rows, batch)
    checks.check_index(index, rows, batch, device)
    grid = reference.resample(reference.checked_saliency(saliency), (gh, gw))
    if shares:
        return Shares(*reference.shares(grid, mask, index, norm))
    return reference.label_ratio(grid, mask, index, norm)
