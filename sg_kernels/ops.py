"""The operators torch.ops.sg_kernels.*: schemas, output shapes, gradients.

An operator has one overload per backend: ``torch.ops.sg_kernels.graft.cpp`` and so on. All schemas
stand here or are generated from :class:`sg_kernels.call.Call`; csrc implements them for ``cpp`` and
``cuda``.

The operators trust their arguments: the modules that call them check first.
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sg_kernels import backends, rng
from sg_kernels.backends import reference
from sg_kernels.call import Call, Outputs, parameters, schema

SCHEMAS = {
    "channel_saliency": "(Tensor features) -> Tensor",
    "graft": "(Tensor images, Tensor mask, Tensor index, Tensor(a!)? out=None) -> Tensor",
    "graft_backward": "(Tensor grad, Tensor mask, Tensor index, int augmentations) -> Tensor",
    "mix_targets": (
        "(Tensor targets, Tensor lam, Tensor index, int num_classes, float label_smoothing)"
        " -> Tensor"
    ),
    "saliency_graft": schema(),
}
"""With ``out`` given, the images are written there and an empty tensor is returned in their place:
an operator's output must not be its input."""


def _reference_graft(
    images: Tensor, mask: Tensor, index: Tensor, out: Tensor | None = None
) -> Tensor:
    grafted = reference.graft(images, mask, index, out)
    return grafted if out is None else images.new_empty(0)


_REFERENCE: dict[str, Callable[..., Any]] = {
    "channel_saliency": reference.channel_saliency,
    "graft": _reference_graft,
    "graft_backward": reference.graft_backward,
    "mix_targets": reference.mix_targets,
    "saliency_graft": lambda *args: reference.saliency_graft(Call(*args)),
}


@lru_cache
def _triton_operator(name: str) -> Any:
    return getattr(importlib.import_module("sg_kernels.backends.triton.operators"), name)


def _triton(name: str) -> Callable[..., Any]:
    """An operator of the Triton backend, which is imported by its first call."""
    return lambda *args: _triton_operator(name)(*args)


def _fake_channel_saliency(features: Tensor) -> Tensor:
    batch, _, h, w = features.shape
    return features.new_empty((batch, h, w), dtype=torch.float32)


