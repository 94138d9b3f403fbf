"""The public functions: each checks its arguments, draws the seed, and calls one operator."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sg_kernels import arguments, backends, ops, rng
from sg_kernels.arguments import GridSize, Label, Norm, Normalize, Options, Selection


class GraftResult(NamedTuple):
    """What saliency_graft returns. rows = augmentations * B; row a * B + b is image b's."""

    images: Tensor
    """The grafted images (rows, C, H, W), in the dtype and memory format of the input."""
    lam: Tensor
    """The weight of the row's own label, float32 (rows,), in [0, 1]."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    """The image that each row was grafted onto, int64 (rows,), in 0 .. B - 1."""
    mask: Tensor
    """True in the cells whose pixels are the row's own, bool (rows, gh, gw)."""
    saliency: Tensor
    """The saliency map, float32 (B, h, w)."""
    targets: Tensor | None
    """lam * y_i + (1 - lam) * y_j, float32 (rows, num_classes); None without targets."""


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

    Salient patches of image i, each kept with probability p, are grafted onto image j = index[i].
    The labels are mixed by the saliency that survived of each: ``lam`` weighs the row's OWN label,
    so the target is ``lam * y_i + (1 - lam) * y_j``. Gradients flow to ``images``; no input is
    modified.

    Args:
        images: (B, C, H, W), any dtype of plain numbers: bool, integers, floats of 8 bits and more,
            complex; any strides.
        features: the feature map whose channel-wise L1 norm is the saliency, (B, K, h, w), float16,
            bfloat16, float32 or float64; or transformer tokens (B, N, K), see ``token_grid``.
        saliency: a ready map instead of ``features``, (B, h, w), floating, >= 0.
        temperature: T > 0 of the softmax over the cells (the paper's patch selection).
        normalize: what the map is divided by before the softmax: its ``"max"``, its ``"mean"``, or
            ``"none"``, as in the paper, where the T that fits depends on the channel count.
        threshold: sigma of the patch selection: a cell is salient where its softmax exceeds it.
            ``"mean"`` is 1 / cells; else a number in [0, 1). A map on the grid whose values are all
            within 2**-16 of its largest, relatively, counts as constant, which has no salient cell.
        grid_size: (gh, gw), to which the map is resampled, area average down and nearest up; at
            most (H, W). None keeps (h, w). Of a sequence of sizes one is drawn per call, as the
            paper draws the scale per mini-batch.
        alpha: p is drawn from Beta(alpha, alpha), once per augmentation; > 0.
        keep_prob: a fixed p in [0, 1] instead.
        selection: ``"bernoulli"``, or ``"topk"``: the ``k`` most salient cells and no sampling, the
            paper's deterministic ablation.
        k: the cells that ``"topk"`` keeps, 1 .. gh * gw.
        label: ``"saliency"``, the paper's calibrated label mixing, or ``"area"``: lam is the share
            of cells kept.
        norm: how surviving saliency is measured: ``"l1"``, ``"l2"`` or ``"l2sq"`` (squared l2). The
            paper's formula reads as l2, its footnote as l1 or squared l2.
        augmentations: n independent draws on one grid from one saliency pass: n * B rows.
        index: the pairing, instead of a drawn permutation: int64 (n * B,), in 0 .. B - 1;
            duplicates are allowed.
        no_fixed_points: draw a pairing in which no image meets itself; needs B != 1.
        targets: class ids (B,), any integer dtype, or dense rows (B, num_classes), multi-label too.
        num_classes: the width of the mixed targets; needed for class ids.
        label_smoothing: in [0, 1]; targets become (1 - s) * mixed + s / num_classes.
        token_grid: (h, w) of the patch tokens when ``features`` is (B, N, K).
        prefix_tokens: leading tokens to skip, such as CLS and registers.
        generator: where the seed is drawn from; default: torch's own CPU generator.
        seed: instead, the 64-bit seed that decides the whole call: an int, or a one-element int64
            tensor on the CPU or on the device of ``images``. The same seed gives the same draws on
            every backend and device.
        out: (n * B, C, H, W) of the dtype and device of ``images``, to be overwritten; not with
            gradients.
        backend: one of :func:`sg_kernels.available_backends`; default: SG_KERNELS_BACKEND, else
            ``triton`` or ``cuda`` on a GPU, ``cpp`` or ``reference`` on the CPU.

    Returns:
        A :class:`GraftResult`.

    Raises:
        TypeError, ValueError: a bad argument, by its name. Values that lie on a GPU are not checked
            unless SG_KERNELS_DEBUG=1, nor are any under torch.compile: there a row whose index or
            class id is out of range gets lam = NaN and NaN targets.
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
    if seed is not None and generator is not None:
        raise ValueError("generator and seed exclude each other; give one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    source = generator if seed is None else arguments.seed_tensor(seed)
    return run(options, images, features, saliency, index, targets, source, out=out)


def channel_saliency(
    features: Tensor,
    *,
    token_grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The saliency map S[b, y, x] = sum over k of |features[b, k, y, x]|, without gradient.

    Args:
        features: (B, K, h, w), or tokens (B, N, K) with ``token_grid``; float16, bfloat16, float32
            or float64; any strides.
        token_grid: (h, w) of the patch tokens.
        prefix_tokens: leading tokens to skip.
        backend: as in :func:`saliency_graft`.

    Returns:
        (B, h, w), float32, in which it is accumulated.
    """
    options = Options(token_grid=token_grid, prefix_tokens=prefix_tokens)
    features = arguments.feature_map(features, options)
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

    Any mask serves: CutMix boxes, Attentive CutMix, a mask drawn for images and now applied to
    their segmentation maps. Pixel (y, x) lies in cell (y * gh // H, x * gw // W). Gradients flow to
    ``images``.

    Args:
        images: (B, C, H, W) or (B, H, W), dtypes as in :func:`saliency_graft`; any strides.
        mask: bool (n * B, gh, gw), no finer than the images.
        index: int64 (n * B,), in 0 .. B - 1; duplicates are allowed.
        out: (n * B, C, H, W), or (n * B, H, W), to be overwritten; not with gradients.
        backend: as in :func:`saliency_graft`.

    Returns:
        (n * B, C, H, W) or (n * B, H, W), dtype and memory format of ``images``.
    """
    arguments.check_images(images, "(B, C, H, W) or (B, H, W)", 3, 4)
    if images.dim() == 3:
        if out is not None:
            arguments.check_tensor("out", out, "(n * B, H, W), as images is", 3)
            graft(images[:, None], mask, index, out=out[:, None], backend=backend)
            return out
        return graft(images[:, None], mask, index, backend=backend)[:, 0]
    batch, device = images.shape[0], images.device
    arguments.check_tensor("mask", mask, "(n * B, gh, gw)", 3, dtypes=(torch.bool,), device=device)
    rows, gh, gw = mask.shape
    arguments.check_rows("mask", rows, batch)
    arguments.check_grid_size("mask", (gh, gw), images)
    arguments.check_index(index, rows, batch, device)
    name = backends.choose(backend, device.type)
    if out is not None:
        arguments.check_out(out, images, rows, mask=mask, index=index)
        ops.overload("graft_out", name)(out, images, mask, index)
        _mark_written(out)
        return out
    if arguments.needs_gradient(images):
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
    options = Options(num_classes=num_classes, label_smoothing=label_smoothing)
    arguments.check_tensor("targets", targets, "(B,) or (B, num_classes)", 1, 2)
    batch, device = targets.shape[0], targets.device
    arguments.check_tensor("lam", lam, "(n * B,)", 1, dtypes=(torch.float32,), device=device)
    rows = lam.shape[0]
    arguments.check_rows("lam", rows, batch)
    arguments.check_index(index, rows, batch, device)
    targets, width = arguments.ids_or_rows(targets, options, batch, device)
    mix = ops.overload("mix_targets", backends.choose(backend, device.type))
    return mix(targets, lam.detach(), index, width, label_smoothing)


def mix_criterion(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    result: GraftResult | None,
) -> Tensor:
    """The mean of lam * criterion(logits, y_i) + (1 - lam) * criterion(logits, y_j), a scalar.

    For criteria that take no dense targets. ``lam`` differs from row to row, so the criterion must
    give one loss a row.

    Args:
        criterion: called with ``logits`` and a row of targets each; ``reduction="none"``.
        logits: (n * B, ...), of ``result.images``.
        targets: (B, ...), of the images that were grafted, in whatever form ``criterion`` takes.
        result: of the :func:`saliency_graft` call; None, as a module's is where it mixed nothing,
            for the mean of criterion(logits, y_i).
    """
    if not (result is None or isinstance(result, GraftResult)):
        raise TypeError(f"result must be a GraftResult or None; got {type(result).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable; got {type(criterion).__name__}")
    arguments.check_tensor("logits", logits, "(n * B, ...)")
    arguments.check_tensor("targets", targets, "(B, ...)", device=logits.device)

    def loss(of: Tensor) -> Tensor:
        found = criterion(logits, of)
        if found.shape[:1] != logits.shape[:1]:
            raise ValueError(
                f"criterion must give one loss a row (reduction='none'), ({len(logits)}, ...); "
                f"got {tuple(found.shape)}"
            )
        return found

    if logits.dim() == 0 or (result is not None and logits.shape[:1] != result.lam.shape):
        expected = "one row an image" if result is None else f"{len(result.lam)} rows, as result"
        raise ValueError(f"logits must have {expected}; got {tuple(logits.shape)}")
    batch = logits.shape[0] if result is None else result.saliency.shape[0]
    if targets.shape[:1] != (batch,):
        raise ValueError(f"targets must have B = {batch} rows; got {tuple(targets.shape)}")
    if result is None:
        return loss(targets).mean()
    arguments.check_tensor("result", result.lam, "of the same call", device=logits.device)
    own = targets.repeat(len(logits) // max(batch, 1), *[1] * (targets.dim() - 1))
    # Where an index is out of range lam is NaN, so any row will do.
    other = targets[result.index.clamp(0, max(batch - 1, 0))]
    loss_own, loss_other = loss(own), loss(other)
    lam = result.lam.reshape(-1, *[1] * (loss_own.dim() - 1))
    return (lam * loss_own + (1 - lam) * loss_other).mean()


def _mark_written(out: Tensor) -> None:
    """Lets autograd refuse a graph that saved ``out``; operators of one's own do not."""
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)


def run(
    options: Options,
    images: Tensor,
    features: Tensor | None,
    saliency: Tensor | None,
    index: Tensor | None,
    targets: Tensor | None,
    seed: Tensor | torch.Generator | None,
    step: Tensor | None = None,
    rank: int = 0,
    draw_grid_seed: Callable[[], int] | None = None,
    out: Tensor | None = None,
) -> GraftResult:
    """Checks the tensors, then draws and calls the operator; shared with the module.

    ``seed``: int64 (1,), or what one is drawn from; that is after the checks, so what they refuse
    consumes no randomness. With ``step``, int64 (1,), which the call advances, the call's seed is
    ``rng.call_seed(seed, step, rank)``, and ``draw_grid_seed`` gives it as an int.
    """
    arguments.check_images(images, "(B, C, H, W)", 4)
    batch, device = images.shape[0], images.device
    if (features is None) == (saliency is None):
        given = "both" if saliency is not None else "neither"
        raise ValueError(f"give one of features and saliency; got {given}")
    if features is not None:
        evidence = features = arguments.feature_map(features, options, device)
        name = "features"
    else:
        evidence = saliency = arguments.ready_map(saliency, options, device)
        name = "saliency"
    if evidence.shape[0] != batch:
        raise ValueError(f"{name} must have the B = {batch} of images; got {tuple(evidence.shape)}")
    grid_size = evidence.shape[-2], evidence.shape[-1]
    if not (grid_size[0] and grid_size[1]):
        raise ValueError(f"{name} must have at least one cell; got {tuple(evidence.shape)}")
    sizes = arguments.sizes(options.grid_size, grid_size)
    for size in sizes:
        arguments.check_grid_size("grid_size", size, images)
        if options.k is not None and options.k > size[0] * size[1]:
            raise ValueError(f"k must be at most the cells of the grid, {size}; got {options.k}")
    rows = options.augmentations * batch
    if index is not None:
        if options.no_fixed_points:
            raise ValueError("no_fixed_points draws the pairing; it excludes index")
        arguments.check_index(index, rows, batch, device)
    elif options.no_fixed_points and batch == 1:
        raise ValueError("no_fixed_points needs B != 1: a single image has no other to meet")
    num_classes = 0
    if targets is not None:
        targets, num_classes = arguments.ids_or_rows(targets, options, batch, device)
    if out is not None:
        arguments.check_out(
            out, images, rows, features=features, saliency=saliency, index=index, targets=targets
        )
    needs_gradient = arguments.needs_gradient(images)
    backend = backends.choose(options.backend, device.type)
    seed_device = torch.device("cpu") if seed is None else seed.device
    on_host = seed_device.type == "cpu"
    if not on_host and seed_device != device:
        raise ValueError(f"seed, generator: must be on the CPU or on {device}; got {seed_device}")
    drawn = len(sizes) > 1
    if drawn and (torch.compiler.is_compiling() or not (draw_grid_seed or on_host)):
        raise ValueError(
            "grid_size: one of several sizes is drawn on the host, so not under torch.compile nor "
            "from a seed on the device; give one (gh, gw)"
        )

    if not isinstance(seed, Tensor):
        seed = ops.draw_seed(seed)
    grid_size = sizes[0]
    if drawn:
        grid_seed = draw_grid_seed() if draw_grid_seed else int(seed)
        grid_size = rng.draw_grid_size(grid_seed, sizes)
    keep_prob = 1.0 if options.k is not None else options.keep_prob
    tables = ops if arguments.has_values(images) else torch.ops.sg_kernels
    quantiles = tables.quantiles(options.alpha, device) if keep_prob is None else None
    args = (
        features,
        saliency,
        index,
        targets,
        seed,
        step,
        rank,
        quantiles,
        keep_prob or 0.0,
        grid_size,
        options.temperature,
        options.normalize,
        1 / (grid_size[0] * grid_size[1]) if options.threshold == "mean" else options.threshold,
        options.k,
        "area" if options.label == "area" else options.norm,
        options.prob,
        options.augmentations,
        options.no_fixed_points,
        num_classes,
        options.label_smoothing,
    )
    if out is not None:
        outputs = (out, *ops.overload("saliency_graft_out", backend)(out, images, *args))
        _mark_written(out)
    elif needs_gradient:
        outputs = ops.SaliencyGraft.apply(images, backend, *args)
    else:
        outputs = ops.overload("saliency_graft", backend)(images, *args)
    grafted, lam, index, mask, saliency, mixed = outputs
    return GraftResult(grafted, lam, index, mask, saliency, None if targets is None else mixed)
