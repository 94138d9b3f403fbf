"""Saliency Grafting as a module of a training loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from typing_extensions import Unpack

from sg_kernels import checks, functional, ops, rng
from sg_kernels.functional import Randomness, Tensors
from sg_kernels.options import (
    DEFAULTS,
    TYPES,
    OptionTypes,
    check_bool,
    check_int,
    check_probability,
    lists_options,
    options_of,
)
from sg_kernels.tap import Tap


class SaliencyGraft(nn.Module):
    """Grafts a batch and mixes its targets: ``mixed, targets = mixer(images, targets)``.

    In training mode it mixes; in ``.eval()`` and at ``prob=0`` it returns its inputs. The arguments
    that are not listed here are the options of :func:`sg_kernels.saliency_graft`.

    The randomness is two buffers, ``seed`` and ``step``. Each call advances ``step``, so a
    state_dict resumes exactly. Under torch.distributed each rank draws its own stream from the same
    seed. The module must be on the device of the images.

    The features come from the tapped layer, in a forward pass of the clean images before each call.
    A network in ``.train()`` treats that pass as any other: BatchNorm updates its statistics, and
    dropout drops. The layer must run once per pass.

    A copy (deepcopy, pickle) of the module together with its layer taps the copied layer. A copy of
    the module alone taps nothing, and a copy of the layer alone is not tapped. No copy keeps
    :attr:`result` or the features of a pass.

    Args:
        layer: the module whose output is the feature map. None: give ``features`` or ``saliency``
            with each call.
        to_features: turns the layer's output into features, (B, K, h, w) or, with ``token_grid``,
            (B, N, K): picks one of a tuple, or permutes (B, h, w, K).
        mixed_pass: whether the layer also sees the mixed images. True: the pass after a call is
            taken for theirs, and only passes with the layer in training mode count. False: every
            pass counts, in either mode, and the last one before the call is taken for the clean
            images: for a layer of another network, such as a frozen teacher, and for a layer that
            is in ``.eval()`` during the clean pass.
        prob: the probability that a call grafts. A call that does not has lam = 1.
        warmup_epochs: the epochs, from 0, in which nothing is grafted, because an untrained network
            has no salient features; see :meth:`set_epoch`.
        seed: a 64-bit int, or an int64 tensor of one element, which is copied; default: drawn from
            torch's own CPU generator.

    Attributes:
        result: the :class:`sg_kernels.GraftResult` of the last call, its images detached; None
            where nothing was mixed: in ``.eval()``, in the warm-up and at ``prob=0``. It keeps that
            batch in memory until the next call, or until it is set to None.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """

    seed: Tensor
    step: Tensor

    @lists_options
    def __init__(
        self,
        layer: nn.Module | None = None,
        *,
        to_features: Callable[[Any], Tensor] | None = None,
        mixed_pass: bool = True,
        prob: float = 1.0,
        warmup_epochs: int = 0,
        seed: int | Tensor | None = None,
        **options: Unpack[OptionTypes],
    ) -> None:
        super().__init__()
        self.options = options_of("SaliencyGraft", options)
        check_bool("mixed_pass", mixed_pass)
        check_probability("prob", prob)
        check_int("warmup_epochs", warmup_epochs, 0)
        if not (to_features is None or callable(to_features)):
            raise TypeError(f"to_features must be callable; got {type(to_features).__name__}")
        if not (layer is None or isinstance(layer, nn.Module)):
            raise TypeError(f"layer must be a torch.nn.Module; got {type(layer).__name__}")
        self.to_features = to_features
        self.mixed_pass = mixed_pass
        self.prob = prob
        self.warmup_epochs = warmup_epochs
        # A bool: torch.compile would recompile for every epoch number.
        self._warming_up = warmup_epochs > 0
        start = ops.draw_seed() if seed is None else checks.seed_tensor(seed)
        step = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("seed", start.to(step.device, copy=True))
        self.register_buffer("step", step)
        self.result: functional.GraftResult | None = None
        self._host_state: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(_resume)
        self._tap: Tap | None = None
        if layer is not None:
            tap = Tap(self)
            tap.attach(layer)
            self.hold(tap)

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
            TypeError, ValueError: as :func:`sg_kernels.saliency_graft` does; also where the module
                is not on the device of ``images``, or the layer returned no tensor.
            RuntimeError: the call is made in a DataLoader's worker, the layer has seen no pass
                since the last call, or its output was changed in place. A call that raises spends
                neither the pass nor a step.
        """
        if not self.training or self.prob == 0:
            self.result = None
            return images, targets
        self._check_place(images)
        if self._warming_up:
            self.result = None
            return images, self._unmixed(images, targets)
        if features is None and saliency is None:
            features = self._tapped_features(images)
        rank = _rank()
        tensors = Tensors(images, features, saliency, targets=targets)
        randomness = Randomness(
            self.seed, self.step, rank, lambda: self._host_call_seed(rank), self.prob
        )
        result = functional.run(self.options, tensors, randomness)
        if self._host_state is not None:
            self._host_state = (self._host_state[0], self._host_state[1] + 1)
        if self._tap is not None:
            self._tap.spend()
        self.result = result._replace(images=result.images.detach())
        return result.images, result.targets

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch, from 0, the next calls belong to."""
        check_int("epoch", epoch, 0)
        self._warming_up = epoch < self.warmup_epochs

    def untap(self) -> None:
        """Takes the hook off the layer again."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        values = [(name, getattr(self.options, name), getattr(DEFAULTS, name)) for name in TYPES]
        values += [
            ("prob", self.prob, 1.0),
            ("mixed_pass", self.mixed_pass, True),
            ("warmup_epochs", self.warmup_epochs, 0),
        ]
        return ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)

    def hold(self, tap: Tap) -> None:
        """Takes features from ``tap``, as a copied layer's hook asks of the copied module."""
        self._tap = tap

    def wants_features(self) -> bool:
        """Whether the next call will need the features of the pass that is being made."""
        # A module inside the network goes into eval mode with it for a clean pass in eval mode.
        mixes = self.training or not self.mixed_pass
        return mixes and not self._warming_up and self.prob > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "result": None, "_tap": None}

    def _check_place(self, images: Tensor) -> None:
        """Refuses a DataLoader's worker, and another device than the module's."""
        if not torch.compiler.is_compiling() and get_worker_info() is not None:
            raise RuntimeError(
                "SaliencyGraft runs in the main process: its copies in a DataLoader's workers "
                "would all draw the same; call saliency_graft there, which draws from torch's "
                "generator"
            )
        device = self.step.device
        if isinstance(images, Tensor) and images.device != device:
            raise ValueError(
                f"images must be on {device}, as the module is; got {images.device}: "
                f"call .to({str(images.device)!r}) on the module"
            )

    def _unmixed(self, images: Tensor, targets: Tensor | None) -> Tensor | None:
        checks.check_tensor("images", images, "(B, C, H, W)", 4)
        if targets is None:
            return None
        options, batch = self.options, images.shape[0]
        checks.ids_or_rows(targets, options, batch, images.device)
        rows = torch.arange(batch, device=images.device)
        return functional.mix_targets(
            targets,
            torch.ones_like(rows, dtype=torch.float32),
            rows,
            options.num_classes,
            options.label_smoothing,
            backend=options.backend,
        )

    def _tapped_features(self, images: Tensor) -> Tensor:
        checks.check_tensor("images", images, "(B, C, H, W)", 4)
        if self._tap is None:
            raise ValueError(
                "features or saliency is needed: this SaliencyGraft taps no layer (a copy made "
                "without its layer does not either)"
            )
        return self._tap.features_of(images)

    def _host_call_seed(self, rank: int) -> int:
        """The call's seed on the host, which counts a GPU's steps itself: reading them would sync.

        On a GPU only load_state_dict resets the count; direct writes to the buffers go unseen.
        """
        if self.step.device.type == "cpu":
            return int(rng.call_seed(int(self.seed), int(self.step), rank))
        if self._host_state is None:
            self._host_state = int(self.seed), int(self.step)
        return int(rng.call_seed(*self._host_state, rank))


def _resume(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, SaliencyGraft)
    module._host_state = None
    if module._warming_up and not module.step.is_meta:
        module._warming_up = module.step.item() == 0  # calls of the warm-up do not advance it


def _rank() -> int:
    distributed = torch.distributed
    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
