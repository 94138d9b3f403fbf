"""The operators torch.ops.sg_kernels.*: schemas, shapes, gradients.

An operator has one overload per backend, ``torch.ops.sg_kernels.graft.cpp`` and so on. The schemas
stand here and nowhere else; csrc implements them for ``cpp`` and ``cuda``.

The operators trust their arguments: :mod:`sg_kernels.functional` checks them first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sg_kernels import backends, reference, rng
from sg_kernels.kernels.operators import OPERATORS as TRITON

_GRAFT = "Tensor images, Tensor mask, Tensor index"
_SALIENCY_GRAFT = (
    "Tensor images, Tensor? features, Tensor? saliency, Tensor? index, Tensor? targets, "
    "Tensor seed, Tensor(a!)? step, int rank, Tensor? quantiles, float keep_prob, "
    "int[2] grid_size, float temperature, str normalize, float threshold, int? k, str norm, "
    "float prob, int augmentations, bool no_fixed_points, int num_classes, float label_smoothing"
)
_SALIENCY_GRAFT_NAMES = [argument.split()[-1] for argument in _SALIENCY_GRAFT.split(", ")]
SCHEMAS = {
    "channel_saliency": "(Tensor features) -> Tensor",
    "graft": f"({_GRAFT}) -> Tensor",
    "graft_out": f"(Tensor(a!) out, {_GRAFT}) -> ()",
    "graft_backward": "(Tensor grad, Tensor mask, Tensor index, int augmentations) -> Tensor",
    "mix_targets": (
        "(Tensor targets, Tensor lam, Tensor index, int num_classes, float label_smoothing)"
        " -> Tensor"
    ),
    "saliency_graft": (
        f"({_SALIENCY_GRAFT}) -> "
        "(Tensor images, Tensor lam, Tensor index, Tensor mask, Tensor saliency, Tensor targets)"
    ),
    "saliency_graft_out": (
        f"(Tensor(b!) out, {_SALIENCY_GRAFT}) -> "
        "(Tensor lam, Tensor index, Tensor mask, Tensor saliency, Tensor targets)"
    ),
}


def _reference_graft_out(out: Tensor, images: Tensor, mask: Tensor, index: Tensor) -> None:
    reference.graft(images, mask, index, out)


def _reference_saliency_graft(*args: Any) -> tuple[Tensor, ...]:
    images, lam, index, *rest = reference.saliency_graft(*args)
    given = args[_SALIENCY_GRAFT_NAMES.index("index")]
    # An operator's output is never its input.
    return images, lam, index if given is None else index.clone(), *rest


_REFERENCE: dict[str, Callable[..., Any]] = {
    "channel_saliency": reference.channel_saliency,
    "graft": reference.graft,
    "graft_out": _reference_graft_out,
    "graft_backward": reference.graft_backward,
    "mix_targets": reference.mix_targets,
    "saliency_graft": _reference_saliency_graft,
    "saliency_graft_out": lambda out, *args: _reference_saliency_graft(*args, out)[1:],
}


def _fake_channel_saliency(features: Tensor) -> Tensor:
    batch, _, h, w = features.shape
    return features.new_empty((batch, h, w), dtype=torch.float32)


def _fake_graft(images: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    return reference.empty_rows(images, mask.shape[0])


def _fake_graft_out(out: Tensor, images: Tensor, mask: Tensor, index: Tensor) -> None:
    pass


def _fake_graft_backward(grad: Tensor, mask: Tensor, index: Tensor, augmentations: int) -> Tensor:
    return reference.empty_rows(grad, grad.shape[0] // augmentations)


def _fake_mix_targets(
    targets: Tensor, lam: Tensor, index: Tensor, num_classes: int, label_smoothing: float
) -> Tensor:
    return lam.new_empty((lam.shape[0], num_classes))


def _fake_saliency_graft_out(out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_SALIENCY_GRAFT_NAMES, args))
    images, rows = given["images"], out.shape[0]
    source = given["saliency"] if given["features"] is None else given["features"]
    columns = 0 if given["targets"] is None else given["num_classes"]
    return (
        images.new_empty(rows, dtype=torch.float32),
        images.new_empty(rows, dtype=torch.int64),
        images.new_empty((rows, *given["grid_size"]), dtype=torch.bool),
        images.new_empty((images.shape[0], *source.shape[-2:]), dtype=torch.float32),
        images.new_empty((rows, columns), dtype=torch.float32),
    )


def _fake_saliency_graft(images: Tensor, *args: Any) -> tuple[Tensor, ...]:
    augmentations = args[_SALIENCY_GRAFT_NAMES.index("augmentations") - 1]
    out = reference.empty_rows(images, augmentations * images.shape[0])
    return out, *_fake_saliency_graft_out(out, images, *args)


_FAKE: dict[str, Callable[..., Any]] = {
    "channel_saliency": _fake_channel_saliency,
    "graft": _fake_graft,
    "graft_out": _fake_graft_out,
    "graft_backward": _fake_graft_backward,
    "mix_targets": _fake_mix_targets,
    "saliency_graft": _fake_saliency_graft,
    "saliency_graft_out": _fake_saliency_graft_out,
}

_library = torch.library.Library("sg_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    for _backend in backends.DEVICES:
        _library.define(f"{_name}.{_backend}{_schema}")
        torch.library.register_fake(f"sg_kernels::{_name}.{_backend}", _FAKE[_name], lib=_library)
    _library.impl(f"{_name}.reference", _REFERENCE[_name], "CompositeExplicitAutograd")
    for _device in backends.DEVICES["triton"]:
        _library.impl(f"{_name}.triton", TRITON[_name], _device.upper())

_library.define("draw_seed(Tensor blank) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
torch.library.register_fake("sg_kernels::draw_seed", torch.empty_like, lib=_library)
_library.impl("draw_seed", lambda blank: blank.clone().random_(), "CompositeExplicitAutograd")


def draw_seed(generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, int64 (1,), on the generator's device."""
    device = "cpu" if generator is None else generator.device
    blank = torch.empty(1, dtype=torch.int64, device=device)
    if generator is None and torch.compiler.is_compiling():
        # An operator, so that a compiled graph draws what eager code draws from torch's generator.
        # Two calls would be merged into one, were it not for what each is given.
        return torch.ops.sg_kernels.draw_seed(blank)
    return blank.random_(generator=generator)


