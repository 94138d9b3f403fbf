"""The public functions: each checks its arguments, draws the seed, and calls one operator."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_type_hints, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from sg_kernels import backends, checks, ops, rng, shapes
from sg_kernels.backends import reference
from sg_kernels.call import DTYPES, NORMALIZE, Call
from sg_kernels.options import (
    TYPES,
    Norm,
    Options,
    OptionTypes,
    TokenGrid,
    check_bool,
    lists_options,
    options_of,
)

PASSED = [
    name
    for name, kind in get_type_hints(Call).items()
    if TYPES.get(name) == kind and name != "no_fixed_points"
]
"""The options that the operator takes as they are; the others are resolved first."""


class GraftResult(NamedTuple):
    """What saliency_graft returns. rows = augmentations * B; row a * B + b is image b's."""

    images: Tensor
    """The grafted images (rows, C, ..., H, W), in the memory format of the input, and in its dtype
    unless ``standardize`` is given."""
    lam: Tensor
    """The weight of the row's own label, float32 (rows,), in [0, 1]."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    """The image that each row was grafted onto, int64 (rows,), in 0 .. B - 1."""
    mask: Tensor
    """True in the cells whose pixels are the row's own, bool (rows, gh, gw)."""
    saliency: Tensor | None
    """The saliency map, float32 (B, h, w); None for a mask with label="area" and no map."""
    targets: Tensor | None
    """lam * y_i + (1 - lam) * y_j, float32 (rows, num_classes); None without targets."""


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
        _mark_written(out)
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


class Tensors(NamedTuple):
    """The tensors that a user gives to a call."""

    images: Tensor
    features: Tensor | None = None
    saliency: Tensor | None = None
    mask: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    targets: Tensor | None = None
    out: Tensor | None = None


class Randomness(NamedTuple):
    """Where the draws of a call come from."""

    source: Tensor | torch.Generator | None = None
    """The seed, int64 (1,), or the generator that draws it; None: torch's own on the CPU."""
    step: Tensor | None = None
    """int64 (1,), advanced by the call, whose seed is rng.call_seed(source, step, rank)."""
    rank: int = 0
    on_host: Callable[[], int] | None = None
    """Gives the call's seed as an int, for what is drawn on the host; None: ``source`` does."""
    prob: float = 1.0
    """The probability that a draw grafts at all."""
    quantiles: Tensor | None = None
    """rng.beta_quantiles on the device of the images; None: from the cache of ops."""

    def seed(self) -> Tensor:
        return self.source if isinstance(self.source, Tensor) else ops.draw_seed(self.source)


class Plan(NamedTuple):
    """What a call does, once its arguments are checked."""

    arguments: dict[str, Any]
    """Those of the operator that need no draw: tensors detached except the images, features as
    (B, K, h, w), targets as int64 ids or float32 rows."""
    sizes: tuple[tuple[int, int], ...]
    """The grid sizes to draw from; one size is not drawn."""
    backend: str
    differentiable: bool


def run(
    options: Options, tensors: Tensors, randomness: Randomness, affine: Tensor | None = None
) -> GraftResult:
    """Checks, draws and calls the operator, for the function and the module.

    Nothing is drawn before the checks have passed, so a call that is refused spends no randomness.
    ``affine``: that of ``options``, (2, C) or (2, 1); None: from the cache of ops.
    """
    plan = check(options, tensors, randomness, affine)
    outputs = execute(plan, draw(options, plan, randomness))
    images, lam, index, mask, saliency, targets = outputs
    written, out = plan.arguments["out"], tensors.out
    if written is None and tensors.images.dim() > 4:
        images = images.view(images.shape[0], *tensors.images.shape[1:])
    if out is not None:
        images = out.copy_(images) if written is None else out
    has_map = not (tensors.features is None and tensors.saliency is None)
    return GraftResult(
        images,
        lam,
        index,
        mask,
        saliency if has_map else None,
        None if tensors.targets is None else targets,
    )


def check(
    options: Options, tensors: Tensors, randomness: Randomness, affine: Tensor | None = None
) -> Plan:
    images, _, _, mask, index, targets, out = tensors
    checks.check_images(images)
    checks.check_standardize(images, options)
    batch, device = images.shape[0], images.device
    rows = batch
    if options.augmentations > 1:
        rows = options.augmentations * batch
        checks.check_row_count(rows, options.augmentations)
    name, source = _check_evidence(options, tensors, batch)
    if mask is None:
        sizes = _check_sizes(options, images, name, source)
    else:
        sizes = (checks.check_mask_of_rows(mask, options, images, rows),)
    if index is not None:
        if options.no_fixed_points:
            raise ValueError("no_fixed_points draws the pairing; it excludes index")
        checks.check_index(index, rows, batch, device)
    num_classes = 0
    if targets is not None:
        targets, num_classes = checks.ids_or_rows(targets, options, batch, device)
    if randomness.source is not None or len(sizes) > 1 or device.type == "cuda":
        _check_randomness(randomness, device, len(sizes))
    if out is not None:
        drawn_from = {"seed": randomness.source, "step": randomness.step}
        others = {name: source, "mask": mask, "index": index, "targets": targets, **drawn_from}
        checks.check_out(out, images, rows, others, options.out_dtype(images))
    folded, written, depth = shapes.fold(images, out)
    arguments = {
        "images": folded,
        "out": written,
        "depth": depth,
        name: source,
        "mask": mask,
        "index": index,
        "targets": targets,
        "num_classes": num_classes,
        "step": randomness.step,
        # In a batch of one the image can only meet itself.
        "no_fixed_points": options.no_fixed_points and batch != 1,
    }
    if options.standardize is not None:
        arguments["affine"] = affine_of(options, folded, affine)
        arguments["dtype"] = DTYPES.index(options.out_dtype(images))
    differentiable = checks.needs_gradient(images)
    backend = backends.choose(options.backend, device.type)
    return Plan(arguments, sizes, backend, differentiable)