def _fake_graft(images: Tensor, mask: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    return reference.empty_rows(images, mask.shape[0]) if out is None else images.new_empty(0)


def _fake_graft_backward(grad: Tensor, mask: Tensor, index: Tensor, augmentations: int) -> Tensor:
    return reference.empty_rows(grad, grad.shape[0] // augmentations)


def _fake_mix_targets(
    targets: Tensor, lam: Tensor, index: Tensor, num_classes: int, label_smoothing: float
) -> Tensor:
    return lam.new_empty((lam.shape[0], num_classes))


def _fake_saliency_graft(*args: Any) -> Outputs:
    call = Call(*args)
    images, batch = call.images, call.images.shape[0]
    rows = call.augmentations * batch
    columns = 0 if call.targets is None else call.num_classes
    return Outputs(
        images=(
            reference.empty_rows(images, rows, call.out_dtype())
            if call.out is None
            else call.out.new_empty(0)
        ),
        lam=images.new_empty(rows, dtype=torch.float32),
        index=images.new_empty(rows, dtype=torch.int64),
        mask=images.new_empty((rows, *call.grid_size), dtype=torch.bool),
        saliency=images.new_empty((batch, *call.source().shape[-2:]), dtype=torch.float32),
        targets=images.new_empty((rows, columns), dtype=torch.float32),
    )


_FAKE: dict[str, Callable[..., Any]] = {
    "channel_saliency": _fake_channel_saliency,
    "graft": _fake_graft,
    "graft_backward": _fake_graft_backward,
    "mix_targets": _fake_mix_targets,
    "saliency_graft": _fake_saliency_graft,
}

_library = torch.library.Library("sg_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    for _backend in backends.DEVICES:
        _library.define(f"{_name}.{_backend}{_schema}")
        torch.library.register_fake(f"sg_kernels::{_name}.{_backend}", _FAKE[_name], lib=_library)
    _library.impl(f"{_name}.reference", _REFERENCE[_name], "CompositeExplicitAutograd")
    for _device in backends.DEVICES["triton"]:
        _library.impl(f"{_name}.triton", _triton(_name), _device.upper())

# For the Triton backend; csrc/triton/repeat.cpp implements both.
_library.define(f"repeat({parameters()}, int overlap, Tensor? prepared=None) -> Tensor[]")
_library.define("forget() -> ()")

_library.define("draw_seed(Tensor blank) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
torch.library.register_fake("sg_kernels::draw_seed", torch.empty_like, lib=_library)
_library.impl("draw_seed", lambda blank: blank.clone().random_(), "CompositeExplicitAutograd")


CPU = torch.device("cpu")


def draw_seed(generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, int64 (1,), from the generator, on its device; None: torch's own on the CPU."""
    device = CPU if generator is None else generator.device
    blank = torch.empty(1, dtype=torch.int64, device=device)
    if generator is None and torch.compiler.is_compiling():
        # An operator, so that a compiled graph draws from torch's generator as eager code does.
        # Its argument keeps the compiler from merging two draws into one.
        return torch.ops.sg_kernels.draw_seed(blank)
    return blank.random_(generator=generator)


_library.define("quantiles(float alpha, Device device) -> Tensor")


@torch.library.register_fake("sg_kernels::quantiles", lib=_library)
def _fake_quantiles(alpha: float, device: torch.device) -> Tensor:
    return torch.empty(rng.QUANTILE_BINS + 1, dtype=torch.int64, device=device)


_library.define("affine(float[] mean, float[] std, SymInt channels, Device device) -> Tensor")


@torch.library.register_fake("sg_kernels::affine", lib=_library)
def _fake_affine(
    mean: list[float], std: list[float], channels: int, device: torch.device
) -> Tensor:
    return torch.empty(2, channels, device=device)


MAX_TABLES = 64
"""Tables kept on the CPU, those of p 8 KiB each: a schedule of alpha makes one for every value."""
_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
"""By what they are made of, and their device; the most recently used last."""


def _table(option: str, key: tuple[Any, ...], make: Callable[..., Tensor]) -> Tensor:
    """make(...) of what stands before the device, the last of ``key``, cached there.

    While a compiler or a mode traces, call the operator of the caller's name instead.
    """
    table, device = _tables.get(key), key[-1]
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{option}: the first call with such a value copies a table to the device, which a "
                "CUDA graph cannot capture. Make one call before capturing, or use SaliencyGraft"
            )
        table = torch.func.debug_unwrap(make(*key[:-1]).to(device))
        if type(table) is Tensor:  # a mode that traces makes fake ones
            _tables[key] = table
            _forget_tables()
    elif device.type == "cpu":
        _tables.move_to_end(key)
    return table


def _forget_tables() -> None:
    # Only those on the CPU: a captured CUDA graph may point at any of the others.
    on_cpu = [key for key in _tables if key[-1].type == "cpu"]
    for key in on_cpu[:-MAX_TABLES]:
        del _tables[key]


def quantiles(alpha: float, device: torch.device) -> Tensor:
    """:func:`rng.beta_quantiles` on ``device``, cached."""
    return _table("alpha", (alpha, device), rng.beta_quantiles)


def affine(
    mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device
) -> Tensor:
    """:func:`reference.affine` on ``device``, cached."""
    key = (tuple(mean), tuple(std), int(channels), device)
    return _table("standardize", key, reference.affine)


# A clone: compilers own an operator's output, and may write to it.
_library.impl("quantiles", lambda *args: quantiles(*args).clone(), "CompositeExplicitAutograd")
_library.impl("affine", lambda *args: affine(*args).clone(), "CompositeExplicitAutograd")


_overloads = {
    (name, backend): getattr(getattr(torch.ops.sg_kernels, name), backend)
    for name in SCHEMAS
    for backend in backends.DEVICES
}


def overload(name: str, backend: str) -> Any:
    """The operator ``name`` of ``backend``."""
    return _overloads[name, backend]


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
        args = (*ctx.saved_tensors, ctx.augmentations, ctx.backend)
        return GraftBackward.apply(grad, *args), None, None, None


class GraftBackward(torch.autograd.Function):
    """The graft_backward operator. Both are linear, so its gradient is the graft."""

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
    def forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
        return overload("saliency_graft", backend)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, call, outputs = inputs[0], Call(*inputs[1:]), Outputs(*output)
        ctx.save_for_backward(outputs.mask, outputs.index, call.affine)
        ctx.dtype = call.images.dtype
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.augmentations, ctx.depth = call.augmentations, call.depth

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        mask, index, affine = ctx.saved_tensors
        if ctx.depth > 1:
            mask = mask.repeat(1, ctx.depth, 1)
        if affine is not None:  # scaled and added up in float32, and rounded once
            grad = grad.float() * affine[0][:, None, None]
        gradient = GraftBackward.apply(grad, mask, index, ctx.augmentations, ctx.backend)
        gradient = gradient.to(ctx.dtype)
        others = [None] * (len(Call._fields) - 1)
        return None, gradient, *others
