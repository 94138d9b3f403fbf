"""Saliency Grafting as a module of a training loop."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sg_kernels import arguments, functional, ops, rng
from sg_kernels.arguments import GridSize, Label, Norm, Normalize, Options, Selection


class SaliencyGraft(nn.Module):
    """Grafts a batch and mixes its targets: ``mixed, targets = graft(images, targets)``.

    In training mode it mixes; in ``.eval()`` and at ``prob=0`` it returns its inputs. The options
    that are not listed here are those of :func:`sg_kernels.saliency_graft`.

    The randomness is two buffers, ``seed`` and ``step``, of which each call advances the second, so
    a state_dict resumes exactly. Under torch.distributed each rank draws a stream of its own from
    the same seed.

    Args:
        layer: the module whose output is the feature map. It is tapped in the forward pass of the
            clean images, which comes before each call; the pass after it is taken for that of the
            mixed images. None: give ``features`` or ``saliency`` with each call.
        num_classes: the width of the mixed targets; needed for class ids.
        prob: the probability that a call grafts. One that does not has lam = 1.
        warmup_epochs: the epochs, from 0, in which nothing is grafted, for a network that has
            learnt no salient features yet; see :meth:`set_epoch`.
        seed: a 64-bit int; default: drawn from torch's own CPU generator.

    Attributes:
        result: the :class:`sg_kernels.GraftResult` of the last call that mixed, its images without
            their gradient; None before.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """

    seed: Tensor
    step: Tensor

    def __init__(
        self,
        layer: nn.Module | None = None,
        *,
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
        warmup_epochs: int = 0,
        seed: int | None = None,
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
        arguments.check_int("warmup_epochs", warmup_epochs, 0)
        self.warmup_epochs = warmup_epochs
        self.epoch = 0
        start = ops.draw_seed() if seed is None else arguments.seed_tensor(seed)
        self.register_buffer("seed", start)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))
        self.result: functional.GraftResult | None = None
        self._host_state: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(_forget_host_state)
        self._tapped: Tensor | None = None
        self._mixed_pass_is_next = False
        self._tap: RemovableHandle | None = None
        if layer is not None:
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layer must be a torch.nn.Module; got {type(layer).__name__}")
            self._tap = layer.register_forward_hook(self._record)

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
        """
        if not self.training or self.options.prob == 0:
            return images, targets
        if self.epoch < self.warmup_epochs:
            return images, self._unmixed(targets)
        if features is None and saliency is None:
            features = self._take_tapped(images)
        rank = _rank()
        result = functional.run(
            self.options,
            images,
            features,
            saliency,
            None,
            targets,
            lambda: self.seed,
            self.step,
            rank,
            lambda: self._host_call_seed(rank),
        )
        if self._host_state is not None:
            self._host_state = (self._host_state[0], self._host_state[1] + 1)
        self._mixed_pass_is_next = self._tap is not None
        self.result = result._replace(images=result.images.detach())
        return result.images, result.targets

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch, from 0, the next calls belong to."""
        arguments.check_int("epoch", epoch, 0)
        self.epoch = epoch

    def untap(self) -> None:
        """Takes the hook off the layer again."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = self._tapped = None

    def extra_repr(self) -> str:
        return f"{self.options}, warmup_epochs={self.warmup_epochs}"

    def _unmixed(self, targets: Tensor | None) -> Tensor | None:
        if targets is None:
            return None
        rows = torch.arange(targets.shape[0], device=targets.device)
        options = self.options
        return functional.mix_targets(
            targets,
            torch.ones_like(rows, dtype=torch.float32),
            rows,
            options.num_classes,
            options.label_smoothing,
            backend=options.backend,
        )

    def _record(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._mixed_pass_is_next:
            self._mixed_pass_is_next = False
        elif self.training and self.options.prob > 0 and self.epoch >= self.warmup_epochs:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer must return a tensor; got {type(output).__name__}")
            self._tapped = output.detach()

    def _take_tapped(self, images: Tensor) -> Tensor:
        if self._tap is None:
            raise ValueError(
                "features or saliency is needed: SaliencyGraft was given no layer to tap"
            )
        features, self._tapped = self._tapped, None
        if features is None:
            raise RuntimeError(
                "layer has seen no forward pass of these images; run the network on them first"
            )
        if features.shape[0] != images.shape[0]:
            raise ValueError(
                f"images must be the batch that the layer last saw, of {features.shape[0]}; "
                f"got {images.shape[0]}"
            )
        return features

    def _host_call_seed(self, rank: int) -> int:
        """The call's seed on the host, which counts the steps too: reading ``step`` may sync."""
        if self._host_state is None:
            self._host_state = int(self.seed), int(self.step)
        return int(rng.call_seed(*self._host_state, rank))


def _forget_host_state(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, SaliencyGraft)
    module._host_state = None


def _rank() -> int:
    distributed = torch.distributed
    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
