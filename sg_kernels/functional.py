"""The public functions: each checks its arguments, draws the seed, and calls one operator."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from sg_kernels import backends, ops, rng

Normalize = Literal["max", "mean", "none"]
Selection = Literal["bernoulli", "topk"]
Label = Literal["saliency", "area"]
Norm = Literal["l1", "l2", "l2sq"]
GridSize = tuple[int, int] | Sequence[tuple[int, int]] | None

DEBUG = os.environ.get("SG_KERNELS_DEBUG", "0") not in ("", "0")
"""Whether values that lie on a GPU are checked too, which costs a sync."""

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GraftResult(NamedTuple):
    """What :func:`saliency_graft` returns. rows = augmentations * B; row a * B + b is image b's."""

    images: Tensor
    """The grafted images (rows, C, H, W), in the dtype and memory format of the input."""
    lam: Tensor
    """The weight of the row's own label, float32 (rows,), in [0, 1]."""
    index: Tensor
    """The image that each row was grafted onto, int64 (rows,), in 0 .. B - 1."""
    mask: Tensor
    """True in the cells whose pixels are the row's own, bool (rows, gh, gw)."""
    saliency: Tensor
    """The saliency map, float32 (B, h, w)."""
    targets: Tensor | None
    """lam * y_i + (1 - lam) * y_j, float32 (rows, num_classes); None where no targets were given."""


