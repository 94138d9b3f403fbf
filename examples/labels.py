"""CutMix, Attentive CutMix and TransMix-like labels with the functions of sg_kernels.

For masks or labels that differ from Saliency Grafting's; docs/labels.md explains them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sg_kernels import GraftResult, label_ratio, mix_targets, saliency_graft


def outside_boxes(area: Tensor, side: int) -> Tensor:
    """Masks that are False in a random square of about ``area``, cut at the border.

    area is (rows,), in [0, 1]; the masks are bool (rows, side, side).
    """
    half = side * area[:, None].sqrt() / 2
    centers = side * torch.rand(2, len(area), 1, device=area.device)
    down, across = (torch.arange(side, device=area.device) + 0.5 - centers).abs() < half
    return ~(down[:, :, None] & across[:, None, :])


def cutmix(
    images: Tensor, targets: Tensor, num_classes: int, features: Tensor | None = None
) -> GraftResult:
    """CutMix (Yun et al., ICCV 2019); with ``features`` the labels are mixed by saliency."""
    mask = outside_boxes(torch.rand(len(images), device=images.device), side=16)
    label = "area" if features is None else "saliency"
    return saliency_graft(
        images, features, mask=mask, label=label, targets=targets, num_classes=num_classes
    )


def attentive_cutmix(
    images: Tensor, targets: Tensor, num_classes: int, attention: Tensor, k: int = 6
) -> GraftResult:
    """Attentive CutMix (Walawalkar et al., ICASSP 2020): the k most attentive cells, by area."""
    options = {"selection": "topk", "k": k, "label": "area"}
    return saliency_graft(
        images, saliency=attention, targets=targets, num_classes=num_classes, **options
    )


def transmix(
    images: Tensor, targets: Tensor, num_classes: int, attend: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """TransMix (Chen et al., CVPR 2022): CutMix's images, labels by attention to the mixed image.

    ``attend`` gives the attention of a batch, (B, h, w). Returns mixed images and targets.
    """
    result = cutmix(images, targets, num_classes)
    itself = torch.arange(len(images), device=images.device)
    lam = label_ratio(attend(result.images), result.mask, itself)
    return result.images, mix_targets(targets, lam, result.index, num_classes)
