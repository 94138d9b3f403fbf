"""Saliency Grafting (Park et al., AAAI 2022) in plain PyTorch: the specification of every backend.

One function per stage, in the order of the paper; :func:`saliency_graft` runs them all. The
compiled backends have the same stages under the same names.

Shapes: B images, rows = augmentations * B outputs. Row ``a * B + b`` grafts patches of image b, the
source, onto image ``index[row]``, the destination. Maps are float32 (B, h, w); masks and grids are
(gh, gw).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sg_kernels import rng
from sg_kernels.call import NORM, NORMALIZE, Call, Outputs

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Stand-ins for the wide unsigned dtypes, which torch 2.10 can neither index nor select."""
FLAT = 1 - 2**-16
"""A map whose minimum is at least this share of its maximum counts as constant, because averages
of equal values differ by rounding."""

WITHOUT_FLOAT64 = ("mps", "xpu")
"""Device types on which float64 is missing, or may be."""

HEADROOM = 2.0**-24
"""Windows are summed at this scale, where the sum of finite values is finite. A power of two, it
changes no bit but those of values below 1e-30."""

TINY = torch.finfo(torch.float32).tiny
"""Least numerator of the softmax: exp underflows at low temperatures, where threshold=0 still keeps
every cell."""


def channel_saliency(features: Tensor, accumulate: torch.dtype = torch.float32) -> Tensor:
    """Stage 1: S[b, y, x] = sum over k of |features[b, k, y, x]|, without gradient."""
    return features.detach().abs().sum(dim=1, dtype=accumulate).float()


def checked_saliency(saliency: Tensor) -> Tensor:
    """A ready map in float32. What is not >= 0 counts as NaN, so its sample has no salient cell."""
    return torch.where(saliency >= 0, saliency, torch.nan).float().contiguous()


