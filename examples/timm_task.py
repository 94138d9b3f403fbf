"""Saliency Grafting in timm's training task, where images are normalised and on the device.

    task = GraftingTask(model, Mixup(layer="layer3", network=model, num_classes=1000))
    loss = task(images, targets)["loss"]

A task gets its batches from either of timm's loaders. Switch off the mixing in the loader, whose
collate function sees no device: ``--mixup 0 --cutmix 0``.
"""

from typing import Any

from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn

from sg_kernels.timm import Mixup


class GraftingTask(ClassificationTask):
    """Mixes each training batch; its checkpoints resume the draws of the grafts."""

    def __init__(self, model: nn.Module, mixup_fn: Mixup, **options: Any) -> None:
        super().__init__(model, SoftTargetCrossEntropy(), **options)
        self.mixup_fn = mixup_fn

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        return super().forward(*self.mixup_fn(input, target))

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else {"grafter": self.mixup_fn.grafter.state_dict()}

    def load_task_state(self, state: dict[str, Any] | None, *args: Any, **options: Any) -> None:
        if state:
            self.mixup_fn.grafter.load_state_dict(state["grafter"])