_library.define("quantiles(float alpha, Device device) -> Tensor")


@torch.library.register_fake("sg_kernels::quantiles", lib=_library)
def _fake_quantiles(alpha: float, device: torch.device) -> Tensor:
    return torch.empty(rng.QUANTILE_BINS + 1, dtype=torch.int64, device=device)


_tables: dict[tuple[float, torch.device], Tensor] = {}
"""Never emptied: a captured graph may point at any of them."""


def quantiles(alpha: float, device: torch.device) -> Tensor:
    """:func:`rng.beta_quantiles` on ``device``, kept from call to call.

    Where tensors have no values the operator of this name gives one that has none either.
    """
    key = (alpha, device)
    table = _tables.get(key)
    if table is None:
        table = torch.func.debug_unwrap(rng.beta_quantiles(alpha).to(device))
        if type(table) is Tensor:  # not one without values, of a mode that traces
            _tables[key] = table
    return table


# Compilers take an operator's output for their own, and may write to it.
_library.impl("quantiles", lambda *args: quantiles(*args).clone(), "CompositeExplicitAutograd")


def overload(name: str, backend: str) -> Any:
    """The operator ``name`` of ``backend``."""
    return getattr(getattr(torch.ops.sg_kernels, name), backend)


def _augmentations(rows: int, batch: int) -> int:
    return rows // batch if batch else 1


class Graft(torch.autograd.Function):
    """The graft operator with its gradient, and that gradient's."""

    @staticmethod
    def forward(images: Tensor, mask: Tensor, index: Tensor, backend: str) -> Tensor:
        return overload("graft", backend)(images, mask, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, mask, index, ctx.backend = inputs
        ctx.save_for_backward(mask, index)
        ctx.augmentations = _augmentations(mask.shape[0], images.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask, index = ctx.saved_tensors
        return (
            GraftBackward.apply(grad, mask, index, ctx.augmentations, ctx.backend),
            None,
            None,
            None,
        )


class GraftBackward(torch.autograd.Function):
    """The graft_backward operator; its gradient is the graft, since both are linear."""

    @staticmethod
    def forward(
        grad: Tensor, mask: Tensor, index: Tensor, augmentations: int, backend: str
    ) -> Tensor:
        return overload("graft_backward", backend)(grad, mask, index, augmentations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, index, _, ctx.backend = inputs
        ctx.save_for_backward(mask, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Graft.apply(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


class SaliencyGraft(torch.autograd.Function):
    """The saliency_graft operator, differentiable with respect to the images."""

    @staticmethod
    def forward(images: Tensor, backend: str, *args: Any) -> tuple[Tensor, ...]:
        return overload("saliency_graft", backend)(images, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        images, ctx.backend, *args = inputs
        _, lam, index, mask, saliency, targets = output
        ctx.save_for_backward(mask, index)
        ctx.mark_non_differentiable(lam, index, mask, saliency, targets)
        ctx.augmentations = _augmentations(mask.shape[0], images.shape[0])
        ctx.num_args = len(args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        mask, index = ctx.saved_tensors
        images_grad = GraftBackward.apply(grad, mask, index, ctx.augmentations, ctx.backend)
        return images_grad, None, *[None] * ctx.num_args
