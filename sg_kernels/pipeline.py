"""One call of saliency_graft, for the function and the module: check, draw, execute."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from sg_kernels import backends, checks, ops, rng, shapes
from sg_kernels.call import DTYPES, NORMALIZE, Call
from sg_kernels.options import TYPES, Options

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
    """Scale and shift of each channel of ``images``: those given, if they are on its device."""
    channels = images.shape[1]
    if given is not None and given.device == images.device:
        return given if given.shape[1] == channels else given.expand(2, channels).contiguous()
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
        mark_written(call.out)
    return outputs


def mark_written(out: Tensor) -> None:
    """Bumps out's version (custom operators do not), so that autograd detects the overwrite."""
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)
