"""Knowledge distillation with grafts: a frozen teacher gives the saliency and soft targets."""

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

    The teacher runs once, on the clean images. Its soft targets are mixed as the labels are.

    Args:
        teacher: in ``.eval()``.
        mixer: taps a layer of the teacher, with ``mixed_pass=False``, as the teacher never sees the
            mixed images.
        temperature: of both softmaxes of the distillation.
        weight: of the distillation, in [0, 1].
    """
    with torch.no_grad():
        soft_targets = teacher(images).div(temperature).softmax(1)
    mixed, mixed_targets = mixer(images, targets)
    if mixer.result is not None:
        soft_targets = mix_targets(soft_targets, mixer.result.lam, mixer.result.index)
    logits = student(mixed)
    to_labels = F.cross_entropy(logits, mixed_targets)
    student_log = logits.div(temperature).log_softmax(1)
    to_teacher = F.kl_div(student_log, soft_targets, reduction="batchmean")
    return (1 - weight) * to_labels + weight * temperature**2 * to_teacher
