"""Saliency Grafting as a module of a training loop."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from torch.utils.hooks import RemovableHandle

from sg_kernels import arguments, functional, ops, rng
from sg_kernels.arguments import GridSize, Label, Norm, Normalize, Options, Selection


class SaliencyGraft(nn.Module):
    """Grafts a batch and mixes its targets: ``mixed, targets = graft(images, targets)``.

    In training mode it mixes; in ``.eval()`` and at ``prob=0`` it returns its inputs. The options
    that are not listed here are those of :func:`sg_kernels.saliency_graft`.

    The randomness is two buffers, ``seed`` and ``step``, of which each call advances the second, so
    a state_dict resumes exactly. Under torch.distributed each rank draws a stream of its own from
    the same seed. The module must be on the device of the images.

    The tapped layer's feature map comes from a forward pass of the clean images before each call. A
    network in ``.train()`` treats it as any other: BatchNorm updates its statistics and dropout
    drops. The layer must run once a pass.

    A copy (deepcopy, pickle) of the module and its layer together taps the copied layer; a copy of
    the module alone taps none, and one of the layer alone is not tapped. No copy has a
    :attr:`result`, or the features of a pass.

    Args:
        layer: the module whose output is the feature map. None: give ``features`` or ``saliency``
            with each call.
        to_features: called with the layer's output where that is not yet the (B, K, h, w), or with
            ``token_grid`` (B, N, K), that :func:`sg_kernels.saliency_graft` takes: to pick one of a
            tuple, or to permute (B, h, w, K).
        mixed_pass: whether the layer also sees the mixed images. True: the pass after a call is
            taken for theirs, and only passes in which the layer is in training mode count. False:
            each pass counts, in either mode, and the last before the call is taken for that of the
            clean images: for a layer of another network, such as a frozen teacher, and for one
            that is in ``.eval()`` during the clean pass.
        num_classes: the width of the mixed targets; needed for class ids.
        prob: the probability that a call grafts. One that does not has lam = 1.
        warmup_epochs: the epochs, from 0, in which nothing is grafted, for a network that has
            learnt no salient features yet; see :meth:`set_epoch`.
        seed: a 64-bit int, or an int64 tensor of one element, which is copied; default: drawn from
            torch's own CPU generator.

    Attributes:
        result: the :class:`sg_kernels.GraftResult` of the last call, its images without their
            gradient; None where that mixed nothing: in ``.eval()``, in the warm-up and at
            ``prob=0``. It keeps that batch in memory until the next call, or until it is set to
            None.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """

    seed: Tensor
    step: Tensor

    def __init__(
        self,
        layer: nn.Module | None = None,
        *,
        to_features: Callable[[Any], Tensor] | None = None,
        num_classes: int | None = None,
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
        no_fixed_points: bool = False,
        label_smoothing: float = 0.0,
        token_grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        prob: float = 1.0,
        mixed_pass: bool = True,
        warmup_epochs: int = 0,
        seed: int | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options = Options(
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
            prob=prob,
            backend=backend,
        )
        if not isinstance(mixed_pass, bool):
            raise TypeError(f"mixed_pass must be a bool; got {mixed_pass!r}")
        self.mixed_pass = mixed_pass
        arguments.check_int("warmup_epochs", warmup_epochs, 0)
        self.warmup_epochs = warmup_epochs
        # Not the epoch itself, for each of which torch.compile would compile anew.
        self._warming_up = warmup_epochs > 0
        start = ops.draw_seed() if seed is None else arguments.seed_tensor(seed)
        step = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("seed", start.to(step.device, copy=True))
        self.register_buffer("step", step)
        self.result: functional.GraftResult | None = None
        self._host_state: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(_resume)
        self._tapped: object = None
        self._tapped_version: int | None = None
        self._mixed_pass_is_next = False
        self._tap: _Hook | None = None
        if not (to_features is None or callable(to_features)):
            raise TypeError(f"to_features must be callable; got {type(to_features).__name__}")
        self._to_features = to_features
        if layer is not None:
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layer must be a torch.nn.Module; got {type(layer).__name__}")
            hook = _Hook(self)
            self._hold(hook, layer.register_forward_hook(hook))

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        features: Tensor | None = None,
        saliency: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Grafts ``images``, (B, C, H, W), and mixes ``targets``, (B,) ids or (B, num_classes).

        ``features`` or ``saliency``, as in :func:`sg_kernels.saliency_graft`, take precedence over
        the tapped layer. Returns the mixed images and targets, float32 (rows, num_classes), or None
        without targets. During the warm-up the images are returned as they are, and the targets
        unmixed but in the same form. :attr:`result` keeps the rest.

        Raises:
            TypeError, ValueError: as :func:`sg_kernels.saliency_graft` does, and where the module
                is not on the device of ``images``, or the layer returned no tensor.
            RuntimeError: the call is made in a DataLoader's worker; or the layer has seen no pass
                since the last call, or its output was changed in place. A call that raises spends
                neither the pass nor a step.
        """
        if not self.training or self.options.prob == 0:
            self.result = None
            return images, targets
        if not torch.compiler.is_compiling() and get_worker_info() is not None:
            raise RuntimeError(
                "SaliencyGraft runs in the main process: its copies in a DataLoader's workers "
                "would all draw the same; call saliency_graft there, which draws from torch's "
                "generator"
            )
        step = self.step
        if isinstance(images, Tensor) and images.device != step.device:
            raise ValueError(
                f"images must be on {step.device}, as the module is; got {images.device}: "
                f"call .to({str(images.device)!r}) on the module"
            )
        if self._warming_up:
            self.result = None
            return images, self._unmixed(images, targets)
        if features is None and saliency is None:
            arguments.check_tensor("images", images, "(B, C, H, W)", 4)
            features = self._tapped_features(images)
        rank = _rank()
        result = functional.run(
            self.options,
            images,
            features,
            saliency,
            None,
            targets,
            self.seed,
            step,
            rank,
            lambda: self._host_call_seed(rank),
        )
        if self._host_state is not None:
            self._host_state = (self._host_state[0], self._host_state[1] + 1)
        if self._tap is not None:
            self._tapped = None
            self._mixed_pass_is_next = True
        self.result = result._replace(images=result.images.detach())
        return result.images, result.targets

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch, from 0, the next calls belong to."""
        arguments.check_int("epoch", epoch, 0)
        self._warming_up = epoch < self.warmup_epochs

    def untap(self) -> None:
        """Takes the hook off the layer again."""
        if self._tap is not None:
            self._tap.handle.remove()
            self._tap = self._tapped = None

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        options = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(Options)
            if (value := getattr(self.options, field.name)) != field.default
        ]
        if not self.mixed_pass:
            options.append("mixed_pass=False")
        if self.warmup_epochs:
            options.append(f"warmup_epochs={self.warmup_epochs}")
        return ", ".join(options)

    def __getstate__(self) -> dict[str, Any]:
        copied = {"result": None, "_tapped": None, "_tap": None, "_mixed_pass_is_next": False}
        return {**self.__dict__, **copied}

    def _unmixed(self, images: Tensor, targets: Tensor | None) -> Tensor | None:
        arguments.check_tensor("images", images, "(B, C, H, W)", 4)
        if targets is None:
            return None
        options, batch = self.options, images.shape[0]
        arguments.ids_or_rows(targets, options, batch, images.device)
        rows = torch.arange(batch, device=images.device)
        return functional.mix_targets(
            targets,
            torch.ones_like(rows, dtype=torch.float32),
            rows,
            options.num_classes,
            options.label_smoothing,
            backend=options.backend,
        )

    def _hold(self, hook: "_Hook", handle: RemovableHandle) -> None:
        hook.handle = handle
        self._tap = hook
        weakref.finalize(self, handle.remove)

    def _record(self, layer: nn.Module, output: object) -> None:
        if self.mixed_pass:
            if not layer.training:
                return
            if self._mixed_pass_is_next:
                self._mixed_pass_is_next = False
                return
        # A module that is part of the network goes into eval mode with it for the clean pass.
        mixes = (self.training or not self.mixed_pass) and not self._warming_up
        if mixes and self.options.prob > 0:
            if self._to_features is not None:
                output = self._to_features(output)
            if isinstance(output, Tensor):
                output = output.detach()
                if not _counts_writes(output):
                    output = output.clone()
            self._tapped, self._tapped_version = output, _version(output)

    def _tapped_features(self, images: Tensor) -> Tensor:
        if self._tap is None:
            raise ValueError(
                "features or saliency is needed: this SaliencyGraft taps no layer (a copy made "
                "without its layer does not either)"
            )
        features = self._tapped
        if features is None:
            raise RuntimeError(
                "layer has seen no pass of these images: before each call run the network on them, "
                "in training mode; the pass after a call is taken for that of the mixed images. "
                "A layer in eval mode, or one that does not see the mixed images, needs "
                "mixed_pass=False. What torch.compile compiled before the layer was tapped does "
                "not see the tap"
                if self.mixed_pass
                else "layer has seen no pass of these images: run its network on them before each "
                "call. What torch.compile compiled before the layer was tapped does not see the tap"
            )
        if not isinstance(features, Tensor):
            raise TypeError(
                f"layer must return a tensor; got {type(features).__name__}, of which to_features "
                "must make one"
            )
        if _was_written_to(features, self._tapped_version):
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

    def _host_call_seed(self, rank: int) -> int:
        """The call's seed on the host, which counts a GPU's steps too: reading them would sync.

        There a write into the buffers goes unnoticed, other than by load_state_dict.
        """
        if self.step.device.type == "cpu":
            return int(rng.call_seed(int(self.seed), int(self.step), rank))
        if self._host_state is None:
            self._host_state = int(self.seed), int(self.step)
        return int(rng.call_seed(*self._host_state, rank))


class _Hook:
    """Hands a layer's outputs to the module, which it does not keep alive."""

    handle: RemovableHandle

    def __init__(self, module: SaliencyGraft) -> None:
        self._module = weakref.ref(module)

    def __call__(self, layer: nn.Module, args: Any, output: object) -> None:
        module = self._module()
        if module is not None:
            module._record(layer, output)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copied hook serves the copied module, and is removed with it if nobody else holds that.
        return _copied_hook, (self._module(), self.handle)


def _copied_hook(module: SaliencyGraft, handle: RemovableHandle) -> _Hook:
    hook = _Hook(module)
    module._hold(hook, handle)
    return hook


def _counts_writes(tensor: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or tensor.is_inference())


def _version(output: object) -> int | None:
    """How often a tensor was written to in place; None where that is not counted."""
    return output._version if isinstance(output, Tensor) and _counts_writes(output) else None


def _was_written_to(features: Tensor, since: int | None) -> bool:
    now = _version(features)
    return now is not None and since is not None and now != since


def _resume(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, SaliencyGraft)
    module._host_state = None
    if module._warming_up and not module.step.is_meta:
        module._warming_up = module.step.item() == 0  # a call of the warm-up does not advance it


def _rank() -> int:
    distributed = torch.distributed
    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
