"""Saliency Grafting (Park et al., AAAI 2022) as a fused operator for PyTorch."""

from sg_kernels.backends import available_backends, unavailable_backends
from sg_kernels.criterion import mix_criterion
from sg_kernels.functional import (
    Shares,
    channel_saliency,
    graft,
    label_ratio,
    mix_targets,
    saliency_graft,
)
from sg_kernels.nn import SaliencyGraft
from sg_kernels.picture import show
from sg_kernels.pipeline import GraftResult

__version__ = "0.1.0"

__all__ = [
    "GraftResult",
    "SaliencyGraft",
    "Shares",
    "available_backends",
    "channel_saliency",
    "graft",
    "label_ratio",
    "mix_criterion",
    "mix_targets",
    "saliency_graft",
    "show",
    "unavailable_backends",
]