def resample(saliency: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Stage 2: the map on the grid, axis by axis: area average where it shrinks, else nearest."""
    (h, w), (gh, gw) = saliency.shape[1:], grid_size
    if (h, w) == (gh, gw):
        return saliency
    if gh > h:
        saliency = saliency[:, nearest(gh, h, saliency.device)]
    if gw > w:
        saliency = saliency[:, :, nearest(gw, w, saliency.device)]
    return F.adaptive_avg_pool2d(saliency[:, None] * HEADROOM, grid_size)[:, 0] / HEADROOM


def nearest(size: int, source_size: int, device: torch.device) -> Tensor:
    """The source position, of ``source_size``, that each of ``size`` positions falls into."""
    return torch.arange(size, device=device) * source_size // size


def normalize_scale(saliency: Tensor, normalize: str) -> Tensor:
    """Stage 3: the divisor of the map before the softmax, (B, 1)."""
    flat = saliency.flatten(1)
    match normalize:
        case "max":
            return flat.amax(1, keepdim=True)
        case "mean":
            return mean(flat)
        case _:
            return torch.ones_like(flat[:, :1])


def mean(flat: Tensor) -> Tensor:
    """The mean of each row, (B, 1), whose sum must not overflow."""
    if flat.device.type not in WITHOUT_FLOAT64:
        return flat.mean(1, keepdim=True, dtype=torch.float64).float()
    peak = flat.amax(1, keepdim=True)
    return peak * (flat / peak).mean(1, keepdim=True)


def select(
    saliency: Tensor, normalize: str, temperature: float, threshold: float, k: int | None
) -> Tensor:
    """Stage 4: the salient cells, softmax(S / T) > threshold or the k largest: bool (B, gh, gw)."""
    flat = saliency.flatten(1)
    if k is None:
        peak = flat.amax(1, keepdim=True)
        e = torch.exp((flat - peak) / normalize_scale(saliency, normalize) / temperature)
        e = e.clamp_min(TINY)
        keep = (e > threshold * e.sum(1, keepdim=True)) & (flat.amin(1, keepdim=True) < peak * FLAT)
    else:
        ranking = flat.argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, ranking[:, :k], True)
    return (keep & flat.isfinite().all(1, keepdim=True)).view_as(saliency)


def draw_keep_prob(
    seed: Tensor, quantiles: Tensor | None, keep_prob: float, prob: float, draws: int
) -> tuple[Tensor, Tensor]:
    """Stage 5, what the rows of a draw share: (draws, 1) each.

    p as a threshold of words, drawn from ``quantiles``, or without them ``keep_prob``; and whether
    the draw grafts at all, which it does with probability ``prob``.
    """
    p_word, gate_word = rng.words(seed, rng.Stream.KEEP_PROB, 2, draws=draws).unbind(-1)
    if quantiles is None:
        p = torch.full_like(p_word, int(keep_prob * rng.ONE))
    else:
        p = rng.keep_threshold(p_word, quantiles)
    return p, gate_word < int(prob * rng.ONE)


def sample(keep: Tensor, seed: Tensor, p: Tensor) -> Tensor:
    """Stage 5: keep and Bernoulli(p), with one p per draw: bool (rows, gh, gw)."""
    batch, gh, gw = keep.shape
    word = rng.words(seed, rng.Stream.SAMPLING, gh * gw, batch, len(p))
    return (keep.flatten(1) & (word < p[..., None])).reshape(-1, gh, gw)


def gate(mask: Tensor, grafts: Tensor) -> Tensor:
    """Stage 5: M; all True in a draw that does not graft, whose rows are the source images."""
    return (mask.reshape(len(grafts), -1) | ~grafts).view(mask.shape)


def graft(images: Tensor, mask: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Stage 6: the source's pixels where M is True, the destination's elsewhere, bit for bit.

    A row whose index is out of range is a copy of its source.
    """
    (batch, _, height, width), (rows, gh, gw) = images.shape, mask.shape
    source = torch.arange(rows, device=index.device) % max(batch, 1)
    destination = torch.where(in_range(index, batch), index, source)
    cell_row = nearest(height, gh, mask.device)[:, None]
    if out is None:
        out = empty_rows(images, rows)
    bits = SIGNED.get(images.dtype, images.dtype)
    images = images.view(bits)
    torch.where(
        mask[:, None, cell_row, nearest(width, gw, mask.device)],
        images if rows == batch else images[source],
        images[destination],
        out=out.view(bits),
    )
    return out


def affine(mean: Sequence[float], std: Sequence[float], channels: int) -> Tensor:
    """The scale 1 / std and the shift -mean / std of each channel, float32 (2, channels).

    Rounded once, from float64. With fewer means than channels, each serves equally many
    neighbouring channels.
    """
    pairs = [[1 / s for s in std], [-m / s for m, s in zip(mean, std)]]
    rounded = torch.tensor(pairs, dtype=torch.float64, device="cpu").float()
    return rounded.repeat_interleave(channels // len(mean), dim=1)


def standardize(images: Tensor, affine: Tensor) -> Tensor:
    """Stage 6, with ``affine``: images * scale + shift in float32, rounded after each step."""
    scale, shift = affine.view(2, -1, *[1] * (images.dim() - 2))
    return images.float() * scale + shift


def graft_backward(grad: Tensor, mask: Tensor, index: Tensor, augmentations: int) -> Tensor:
    """The gradient of stage 6: each pixel's gradient goes to the image it was copied from."""
    (rows, gh, gw), (height, width) = mask.shape, grad.shape[2:]
    batch = rows // augmentations
    source = torch.arange(rows, device=index.device) % max(batch, 1)
    destination = torch.where(in_range(index, batch), index, source)
    from_source = mask[
        :, None, nearest(height, gh, mask.device)[:, None], nearest(width, gw, mask.device)
    ]
    total = torch.zeros_like(
        empty_rows(grad, batch), dtype=torch.promote_types(grad.dtype, torch.float32)
    )
    total.index_add_(0, source, torch.where(from_source, grad, 0).to(total.dtype))
    total.index_add_(0, destination, torch.where(from_source, 0, grad).to(total.dtype))
    return total.to(grad.dtype)


def shares(saliency: Tensor, mask: Tensor, index: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Stage 7: how much saliency survives of source and destination, float32 (rows,) each.

    I(S_i, M) and I(S_j, 1 - M) with I(S, M) = ||S M|| / ||S||. NaN where ||S|| is 0 or not finite,
    and of the destination where the index is out of range.
    """
    batch = saliency.shape[0]
    mask = mask.flatten(1)
    valid = in_range(index, batch)
    flat = saliency.flatten(1)
    weight = flat / flat.amax(1, keepdim=True)  # leaves I as it is; squares cannot overflow
    if norm != "l1":
        weight = weight.square()
    share = weight / weight.sum(1, keepdim=True)
    kept = (share.repeat(mask.shape[0] // max(batch, 1), 1) * mask).sum(1)
    left = (share[torch.where(valid, index, 0)] * ~mask).sum(1)
    left = torch.where(valid, left, torch.nan)
    return (kept.sqrt(), left.sqrt()) if norm == "l2" else (kept, left)


def label_ratio(saliency: Tensor, mask: Tensor, index: Tensor, norm: str) -> Tensor:
    """Stage 7: the weight lam of the row's own label, float32 (rows,).

    kept / (kept + left) of the :func:`shares`. The share of True cells for norm "area", and where a
    norm or the denominator is 0 or not finite. NaN where the index is out of range.
    """
    lam = mask.flatten(1).float().mean(1)
    if norm != "area":
        kept, left = shares(saliency, mask, index, norm)
        ratio = kept / (kept + left)
        lam = torch.where(ratio.isfinite(), ratio, lam)
    return torch.where(in_range(index, saliency.shape[0]), lam, torch.nan)


def mix_targets(
    targets: Tensor, lam: Tensor, index: Tensor, num_classes: int, label_smoothing: float
) -> Tensor:
    """Stage 8: lam * y_i + (1 - lam) * y_j, smoothed, float32 (rows, num_classes).

    ``targets`` are class ids (B,) or dense rows (B, num_classes). Where an index or a class id is
    out of range, the row is NaN.
    """
    batch = targets.shape[0]
    if targets.dim() == 1:
        classes = torch.arange(num_classes, device=targets.device)
        one_hot = (targets[:, None] == classes).float()
        targets = torch.where(in_range(targets, num_classes)[:, None], one_hot, torch.nan)
    valid = in_range(index, batch)
    own = targets.float().repeat(index.shape[0] // max(batch, 1), 1)
    other = own[torch.where(valid, index, 0)]
    lam = torch.where(valid, lam, torch.nan)[:, None]
    mixed = lam * own + (1 - lam) * other
    return (1 - label_smoothing) * mixed + label_smoothing / max(num_classes, 1)


def in_range(value: Tensor, size: int) -> Tensor:
    return (value >= 0) & (value < size)


def empty_rows(images: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised output of ``rows`` images, in the memory format of ``images``."""
    channels_last = is_channels_last(images)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (rows, *images.shape[1:]),
        dtype=dtype or images.dtype,
        device=images.device,
        memory_format=memory_format,
    )


def is_channels_last(images: Tensor) -> bool:
    """Whether torch takes images for channels_last, or those of five dimensions for
    channels_last_3d: c10's is_channels_last_strides_2d and _3d.

    Strides grow from the channels over width and height to the batch. Those of sides of one pixel
    mean nothing, and where nothing decides images are contiguous.
    """
    sizes, strides = images.shape, images.stride()
    least = 0
    for dim in (1, *range(images.dim() - 1, 1, -1), 0):
        if sizes[dim] == 0 or strides[dim] < max(least, 1):
            return False
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * sizes[dim]
    return True


def saliency_graft(call: Call) -> Outputs:
    """The whole method."""
    images, targets = call.images, call.targets
    seed, index, saliency = call.seed.to(images.device), call.index, call.saliency
    draws = call.augmentations
    if call.step is not None:
        seed = rng.call_seed(seed, call.step, call.rank)
        call.step.add_(1)
    if index is None:
        index = rng.pairing(seed, images.shape[0], draws, call.no_fixed_points).flatten()
    else:
        index = index.clone()  # no output of an operator may be one of its inputs
    if saliency is None:
        assert call.features is not None
        # torch.sum takes an order of its own in each cell, which float32 would show: cells with
        # equal features must tie where cells are ranked.
        wide = call.k is not None and images.device.type not in WITHOUT_FLOAT64
        saliency = channel_saliency(call.features, torch.float64 if wide else torch.float32)
    else:
        saliency = checked_saliency(saliency)
    has_map = saliency.shape[1] > 0
    grid = resample(saliency, call.grid_size) if has_map else saliency
    normalize, norm = NORMALIZE[call.normalize], NORM[call.norm]
    p, grafts = draw_keep_prob(seed, call.quantiles, call.keep_prob, call.prob, draws)
    mask = call.mask
    if mask is None:
        keep = select(grid, normalize, call.temperature, call.threshold, call.k)
        mask = sample(keep, seed, p)
    mask = gate(mask, grafts)
    over_depth = mask.repeat(1, call.depth, 1)
    if call.affine is None:
        grafted = graft(images, over_depth, index, call.out)
    else:
        exact = standardize(graft(images, over_depth, index), call.affine)
        out = call.out
        if out is None:
            out = empty_rows(images, mask.shape[0], call.out_dtype())
        grafted = out.copy_(exact)
    lam = label_ratio(grid, mask, index, norm)
    if targets is None:
        mixed = lam.new_empty(lam.shape[0], 0)
    else:
        mixed = mix_targets(targets, lam, index, call.num_classes, call.label_smoothing)
        if targets.dim() == 1:  # lam, too, shows which rows have a class id out of range
            lam = torch.where(mixed[:, 0].isnan(), torch.nan, lam)
    if call.out is not None:
        grafted = call.out.new_empty(0)
    return Outputs(grafted, lam, index, mask, saliency, mixed)