@dataclass(slots=True)
class Options:
    """The options of a call that are no tensors, checked; :func:`saliency_graft` says what they are."""

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
        if self.threshold != "mean" and not (
            _is_number(self.threshold) and 0 <= self.threshold < 1
        ):
            raise ValueError(f"threshold must be 'mean' or in [0, 1); got {self.threshold!r}")
        if not (_is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be a finite number > 0; got {self.alpha!r}")
        for name in ("keep_prob", "label_smoothing", "prob"):
            value = getattr(self, name)
            optional = name == "keep_prob" and value is None
            if not optional and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")
        if self.selection not in ("bernoulli", "topk"):
            raise ValueError(f"selection must be 'bernoulli' or 'topk'; got {self.selection!r}")
        if (self.selection == "topk") != (self.k is not None):
            raise ValueError(f"k goes with selection='topk'; got k={self.k!r}, {self.selection!r}")
        if self.label not in ("saliency", "area"):
            raise ValueError(f"label must be 'saliency' or 'area'; got {self.label!r}")
        if self.norm not in ("l1", "l2", "l2sq"):
            raise ValueError(f"norm must be 'l1', 'l2' or 'l2sq'; got {self.norm!r}")
        for name, least in (("k", 1), ("augmentations", 1), ("num_classes", 1), ("prefix_tokens", 0)):
            value = getattr(self, name)
            optional = name in ("k", "num_classes") and value is None
            if not optional and not (_is_int(value) and value >= least):
                raise ValueError(f"{name} must be an int >= {least}; got {value!r}")
        if not isinstance(self.no_fixed_points, bool):
            raise TypeError(f"no_fixed_points must be a bool; got {self.no_fixed_points!r}")
        if self.grid_size is not None and not is_size(self.grid_size):
            if not (
                isinstance(self.grid_size, Sequence)
                and len(self.grid_size) > 0
                and all(is_size(size) for size in self.grid_size)
            ):
                raise ValueError(
                    f"grid_size must be (gh, gw), a sequence of such sizes or None; "
                    f"got {self.grid_size!r}"
                )
        if self.token_grid is not None and not is_size(self.token_grid):
            raise ValueError(f"token_grid must be (h, w), ints >= 1; got {self.token_grid!r}")


def saliency_graft(
    images: Tensor,
    features: Tensor | None = None,
    *,
    saliency: Tensor | None = None,
    temperature: float = 0.2,
    normalize: Normalize = "max",
    threshold: float | Literal["mean"] = "mean",
    grid_size: GridSize = None,
    alpha: float = 1.0,
    keep_prob: float | None = None,
    selection: Selection = "bernoulli",
    k: int | None = None,
    label: Label = "saliency",
    norm: Norm = "l1",
    augmentations: int = 1,
    index: Tensor | None = None,
    no_fixed_points: bool = False,
    targets: Tensor | None = None,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    token_grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> GraftResult:
    """Saliency Grafting (Park et al., AAAI 2022) of a batch.

    Salient patches of image i, each kept with probability p, are grafted onto image j = index[i]. The
    labels are mixed by the saliency that survived of each: ``lam`` weighs the row's OWN label, so
    the target is ``lam * y_i + (1 - lam) * y_j``. Gradients flow to ``images``; nothing is modified.

    Args:
        images: (B, C, H, W), any dtype, any strides.
        features: the feature map whose channel-wise L1 norm is the saliency, (B, K, h, w), float16,
            bfloat16, float32 or float64; or transformer tokens (B, N, K), see ``token_grid``.
        saliency: a ready map instead of ``features``, (B, h, w), floating, >= 0.
        temperature: T > 0 of the softmax over the cells.
        normalize: what the map is divided by before the softmax: its ``"max"``, its ``"mean"``, or
            ``"none"``, the paper's letter, under which a fitting T depends on the channel count.
        threshold: sigma; a cell is salient where its softmax exceeds it. ``"mean"`` is 1 / cells; else
            a number in [0, 1).
        grid_size: (gh, gw), to which the map is resampled, area average down and nearest up, at
            most (H, W). None keeps (h, w). Of a sequence of sizes one is drawn per call.
        alpha: p is drawn from Beta(alpha, alpha), once per augmentation; > 0.
        keep_prob: a fixed p in [0, 1] instead.
        selection: ``"bernoulli"``, or ``"topk"``: the ``k`` most salient cells and no sampling, the
            paper's deterministic ablation.
        k: the cells that ``"topk"`` keeps, 1 .. gh * gw.
        label: ``"saliency"``, or ``"area"``: lam is the share of cells kept.
        norm: how surviving saliency is measured: ``"l1"``, ``"l2"`` or ``"l2sq"`` (squared l2). The
            paper's formula reads as l2, its footnote as l1 or squared l2.
        augmentations: n independent draws on one grid from one saliency pass, stacked to n * B rows.
        index: the pairing instead of a drawn permutation, int64 (n * B,), in 0 .. B - 1; duplicates are
            allowed.
        no_fixed_points: draw a pairing in which no image meets itself; needs B != 1.
        targets: class ids (B,), any integer dtype, or dense rows (B, num_classes), multi-label too.
        num_classes: the width of the mixed targets; needed for class ids.
        label_smoothing: in [0, 1]; targets become (1 - s) * mixed + s / num_classes.
        token_grid: (h, w) of the patch tokens when ``features`` is (B, N, K).
        prefix_tokens: leading tokens to skip, such as CLS and registers.
        generator: where the seed is drawn from; default: torch's own CPU generator.
        seed: the 64-bit seed that decides the whole call instead, an int or a one-element int64
            tensor on the CPU or on the device of ``images``. The same seed gives the same draws on
            every backend and device.
        out: (n * B, C, H, W) of the dtype and device of ``images``, to be overwritten; not with
            gradients.
        backend: one of :func:`sg_kernels.available_backends`; default: SG_KERNELS_BACKEND, else the
            fastest that runs.

    Returns:
        A :class:`GraftResult`.

    Raises:
        TypeError, ValueError: a bad argument, by its name. Values that lie on a GPU are not checked
            unless SG_KERNELS_DEBUG=1; there a row whose index or class id is out of range gets lam
            = NaN and NaN targets.
        RuntimeError: ``backend`` cannot run here.
    """
    options = Options(
        temperature=temperature,
        normalize=normalize,
        threshold=threshold,
        grid_size=grid_size,
        alpha=alpha,
        keep_prob=keep_prob,
        selection=selection,
        k=k,
        label=label,
        norm=norm,
        augmentations=augmentations,
        no_fixed_points=no_fixed_points,
        num_classes=num_classes,
        label_smoothing=label_smoothing,
        token_grid=token_grid,
        prefix_tokens=prefix_tokens,
        backend=backend,
    )
    if seed is not None:
        if generator is not None:
            raise ValueError("generator and seed exclude each other; give one of them")
        seed = seed_tensor(seed)
    elif generator is None and torch.compiler.is_compiling():
        seed = torch.ops.sg_kernels.draw_seed()
    elif generator is None or isinstance(generator, torch.Generator):
        seed = ops.draw_seed(generator)
    else:
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    return run(options, images, features, saliency, index, targets, seed, out=out)


def channel_saliency(
    features: Tensor,
    *,
    token_grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The saliency map S[b, y, x] = sum over k of |features[b, k, y, x]|, detached.

    Args:
        features: (B, K, h, w), or tokens (B, N, K) with ``token_grid``; float16, bfloat16, float32 or
            float64; any strides.
        token_grid: (h, w) of the patch tokens.
        prefix_tokens: leading tokens to skip.
        backend: as in :func:`saliency_graft`.

    Returns:
        (B, h, w), float32, in which it is accumulated.
    """
    options = Options(token_grid=token_grid, prefix_tokens=prefix_tokens, backend=backend)
    features = _feature_map(features, options)
    return ops.overload("channel_saliency", _backend(options, features))(features)


def graft(
    images: Tensor,
    mask: Tensor,
    index: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Row r takes image r % B where its mask is True and image index[r] elsewhere, copied bit for bit.

    Any mask serves: CutMix boxes, Attentive CutMix, a mask drawn for images and now applied to their
    segmentation maps. Pixel (y, x) lies in cell (y * gh // H, x * gw // W). Gradients flow to ``images``.

    Args:
        images: (B, C, H, W) or (B, H, W), any dtype, any strides.
        mask: bool (n * B, gh, gw), no finer than the images.
        index: int64 (n * B,), in 0 .. B - 1; duplicates are allowed.
        out: (n * B, C, H, W), or (n * B, H, W), to be overwritten; not with gradients.
        backend: as in :func:`saliency_graft`.

    Returns:
        (n * B, C, H, W) or (n * B, H, W), dtype and memory format of ``images``.
    """
    _check_tensor("images", images, "(B, C, H, W) or (B, H, W)", 3, 4)
    if images.dim() == 3:
        planes = None if out is None else _check_tensor("out", out, "(n * B, H, W)", 3).unsqueeze(1)
        return graft(images.unsqueeze(1), mask, index, out=planes, backend=backend).squeeze(1)
    _check_tensor("mask", mask, "(n * B, gh, gw)", 3, dtypes=(torch.bool,), device=images.device)
    batch, rows = images.shape[0], mask.shape[0]
    if (rows % batch if batch else rows) or (batch and not rows):
        raise ValueError(f"mask must have a multiple of B = {batch} rows; got {rows}")
    _check_grid_size("mask", (mask.shape[1], mask.shape[2]), images)
    _check_index(index, rows, batch, images.device)
    name = backends.choose(backend, images.device.type)
    if out is not None:
        _check_out(out, images, rows)
        ops.overload("graft_out", name)(out, images, mask, index)
        return out
    if torch.is_grad_enabled() and images.requires_grad:
        return ops.Graft.apply(images, mask, index, name)
    return ops.overload("graft", name)(images, mask, index)


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
    """
    options = Options(num_classes=num_classes, label_smoothing=label_smoothing, backend=backend)
    _check_tensor("targets", targets, "(B,) or (B, num_classes)", 1, 2)
    _check_tensor("lam", lam, "(n * B,)", 1, dtypes=(torch.float32,), device=targets.device)
    batch, rows = targets.shape[0], lam.shape[0]
    if (rows % batch if batch else rows) or (batch and not rows):
        raise ValueError(f"lam must have a multiple of B = {batch} rows; got {rows}")
    _check_index(index, rows, batch, targets.device)
    targets, width = _dense_or_ids(targets, options, batch, targets.device)
    mix = ops.overload("mix_targets", _backend(options, targets))
    return mix(targets, lam.detach(), index, width, float(label_smoothing))


def mix_criterion(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    result: GraftResult,
) -> Tensor:
    """The mean of lam * criterion(logits, y_i) + (1 - lam) * criterion(logits, y_j), a scalar.

    For criteria that take no dense targets. ``lam`` differs from row to row, so the criterion must
    give one loss a row.

    Args:
        criterion: called with ``logits`` and a row of targets each; ``reduction="none"``.
        logits: (n * B, ...), of ``result.images``.
        targets: (B, ...), of the images that were grafted, in whatever form ``criterion`` takes.
        result: of the :func:`saliency_graft` call.
    """
    if not isinstance(result, GraftResult):
        raise TypeError(f"result must be a GraftResult; got {type(result).__name__}")
    rows = result.lam.shape[0]
    _check_tensor("logits", logits, "(n * B, ...)")
    _check_tensor("targets", targets, "(B, ...)", device=result.lam.device)
    if logits.dim() == 0 or logits.shape[0] != rows:
        raise ValueError(f"logits must have {rows} rows, as result has; got {tuple(logits.shape)}")
    batch = result.saliency.shape[0]
    if targets.dim() == 0 or targets.shape[0] != batch:
        raise ValueError(f"targets must have B = {batch} rows; got {tuple(targets.shape)}")
    own = targets.repeat(rows // max(batch, 1), *[1] * (targets.dim() - 1))
    loss_own, loss_other = criterion(logits, own), criterion(logits, targets[result.index])
    if loss_own.dim() == 0 or loss_own.shape[0] != rows:
        raise ValueError(
            f"criterion must give one loss a row (reduction='none'), ({rows}, ...); "
            f"got {tuple(loss_own.shape)}"
        )
    lam = result.lam.reshape(-1, *[1] * (loss_own.dim() - 1))
    return (lam * loss_own + (1 - lam) * loss_other).mean()


def run(
    options: Options,
    images: Tensor,
    features: Tensor | None,
    saliency: Tensor | None,
    index: Tensor | None,
    targets: Tensor | None,
    seed: Tensor,
    step: Tensor | None = None,
    rank: int = 0,
    grid_seed: int | None = None,
    out: Tensor | None = None,
) -> GraftResult:
    """Checks the tensors and calls the operator: what the function and the module share.

    With ``step``, int64 (1,), which the call advances, the call's seed is
    ``rng.call_seed(seed, step, rank)``. ``grid_seed`` is that seed where only the caller knows it.
    """
    _check_tensor("images", images, "(B, C, H, W)", 4)
    batch, device = images.shape[0], images.device
    if seed.device != device and seed.device.type != "cpu":
        raise ValueError(f"seed, or generator, must be on the CPU or on {device}; got {seed.device}")
    if (features is None) == (saliency is None):
        raise ValueError("give one of features and saliency; got " + ("both", "none")[features is None])
    if features is not None:
        features = _feature_map(features, options, device)
        evidence, name = features, "features"
    else:
        _check_tensor("saliency", saliency, "(B, h, w)", 3, dtypes=FEATURE_DTYPES, device=device)
        if options.token_grid is not None or options.prefix_tokens:
            raise ValueError("token_grid and prefix_tokens go with features, not with saliency")
        if _checked(saliency) and bool((saliency < 0).any()):
            raise ValueError("saliency must be >= 0; got negative values")
        evidence, name = saliency.detach(), "saliency"
        saliency = evidence
    if evidence.shape[0] != batch:
        raise ValueError(f"{name} must have the B = {batch} of images; got {tuple(evidence.shape)}")
    height, width = evidence.shape[-2:]
    if not (height and width):
        raise ValueError(f"{name} must have at least one cell; got {tuple(evidence.shape)}")
    if options.grid_size is None:
        grid_size = (height, width)
        _check_grid_size(f"the grid of {name}; set grid_size: it", grid_size, images)
    else:
        grid_size = _grid_size(options.grid_size, seed, grid_seed, images)
    cells = grid_size[0] * grid_size[1]
    if options.k is not None and options.k > cells:
        raise ValueError(f"k must be at most the {cells} cells of the grid; got {options.k}")
    rows = options.augmentations * batch
    if index is not None:
        if options.no_fixed_points:
            raise ValueError("no_fixed_points draws the pairing; it excludes index")
        _check_index(index, rows, batch, device)
    elif options.no_fixed_points and batch == 1:
        raise ValueError("no_fixed_points needs B != 1: a single image has no other to meet")
    num_classes = 0
    if targets is not None:
        targets, num_classes = _dense_or_ids(targets, options, batch, device)
    backend = _backend(options, images)
    args = (
        features,
        saliency,
        index,
        targets,
        seed,
        step,
        rank,
        _quantiles(options.alpha, options.keep_prob, device),
        grid_size,
        options.temperature,
        options.normalize,
        1 / cells if options.threshold == "mean" else options.threshold,
        options.k,
        "area" if options.label == "area" else options.norm,
        options.prob,
        options.augmentations,
        options.no_fixed_points,
        num_classes,
        options.label_smoothing,
    )
    if out is not None:
        _check_out(out, images, rows)
        outputs = (out, *ops.overload("saliency_graft_out", backend)(out, images, *args))
    elif torch.is_grad_enabled() and images.requires_grad:
        outputs = ops.SaliencyGraft.apply(images, backend, *args)
    else:
        outputs = ops.overload("saliency_graft", backend)(images, *args)
    result = GraftResult(*outputs)
    return result if targets is not None else result._replace(targets=None)


_tables: dict[tuple[float, float | None, torch.device], Tensor] = {}


def _quantiles(alpha: float, keep_prob: float | None, device: torch.device) -> Tensor:
    key = (alpha, keep_prob, device)
    table = _tables.get(key)
    if table is None:
        table = _build_quantiles(alpha, keep_prob, device)
        if not torch.compiler.is_compiling():
            if len(_tables) >= 64:  # a schedule of alpha or keep_prob must not grow it for ever
                _tables.clear()
            _tables[key] = table
    return table


@torch.compiler.assume_constant_result
def _build_quantiles(alpha: float, keep_prob: float | None, device: torch.device) -> Tensor:
    if keep_prob is None:
        return rng.beta_quantiles(float(alpha)).to(device)
    return rng.fixed_quantiles(float(keep_prob)).to(device)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_size(value: Any) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(_is_int(extent) and extent >= 1 for extent in value)
    )


def _checked(values: Tensor) -> bool:
    """Whether an argument's values are looked at, not only its shape."""
    return not torch.compiler.is_compiling() and (DEBUG or values.device.type == "cpu")


def _backend(options: Options, tensor: Tensor) -> str:
    return backends.choose(options.backend, tensor.device.type)


def _check_tensor(
    name: str,
    value: Any,
    shape: str,
    *dims: int,
    dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}; got layout {value.layout}")
    if dims and value.dim() not in dims:
        raise ValueError(f"{name} must be {shape}; got {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}; got {value.dtype}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, as the rest is; got {value.device}")
    return value


def _feature_map(features: Tensor, options: Options, device: torch.device | None = None) -> Tensor:
    """Features as a (B, K, h, w) view, without gradient."""
    if options.token_grid is None:
        _check_tensor("features", features, "(B, K, h, w)", 4, dtypes=FEATURE_DTYPES, device=device)
        if options.prefix_tokens:
            raise ValueError("prefix_tokens goes with token_grid")
        return features.detach()
    _check_tensor(
        "features", features, "(B, N, K) with token_grid", 3, dtypes=FEATURE_DTYPES, device=device
    )
    h, w = options.token_grid
    if features.shape[1] != options.prefix_tokens + h * w:
        raise ValueError(
            f"token_grid {(h, w)} with prefix_tokens {options.prefix_tokens} makes "
            f"{options.prefix_tokens + h * w} tokens; features have {features.shape[1]}"
        )
    tokens = features.detach()[:, options.prefix_tokens :]
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def _check_grid_size(name: str, grid_size: tuple[int, int], images: Tensor) -> None:
    height, width = images.shape[2:]
    if not (1 <= grid_size[0] <= height and 1 <= grid_size[1] <= width):
        raise ValueError(
            f"{name} must have 1 .. H x 1 .. W = {height} x {width} cells; got {tuple(grid_size)}"
        )


def _grid_size(
    grid_size: Any, seed: Tensor, grid_seed: int | None, images: Tensor
) -> tuple[int, int]:
    """The size that was given, or one drawn of several; the size is a shape, so on the host."""
    if is_size(grid_size):
        _check_grid_size("grid_size", grid_size, images)
        return (grid_size[0], grid_size[1])
    for size in grid_size:
        _check_grid_size("grid_size", size, images)
    if grid_seed is None:
        if torch.compiler.is_compiling() or seed.device.type != "cpu":
            raise ValueError(
                "grid_size: a size is drawn on the host, so a sequence of sizes goes with a seed "
                "known there, not with torch.compile or a seed on the device; give one (gh, gw)"
            )
        grid_seed = int(seed)
    return rng.draw_grid_size(grid_seed, tuple((size[0], size[1]) for size in grid_size))


def _check_index(index: Any, rows: int, batch: int, device: torch.device) -> None:
    _check_tensor("index", index, "(n * B,)", 1, dtypes=(torch.int64,), device=device)
    if index.shape[0] != rows:
        raise ValueError(f"index must have {rows} entries, one a row; got {index.shape[0]}")
    if rows and _checked(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= batch:
            raise ValueError(f"index must lie in 0 .. {batch - 1}; got {low} .. {high}")


def _dense_or_ids(
    targets: Any, options: Options, batch: int, device: torch.device
) -> tuple[Tensor, int]:
    """Checked targets, class ids as int64, and the number of classes."""
    _check_tensor("targets", targets, "(B,) or (B, num_classes)", 1, 2, device=device)
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
    if batch and _checked(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"targets must lie in 0 .. {num_classes - 1}; got {low} .. {high}")
    return targets, num_classes


def _check_out(out: Any, images: Tensor, rows: int) -> None:
    _check_tensor("out", out, "(n * B, C, H, W)", 4, dtypes=(images.dtype,), device=images.device)
    if out.shape != (rows, *images.shape[1:]):
        raise ValueError(
            f"out must be {(rows, *images.shape[1:])}; got {tuple(out.shape)}"
        )
    if torch.is_grad_enabled() and (images.requires_grad or out.requires_grad):
        raise ValueError("out does not go with gradients; detach images, or drop out")
    if not torch.compiler.is_compiling():
        if out.untyped_storage().data_ptr() == images.untyped_storage().data_ptr() and out.numel():
            raise ValueError("out must not share memory with images")


def seed_tensor(seed: Any) -> Tensor:
    """A seed that was given, checked, as int64 (1,)."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed must be an int or one int64; got {seed.dtype}, {tuple(seed.shape)}"
            )
        return seed.reshape(1)
    if not (_is_int(seed) and -(1 << 63) <= seed < 1 << 64):
        raise ValueError(f"seed must be an int of 64 bits; got {seed!r}")
    return torch.tensor([seed if seed < 1 << 63 else seed - (1 << 64)])
