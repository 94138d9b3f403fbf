"""Taps a layer: keeps its output from the clean pass until the call that needs it as features."""

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sg_kernels.checks import warn_once


class Owner(Protocol):
    """What a tap asks of the module that it serves."""

    mixed_pass: bool
    to_features: Callable[[Any], Tensor] | None

    def wants_features(self) -> bool: ...

    def network(self) -> nn.Module | None: ...

    def hold(self, tap: "Tap", network: nn.Module | None) -> None: ...


COMPILED_EARLIER = (
    "What torch.compile compiled before the layer was tapped does not see the tap: tap it first, "
    "or set torch._dynamo.config.skip_nnmodule_hook_guards = False before compiling"
)
NOT_SEEN = {
    "no pass": (
        f"it has not run since it was tapped: run the network on them before each call. "
        f"{COMPILED_EARLIER}"
    ),
    "eval": (
        "its last pass was in eval mode, which does not count: make the clean pass in training "
        "mode, or give mixed_pass=False"
    ),
    "spent": "it has not run since the last call: run the network on them before each call",
    "mixed": (
        "its last pass was taken for that of the last call's mixed images: make a clean pass "
        "before each call and, where a batch's mixed pass is skipped, call reset(). A layer that "
        "does not see the mixed images needs mixed_pass=False"
    ),
}
"""Why there are no features, and what to do."""


class Tap:
    """A forward hook. The layer does not keep the owner alive, nor the owner the layer."""

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.ref(owner)
        self._handle: RemovableHandle | None = None
        self.features: object = None
        """What the layer returned in the last clean pass; None once a call has used it."""
        self._version: int | None = None
        self._mixed_pass_is_next = False
        self._own_pass_is_running = False
        self._not_seen = "no pass"
        self.layer_name = ""

    @property
    def __name__(self) -> str:
        # torch.jit.script asks a hook for its name, and cannot compile this one.
        raise RuntimeError(
            "torch.jit.script cannot compile a network whose layer SaliencyGraft taps: call its "
            "untap() first"
        )

    def attach(self, layer: nn.Module) -> None:
        self.layer_name = type(layer).__name__
        self.removed_by(layer.register_forward_hook(self))

    def removed_by(self, handle: RemovableHandle) -> None:
        """Takes the hook off the layer when the owner is gone."""
        self._handle = handle
        weakref.finalize(self._owner(), handle.remove)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __call__(self, layer: nn.Module, args: Any, output: object) -> None:
        owner = self._owner()
        if owner is None or recomputes():
            return
        if not (self._own_pass_is_running or self._is_clean(owner, layer)):
            return
        if owner.mixed_pass and self.features is not None and not torch.compiler.is_compiling():
            warn_once(
                "layer has run twice since the last call, and the later output is used. Make one "
                "clean pass per call; a layer that runs several times a pass cannot be tapped, "
                "but its features can be given with each call"
            )
        if owner.to_features is not None:
            output = owner.to_features(output)
        if isinstance(output, Tensor):
            output = output.detach()
            if not _counts_writes(output):
                output = output.clone()
        self.features, self._version = output, _version(output)

    def _is_clean(self, owner: Owner, layer: nn.Module) -> bool:
        """Whether a pass that the user makes is one of clean images that a call will use."""
        if owner.mixed_pass:
            if not layer.training:
                self._not_seen = "eval"
                return False
            if self._mixed_pass_is_next:
                self._mixed_pass_is_next, self._not_seen = False, "mixed"
                return False
        return owner.wants_features()

    def run(self, network: nn.Module, images: Tensor, scale: float) -> Tensor:
        """The features of a clean pass that it makes, at ``scale`` of the resolution.

        In eval mode and without gradient: BatchNorm's statistics and torch's generators stay as
        they are, and every module is left in the mode that it was in.
        """
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        self._own_pass_is_running = True
        try:
            with torch.no_grad():
                _without_ddp(network)(_at_scale(images, scale))
        finally:
            self._own_pass_is_running = False
            for module, mode in modes:
                module.training = mode
        features = self.features_of(images)
        self.features = None  # a call that is refused leaves nothing to the next batch
        return features

    def features_of(self, images: Tensor) -> Tensor:
        """The layer's features of these images, which its last clean pass must have seen."""
        features = self.features
        if features is None:
            reason = NOT_SEEN[self._not_seen]
            raise RuntimeError(f"layer has seen no pass of these images: {reason}")
        if not isinstance(features, Tensor):
            raise TypeError(
                f"layer must return a tensor; got {type(features).__name__}: make one of it with "
                "to_features"
            )
        if features.dim() not in (3, 4):
            raise ValueError(
                f"layer must return a map (B, K, h, w) or tokens (B, N, K); {self.layer_name} "
                f"returned {tuple(features.shape)}: tap an earlier layer, or make a map of it with "
                "to_features"
            )
        version = _version(features)
        if version is not None and self._version is not None and version != self._version:
            raise RuntimeError(
                "layer: its output was changed in place after its pass, as nn.ReLU(inplace=True) "
                "does: give to_features=torch.clone, or tap a layer after that operation"
            )
        if features.shape[0] != images.shape[0]:
            raise ValueError(
                f"images must be the batch that the layer last saw, of {features.shape[0]}; "
                f"got {images.shape[0]}"
            )
        return features

    def spend(self) -> None:
        """A call has mixed: its features are used, and the next pass sees the mixed images."""
        self.features = None
        self._mixed_pass_is_next, self._not_seen = True, "spent"

    def reset(self) -> None:
        """Starts anew with a clean pass."""
        self.features = None
        self._mixed_pass_is_next, self._not_seen = False, "no pass"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        # A copied hook serves the copied owner, and is removed with it if nobody else holds that.
        owner, handle = self._owner(), self._handle
        assert owner is not None  # as the layer still holds this hook
        assert handle is not None
        twin: Owner = copy.deepcopy(owner, memo)
        tap = Tap(twin)
        tap.layer_name = self.layer_name
        tap.removed_by(copy.deepcopy(handle, memo))
        twin.hold(tap, copy.deepcopy(owner.network(), memo))
        return tap

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A pickled network must load without this package, and its dictionary of hooks must keep
        # the entry: a method of the standard library that does nothing takes this hook's place.
        return getattr, (contextlib.nullcontext(), "__exit__")


def recomputes() -> bool:
    """Whether this runs in a backward pass, as what activation checkpointing recomputes does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _without_ddp(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, which would broadcast buffers although only some
    ranks make the pass.
    """
    return network.module if isinstance(network, DistributedDataParallel) else network


def _at_scale(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    if not images.is_floating_point():
        raise TypeError(
            f"pass_scale resamples floating images; got {images.dtype}: give pass_scale=1, or "
            "floating images"
        )
    sides = (max(1, round(side * scale)) for side in images.shape[-2:])
    return F.interpolate(images, (*images.shape[2:-2], *sides), mode="area")


def _counts_writes(tensor: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or tensor.is_inference())


def _version(output: object) -> int | None:
    """How often a tensor was written to in place; None where PyTorch does not count that."""
    return output._version if isinstance(output, Tensor) and _counts_writes(output) else None