def affine_of(options: Options, images: Tensor, given: Tensor | None = None) -> Tensor:
    """Scale and shift of each channel of ``images``: those given, if they fit."""
    channels = images.shape[1]
    if given is not None and given.shape[1] == channels and given.device == images.device:
        return given
    tables = ops if checks.has_values(images) else torch.ops.sg_kernels
    affine: Tensor = tables.affine(*options.mean_and_std(), channels, images.device)
    return affine


def _check_evidence(options: Options, tensors: Tensors, batch: int) -> tuple[str, Tensor]:
    """Which of features and saliency is given, and that one, checked."""
    images, features, saliency, mask, *_ = tensors
    if features is None and saliency is None and mask is not None:
        if options.label != "area":
            raise ValueError(
                "give one of features and saliency, from which lam follows, or label='area'; "
                "got neither"
            )
        return "saliency", torch.empty(batch, 0, 0, dtype=torch.float32, device=images.device)
    if (features is None) == (saliency is None):
        given = "both" if saliency is not None else "neither"
        raise ValueError(f"give one of features and saliency; got {given}")
    if features is not None:
        name, evidence = "features", checks.feature_map(features, options, images)
    else:
        name, evidence = "saliency", checks.ready_map(saliency, options, images.device)
    rows, *_, h, w = shape = evidence.shape
    if rows != batch:
        raise ValueError(f"{name} must have the B = {batch} of images; got {tuple(shape)}")
    if not (h and w):
        raise ValueError(f"{name} must have at least one cell; got {tuple(shape)}")
    return name, evidence


def _check_sizes(
    options: Options, images: Tensor, name: str, source: Tensor
) -> tuple[tuple[int, int], ...]:
    """The grid sizes to draw from, checked."""
    height, width = images.shape[-2:]
    h, w = source.shape[-2:]
    sizes = options.sizes((h, w))
    for size in sizes:
        checks.check_grid_size("grid_size", size, height, width)
        if options.k is not None and options.k > size[0] * size[1]:
            raise ValueError(f"k must be at most the cells of the grid, {size}; got {options.k}")
    if (1, 1) in sizes and not torch.compiler.is_compiling():
        _warn_of_one_cell(name, source)
    return sizes


def _warn_of_one_cell(name: str, source: Tensor) -> None:
    checks.warn_once(
        f"{name} {tuple(source.shape)} give a grid of one cell, which is constant: nothing can be "
        "grafted, and every row is another whole image. Tap an earlier layer, whose map is larger "
        "at this image size, or check grid_size"
    )


def _check_randomness(randomness: Randomness, device: torch.device, sizes: int) -> None:
    source = None if randomness.source is None else randomness.source.device
    on_host = source is None or source.type == "cpu"
    if not on_host and source != device:
        raise ValueError(f"seed, generator: must be on the CPU or on {device}; got {source}")
    host_seed = on_host or randomness.on_host is not None
    if sizes > 1 and (torch.compiler.is_compiling() or not host_seed):
        raise ValueError(
            "grid_size: one of several sizes is drawn on the host, so not under torch.compile nor "
            "from a seed on the device; give one (gh, gw)"
        )
    eager_on_gpu = device.type == "cuda" and not torch.compiler.is_compiling()
    if on_host and eager_on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "seed: a CUDA graph would replay one draw of a seed on the host. Give seed as an int64 "
            "tensor on the device, or use SaliencyGraft, whose step each replay advances"
        )


def draw(options: Options, plan: Plan, randomness: Randomness) -> Call:
    """The operator's arguments, after the draws that are made on the host."""
    seed, grid_size = randomness.seed(), plan.sizes[0]
    images = plan.arguments["images"]
    if torch.compiler.is_compiling() and images.is_cuda and not seed.is_cuda:
        # The compiler may make a CUDA graph, which would replay one draw of a seed on the host.
        seed = seed.to(images.device, non_blocking=True)
    if len(plan.sizes) > 1:
        host_seed = randomness.on_host() if randomness.on_host else int(seed)
        grid_size = rng.draw_grid_size(host_seed, plan.sizes)
    keep_prob, quantiles = options.keep_prob, None
    if options.k is not None or plan.arguments["mask"] is not None:
        keep_prob = 1.0
    elif keep_prob is None:
        keep_prob, quantiles = 0.0, randomness.quantiles
        if quantiles is None:
            tables = ops if checks.has_values(images) else torch.ops.sg_kernels
            quantiles = tables.quantiles(options.alpha, images.device)
    gh, gw = grid_size
    return Call(
        **plan.arguments,
        **{name: getattr(options, name) for name in PASSED},
        seed=seed,
        rank=randomness.rank,
        quantiles=quantiles,
        keep_prob=keep_prob,
        grid_size=grid_size,
        normalize=NORMALIZE.index(options.normalize),
        threshold=1 / (gh * gw) if options.threshold == "mean" else options.threshold,
        norm=options.norm_position(),
        prob=randomness.prob,
    )


def execute(plan: Plan, call: Call) -> tuple[Tensor, ...]:
    """The operator's outputs, in the order of :class:`sg_kernels.call.Outputs`."""
    if plan.differentiable:
        return ops.SaliencyGraft.apply(plan.backend, *call)
    outputs = ops.overload("saliency_graft", plan.backend)(*call)
    if call.out is not None:
        _mark_written(call.out)
    return outputs


def _mark_written(out: Tensor) -> None:
    """Bumps out's version (custom operators do not), so that autograd detects the overwrite."""
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)
