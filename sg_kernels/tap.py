"""Taps a layer: keeps its output from the clean pass until the call that needs it as features."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Owner(Protocol):
    """What a tap asks of the module that it serves."""

    mixed_pass: bool
    to_features: Callable[[Any], Tensor] | None

    def wants_features(self) -> bool: ...

    def hold(self, tap: "Tap") -> None: ...


class Tap:
    """A forward hook. The layer does not keep the owner alive, nor the owner the layer."""

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.ref(owner)
        self._handle: RemovableHandle | None = None
        self.features: object = None
        """What the layer returned in the last clean pass; None once a call has used it."""
        self._version: int | None = None
        self._mixed_pass_is_next = False

    def attach(self, layer: nn.Module) -> None:
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
        if owner is None:
            return
        if owner.mixed_pass:
            if not layer.training:
                return
            if self._mixed_pass_is_next:
                self._mixed_pass_is_next = False
                return
        if not owner.wants_features():
            return
        if owner.to_features is not None:
            output = owner.to_features(output)
        if isinstance(output, Tensor):
            output = output.detach()
            if not _counts_writes(output):
                output = output.clone()
        self.features, self._version = output, _version(output)

    def features_of(self, images: Tensor) -> Tensor:
        """The layer's features of these images, which its last clean pass must have seen."""
        features, owner = self.features, self._owner()
        if features is None:
            assert owner is not None
            raise RuntimeError(
                "layer has seen no pass of these images: before each call run the network on them, "
                "in training mode; the pass after a call is taken for that of the mixed images. "
                "A layer in eval mode, or one that does not see the mixed images, needs "
                "mixed_pass=False. What torch.compile compiled before the layer was tapped does "
                "not see the tap"
                if owner.mixed_pass
                else "layer has seen no pass of these images: run its network on them before each "
                "call. What torch.compile compiled before the layer was tapped does not see the tap"
            )
        if not isinstance(features, Tensor):
            raise TypeError(
                f"layer must return a tensor; got {type(features).__name__}, of which to_features "
                "must make one"
            )
        version = _version(features)
        if version is not None and self._version is not None and version != self._version:
            raise RuntimeError(
                "layer: its output was changed in place after its pass, as nn.ReLU(inplace=True) "
                "does; make that operation out of place, tap a layer after it, or give features"
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
        self._mixed_pass_is_next = True

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copied hook serves the copied owner, and is removed with it if nobody else holds that.
        return _copied, (self._owner(), self._handle)


def _copied(owner: Owner, handle: RemovableHandle) -> Tap:
    tap = Tap(owner)
    tap.removed_by(handle)
    owner.hold(tap)
    return tap


def _counts_writes(tensor: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or tensor.is_inference())


def _version(output: object) -> int | None:
    """How often a tensor was written to in place; None where PyTorch does not count that."""
    return output._version if isinstance(output, Tensor) and _counts_writes(output) else None
