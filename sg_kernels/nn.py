"""Saliency Grafting as a module of a training loop."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from typing_extensions import Self, Unpack

from sg_kernels import backends, checks, ops, pipeline, rng
from sg_kernels.backends import reference
from sg_kernels.functional import mix_targets
from sg_kernels.options import (
    DEFAULTS,
    TYPES,
    OptionTypes,
    check_bool,
    check_int,
    check_probability,
    is_number,
    lists_options,
    options_of,
)
from sg_kernels.pipeline import GraftResult, Randomness, Tensors
from sg_kernels.tap import Tap, recomputes

MAX_RANK = 2**31 - 1
"""Of the streams, which the kernels count in 32 bits."""


class SaliencyGraft(nn.Module):
    """Saliency Grafting in a training loop: ``mixed, targets = mixer(images, targets)``.

    In training mode it grafts a batch and mixes its targets; in ``.eval()`` it returns its inputs.
    It must be on the device of the images. docs/training-loops.md shows it in loops.

    Features: the module taps ``layer`` and takes its output in a forward pass of the clean images,
    before each call that grafts. With ``network`` it makes that pass itself, unless the loop has
    made one: in eval mode, without gradient, at ``pass_scale`` of the resolution. A pass that the
    loop makes is an ordinary one, in which BatchNorm updates its statistics; :meth:`needs_pass`
    says whether the next call needs one. The layer must run once per pass.

    Targets: class ids (B,) with ``num_classes``, or dense rows (B, num_classes). In training mode
    they always come back as dense float32 rows, (n * B, num_classes) with n augmentations, also
    where nothing is mixed.

    Randomness: two buffers, ``seed`` and ``step``. Each call that draws advances ``step``, so a
    state_dict resumes the draws exactly; a checkpoint without them loads and leaves them as they
    are. Under torch.distributed each rank draws its own stream.

    Copies: a deepcopy of the module together with its layer taps the copied layer, a copy of one
    alone is not tapped, and a pickle keeps no tap: call :meth:`tap` after loading it.

    Args:
        layer: the module whose output is the feature map, or its name in ``network``. None: give
            ``features`` or ``saliency`` with each call.
        network: makes the clean pass if a call needs one. Its mode, its buffers and torch's
            generators stay as they are. The module does not keep it alive.
        pass_scale: the resolution of that pass over that of the images, in (0, 1]: 0.5 costs about
            a quarter, and halves the sides of the map.
        to_features: a function of the layer's output that returns the features, such as one that
            picks an item of a tuple.
        mixed_pass: whether the layer also sees the mixed images. True: the pass after a call is
            taken for theirs, and only passes with the layer in training mode count. False: every
            pass counts, in either mode, and a call uses the last one before it. Give False for a
            layer of another network, such as a frozen teacher, and for a layer that is in
            ``.eval()`` during the clean pass of the loop.
        prob: the probability that a call grafts, in [0, 1]. A call that does not has lam = 1 and
            needs no clean pass. Settable.
        warmup_epochs: how many epochs, from 0, graft nothing, as an untrained network has no
            salient features. Needs :meth:`set_epoch`.
        seed: a 64-bit int, or an int64 tensor of one element, which is copied; default: drawn from
            torch's own CPU generator, on each rank from its own.
        rank: the number of this process's random stream; default: its rank under
            torch.distributed. Ranks that share a batch, as in tensor parallelism, must give the
            same rank and seed. Under FSDP ``network`` makes a pass for every call, as other ranks
            may need one; with ``rank`` given, only for those that graft, so then all ranks must
            give the same rank and seed.
        group: instead, a process group, such as the data-parallel one: the number is the rank in
            it.
        **options: those of :func:`sg_kernels.saliency_graft`, with its defaults: ``num_classes``,
            ``temperature`` (settable), ``grid_size``, ``channel_dim``, ``token_grid``,
            ``augmentations`` and so on. With ``standardize`` all images come out standardised,
            whether or not a call grafts, in ``.eval()`` too, and ``network`` sees standardised
            images. A clean pass that the loop makes must see them too: :meth:`standardize`.

    Attributes:
        result: the :class:`sg_kernels.GraftResult` of the last call, its images detached; None in
            ``.eval()``, in the warm-up, at ``prob=0``, and after a call that ``prob`` left out and
            that had no features. With features such a call has lam = 1. It keeps that batch in
            memory until the next call, or until it is set to None.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """

    seed: Tensor
    step: Tensor
    quantiles: Tensor | None
    affine_bits: Tensor | None

    @lists_options
    def __init__(
        self,
        layer: nn.Module | str | None = None,
        *,
        network: nn.Module | None = None,
        pass_scale: float = 1.0,
        to_features: Callable[[Any], Tensor] | None = None,
        mixed_pass: bool = True,
        prob: float = 1.0,
        warmup_epochs: int = 0,
        seed: int | Tensor | None = None,
        rank: int | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
        **options: Unpack[OptionTypes],
    ) -> None:
        super().__init__()
        self.options = options_of("SaliencyGraft", options)
        if self.options.backend is not None:
            backends.check_name("backend", self.options.backend)
        check_bool("mixed_pass", mixed_pass)
        check_int("warmup_epochs", warmup_epochs, 0)
        if not (to_features is None or callable(to_features)):
            raise TypeError(f"to_features must be callable; got {type(to_features).__name__}")
        if layer is not None or network is not None:
            layer = _checked_layer(layer, network)
        if not (is_number(pass_scale) and 0 < pass_scale <= 1):
            raise ValueError(f"pass_scale must be a number in (0, 1]; got {pass_scale!r}")
        self.pass_scale = pass_scale
        self.to_features = to_features
        self.mixed_pass = mixed_pass
        self.prob = prob
        self.warmup_epochs = warmup_epochs
        self.rank = _checked_rank(rank, group)
        self._rank_was_given = rank is not None
        # A bool: torch.compile would recompile for every epoch number.
        self._warming_up = warmup_epochs > 0
        self._epoch_was_set = False
        self._given_seed = None if seed is None else checks.seed_tensor(seed).cpu().clone()
        start = ops.draw_seed() if self._given_seed is None else self._given_seed
        step = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("seed", start.to(step.device, copy=True))
        self.register_buffer("step", step)
        table = None
        if self.options.k is None and self.options.keep_prob is None:
            # A buffer, so that it lies on the device before a compiled or captured call needs it.
            table = rng.beta_quantiles(self.options.alpha).to(step.device)
        self.register_buffer("quantiles", table, persistent=False)
        self.register_buffer("affine_bits", self._made_affine(step.device), persistent=False)
        self.result: GraftResult | None = None
        self._host_state: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(_resume)
        self._tap: Tap | None = None
        self._network: weakref.ref[nn.Module] | None = None
        if layer is not None:
            self.tap(layer, network=network)

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        features: Tensor | None = None,
        saliency: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Grafts ``images`` and mixes ``targets``.

        Args:
            images: (B, C, H, W) or (B, C, ..., H, W).
            targets: class ids (B,), or dense rows (B, num_classes).
            features, saliency: as in :func:`sg_kernels.saliency_graft`, instead of the tapped
                layer's output.
            mask: as in :func:`sg_kernels.saliency_graft`; with ``label="area"`` the call needs no
                features. A call that ``prob`` leaves out does not apply it.

        Returns:
            The mixed images, and the mixed targets as float32 (n * B, num_classes), or None without
            targets. In the warm-up and at ``prob=0`` both are unmixed, (B, ...); in ``.eval()``
            both are as given. With ``standardize`` the images are standardised in any case.
            :attr:`result` keeps the rest.

        Raises:
            TypeError, ValueError: as :func:`sg_kernels.saliency_graft` does; also if the module is
                not on the device of ``images``, or the layer returned no tensor.
            RuntimeError: the call is made in a DataLoader's worker or while activation
                checkpointing recomputes, the layer has seen no pass since the last call, or its
                output was changed in place. A call that raises spends neither the pass nor a step.
        """
        if not self.training:
            self.result = None
            return self.standardize(images), targets
        # Not by attribute, for which nn.Module searches three dictionaries.
        buffers = self._buffers
        seed, step, quantiles = buffers["seed"], buffers["step"], buffers["quantiles"]
        assert seed is not None
        assert step is not None
        self._check_place(images, step.device)
        if self._warming_up or self.prob == 0:
            return self._unmixed(images, targets)
        needs_map = mask is None or self.options.label != "area"
        if needs_map and features is None and saliency is None:
            if self._tap is not None and self._tap.features is None:
                network = self.network()
                if not (self.needs_pass() or self._joins_passes_of_others(network)):
                    unmixed = self._unmixed(images, targets, self.options.augmentations)
                    step += 1
                    self._spend()
                    return unmixed
                if network is not None:
                    checks.check_images(images)
                    clean = self.standardize(images)
                    features = self._tap.run(network, clean, self.pass_scale)
            if features is None:
                features = self._tapped_features(images)
        rank = self._stream()
        tensors = Tensors(images, features, saliency, mask, targets=targets)
        randomness = Randomness(
            seed, step, rank, lambda: self._host_call_seed(rank), self.prob, quantiles
        )
        result = pipeline.run(self.options, tensors, randomness, self._affine())
        self._spend()
        self.result = GraftResult(result.images.detach(), *result[1:])
        return result.images, result.targets

    def standardize(self, images: Tensor) -> Tensor:
        """The images of a clean pass that the loop makes: standardised if the option
        ``standardize`` is given, else as they are.
        """
        if self.options.standardize is None:
            return images
        checks.check_images(images)
        checks.check_standardize(images, self.options)
        affine = pipeline.affine_of(self.options, images, self._affine())
        return reference.standardize(images, affine).to(self.options.out_dtype(images))

    @property
    def prob(self) -> float:
        return self._prob

    @prob.setter
    def prob(self, value: float) -> None:
        check_probability("prob", value)
        self._prob = value

    @property
    def temperature(self) -> float:
        return self.options.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.options = dataclasses.replace(self.options, temperature=value)

    def needs_pass(self) -> bool:
        """Whether the next call grafts, and so needs the features of a clean pass.

        False in ``.eval()``, in the warm-up, at ``prob=0``, and for a call that ``prob`` leaves
        out. Asking changes no draw. Inside code that torch.compile compiles it is True whatever
        ``prob`` is, unless 0; on a GPU the first answer costs a sync.
        """
        if not self.training or self._warming_up or self.prob == 0:
            return False
        if self.prob == 1 or torch.compiler.is_compiling():
            return True
        seed = self._host_call_seed(self._stream())
        coins = (
            rng.philox(0, 0, draw, rng.Stream.KEEP_PROB, seed)[1]
            for draw in range(self.options.augmentations)
        )
        return any(coin < int(self.prob * rng.ONE) for coin in coins)

    def reset(self) -> None:
        """Forgets the passes seen so far. Call it after a batch whose mixed pass was skipped."""
        if self._tap is not None:
            self._tap.reset()

    def reset_parameters(self) -> None:
        """Starts the draws anew, from the given seed or a fresh one; after ``to_empty()``."""
        self.seed.copy_(ops.draw_seed() if self._given_seed is None else self._given_seed)
        self.step.zero_()
        if self.quantiles is not None:
            self.quantiles.copy_(rng.beta_quantiles(self.options.alpha))
        if (affine := self._made_affine(self.step.device)) is not None:
            self.affine_bits = affine
        self._host_state = None

    def train(self, mode: bool = True) -> Self:
        again = mode and not self.training
        if again and self._warming_up and not self._epoch_was_set:
            checks.warn_once(
                "SaliencyGraft(warmup_epochs=...) grafts nothing until set_epoch says that the "
                "warm-up is over: call set_epoch(epoch) at the start of each epoch"
            )
        return super().train(mode)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, of the next calls; for ``warmup_epochs``."""
        check_int("epoch", epoch, 0)
        self._warming_up = epoch < self.warmup_epochs
        self._epoch_was_set = True

    def tap(self, layer: nn.Module | str, *, network: nn.Module | None = None) -> None:
        """Taps ``layer`` instead of the one tapped so far; both arguments as in the constructor."""
        tapped = _checked_layer(layer, network)
        self.untap()
        tap = Tap(self)
        tap.attach(tapped)
        self.hold(tap, network)

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
            ("pass_scale", self.pass_scale, 1.0),
            ("mixed_pass", self.mixed_pass, True),
            ("warmup_epochs", self.warmup_epochs, 0),
            ("rank", self.rank, None),
        ]
        given = [f"{name}={value!r}" for name, value, default in values if value != default]
        tapped = [] if self._tap is None else [f"layer={self._tap.layer_name}"]
        return ", ".join(tapped + given)

    def network(self) -> nn.Module | None:
        """The network that makes the clean pass; this module does not keep it alive."""
        return None if self._network is None else self._network()

    def hold(self, tap: Tap, network: nn.Module | None) -> None:
        """Takes features from ``tap``; a copied layer's hook calls this on the copied module."""
        self._tap = tap
        self._network = None if network is None else weakref.ref(network)

    def wants_features(self) -> bool:
        """Whether the next call will need the features of the pass that is being made."""
        # A module inside the network goes into eval mode with it for a clean pass in eval mode.
        mixes = self.training or not self.mixed_pass
        return mixes and not self._warming_up and self.prob > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "result": None, "_tap": None, "_network": None}

    def _spend(self) -> None:
        """Counts a call that has advanced the step, and uses up the features."""
        if self._host_state is not None:
            self._host_state = (self._host_state[0], self._host_state[1] + 1)
        if self._tap is not None:
            self._tap.spend()

    def _made_affine(self, device: torch.device) -> Tensor | None:
        """Scale and shift of the channels, as integers, since ``.half()`` casts floats."""
        if self.options.standardize is None:
            return None
        mean, std = self.options.mean_and_std()
        return reference.affine(mean, std, len(mean)).view(torch.int32).to(device)

    def _affine(self) -> Tensor | None:
        bits = self._buffers["affine_bits"]
        return None if bits is None else bits.view(torch.float32)

    def _stream(self) -> int:
        return _rank() if self.rank is None else self.rank

    def _joins_passes_of_others(self, network: nn.Module | None) -> bool:
        """Whether other ranks may make a clean pass that waits for this one.

        That happens under FSDP: each pass gathers the weights, and each rank draws for itself.
        """
        distributed = torch.distributed
        if network is None or self._rank_was_given or torch.compiler.is_compiling():
            return False
        if not (distributed.is_available() and distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        sharded = FSDPModule, FullyShardedDataParallel
        return any(isinstance(module, sharded) for module in network.modules())

    def _check_place(self, images: Tensor, device: torch.device) -> None:
        """Refuses a DataLoader's worker, a recomputation, and another device than the module's."""
        if not torch.compiler.is_compiling():
            if get_worker_info() is not None:
                raise RuntimeError(
                    "SaliencyGraft runs in the main process: its copies in a DataLoader's workers "
                    "would all draw the same; call saliency_graft there, which draws from torch's "
                    "generator"
                )
            if recomputes():
                raise RuntimeError(
                    "SaliencyGraft was called during a backward pass, as activation checkpointing "
                    "does to recompute: it would draw anew. Call it outside of the checkpointed "
                    "part"
                )
        if isinstance(images, Tensor) and images.device != device:
            raise ValueError(
                f"images must be on {device}, as the module is; got {images.device}: "
                f"call .to({str(images.device)!r}) on the module"
            )

    def _unmixed(
        self, images: Tensor, targets: Tensor | None, copies: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """What a call returns that grafts nothing, with targets in the form of any other call."""
        self.result = None
        checks.check_images(images)
        options, batch = self.options, images.shape[0]
        if targets is not None:
            checks.ids_or_rows(targets, options, batch, images.device)
            rows = torch.arange(batch, device=images.device).repeat(copies)
            targets = mix_targets(
                targets,
                torch.ones_like(rows, dtype=torch.float32),
                rows,
                options.num_classes,
                options.label_smoothing,
                backend=options.backend,
            )
        images = self.standardize(images)
        return images if copies == 1 else torch.cat([images] * copies), targets

    def _tapped_features(self, images: Tensor) -> Tensor:
        checks.check_images(images)
        if self._tap is None:
            raise ValueError(
                "features or saliency is needed: this SaliencyGraft taps no layer, nor does a copy "
                "made without the layer or loaded from a file: give one to tap()"
            )
        ended = self._network is not None and self.network() is None
        if ended and self._tap.features is None:
            raise RuntimeError(
                "network no longer exists, as SaliencyGraft does not keep it alive: give the "
                "network that you keep, not a wrapper that nobody keeps"
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

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        # A network's checkpoint may be older than its use of this module.
        for key in (f"{prefix}seed", f"{prefix}step"):
            if key in missing:
                missing.remove(key)


def _resume(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, SaliencyGraft)
    module._host_state = None
    if module._warming_up and not module.step.is_meta:
        module._warming_up = module.step.item() == 0  # calls of the warm-up do not advance it


def _checked_layer(layer: Any, network: Any) -> nn.Module:
    if not (network is None or isinstance(network, nn.Module)):
        raise TypeError(f"network must be a torch.nn.Module; got {type(network).__name__}")
    if network is not None and layer is None:
        raise ValueError("network goes with layer, which names the layer to tap")
    if isinstance(layer, str) and network is not None:
        try:
            return network.get_submodule(layer)
        except AttributeError as error:
            raise ValueError(f"layer must name a module of network; got {layer!r}") from error
    if not isinstance(layer, nn.Module):
        raise TypeError(
            "layer must be a torch.nn.Module, or with network= the name of one; "
            f"got {type(layer).__name__}"
        )
    return layer


def _checked_rank(rank: Any, group: Any) -> int | None:
    if group is not None:
        if rank is not None:
            raise ValueError("rank and group exclude each other; give one of them")
        rank = torch.distributed.get_rank(group)
        if rank < 0:
            raise ValueError("group must contain this process")
    if rank is not None:
        check_int("rank", rank, 0, MAX_RANK)
    return rank


def _rank() -> int:
    distributed = torch.distributed
    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
