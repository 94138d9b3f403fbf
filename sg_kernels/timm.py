"""Saliency Grafting beside timm's mixup and cutmix; the only module that needs timm."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sg_kernels.nn import SaliencyGraft
from sg_kernels.options import check_probability

try:
    from timm.data import mixup
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("sg_kernels.timm needs timm: pip install timm") from error


class Mixup:
    """timm's ``Mixup`` that also grafts: ``x, targets = mixup_fn(x, targets)``.

    One draw per batch decides. With probability ``prob * graft_prob`` the batch is grafted; else
    it goes to timm's own Mixup, whose probability is set so that ``prob`` remains the share of the
    batches that are mixed (of the images, in the modes ``"elem"`` and ``"pair"``). The draw comes
    from :attr:`grafter`, not from NumPy's generator, which timm uses, so ``graft_prob=0`` gives
    what timm gives.

    As timm does, it takes class ids (B,), or with ``multi_label`` dense rows (B, num_classes), and
    returns dense targets (B, num_classes). A grafted batch is a new tensor; timm writes to ``x``.
    timm takes even batches only; here the last image of an odd batch that timm mixes stays unmixed.

    Args:
        mixup_alpha, cutmix_alpha, cutmix_minmax, switch_prob, mode, correct_lam: for the batches
            that are not grafted, as in ``timm.data.Mixup``.
        prob: the share of batches that are mixed at all.
        label_smoothing: as in ``timm.data.Mixup``, for grafted batches too.
        num_classes: the width of the targets.
        multi_label: the targets are multi-label rows, which timm smooths towards 1/2.
        graft_prob: the share of the mixed batches that are grafted.
        graft_options: of :class:`sg_kernels.SaliencyGraft`: ``layer`` and ``network``, which
            grafting needs, ``pass_scale``, ``seed`` and the rest, except ``augmentations``.

    Attributes:
        grafter: the :class:`sg_kernels.SaliencyGraft`. It follows the batches to their device, and
            its state_dict resumes its draws.
        mixup_enabled: whether anything is mixed; timm's training script sets it to False at
            ``--mixup-off-epoch``.

    Raises:
        TypeError, ValueError: a bad argument, by its name.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        graft_prob: float = 0.5,
        **graft_options: Any,
    ) -> None:
        check_probability("prob", prob)
        check_probability("graft_prob", graft_prob)
        if graft_prob > 0 and graft_options.get("layer") is None:
            raise ValueError("layer is needed to graft: give layer and network, or graft_prob=0")
        if graft_options.get("augmentations", 1) != 1:
            raise ValueError("augmentations must be 1: timm gives one row per image")
        grafted = prob * graft_prob
        # timm before its multi-label mixing does not know the argument.
        self._labels = {"multi_label": True} if multi_label else {}
        self._timm = mixup.Mixup(
            mixup_alpha,
            cutmix_alpha,
            cutmix_minmax,
            (prob - grafted) / (1 - grafted) if grafted < 1 else 0.0,
            switch_prob,
            mode,
            correct_lam,
            label_smoothing,
            num_classes,
            **self._labels,
        )
        self.grafter = SaliencyGraft(
            prob=grafted,
            num_classes=num_classes,
            label_smoothing=0.0 if multi_label else label_smoothing,
            **graft_options,
        )
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes ``x``, (B, C, H, W), and ``target``."""
        grafter = self.grafter
        if grafter.step.device != x.device:
            grafter.to(x.device)
        # In eval mode the tap keeps no features either.
        grafter.train(self.mixup_enabled)
        if not grafter.needs_pass():
            grafter(x)  # counts the call
            return self._mixed_by_timm(x, target)
        if self._labels:
            target = self._dense(target)
        x, targets = grafter(x, target)
        return x, targets

    def _mixed_by_timm(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self._timm.mixup_enabled = self.mixup_enabled
        if len(x) % 2 == 0:
            return self._timm(x, target)
        mixed, targets = self._timm(x[:-1], target[:-1])
        return torch.cat([mixed, x[-1:]]), torch.cat([targets, self._dense(target[-1:])])

    def _dense(self, target: Tensor) -> Tensor:
        """The targets of unmixed images, smoothed as timm does."""
        options = self._timm
        return mixup.mixup_target(
            target, options.num_classes, 1.0, options.label_smoothing, **self._labels
        )
