"""Knowledge distillation: a frozen teacher gives the saliency, and soft targets to mix."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sg_kernels import SaliencyGraft, mix_targets


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    mixer: SaliencyGraft,
    images: Tensor,
    targets: Tensor,
    temperature: float = 4.0,
    weight: float = 0.5,
) -> Tensor:
    """The student's loss on a grafted batch: to the mixed labels, and to the teacher's.

    The teacher runs once, on the clean images. What it says of them is mixed as the labels are.

    Args:
        teacher: in ``.eval()``.
        mixer: taps a layer of the teacher, with ``mixed_pass=False``, as the teacher never sees the
            mixed images.
        temperature: of both softmaxes of the distillation.
        weight: of the distillation, in [0, 1].
    """
    with torch.no_grad():
        said = teacher(images).div(temperature).softmax(1)
    mixed, mixed_targets = mixer(images, targets)
    if mixer.result is not None:
        said = mix_targets(said, mixer.result.lam, mixer.result.index)
    logits = student(mixed)
    to_teacher = F.kl_div(logits.div(temperature).log_softmax(1), said, reduction="batchmean")
    return (1 - weight) * F.cross_entropy(
        logits, mixed_targets
    ) + weight * temperature**2 * to_teacher
