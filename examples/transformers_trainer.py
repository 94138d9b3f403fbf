"""Saliency Grafting in the Trainer of Hugging Face transformers.

    mixer = SaliencyGraft("resnet.encoder.stages.2", network=model, num_classes=1000, prob=0.5)
    GraftTrainer(model, arguments, train_dataset=dataset, mixer=mixer).train()

Do not mix in the data collator: it has no network that could give the saliency.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from sg_kernels import SaliencyGraft


class GraftTrainer(Trainer):
    """Mixes the training batches, for networks that take ``pixel_values`` and return ``logits``.

    It computes the loss itself. A network that is given soft targets would take them for several
    labels per image and compute a binary cross-entropy.
    """

    loss_is_scaled_for_ga = False  # Trainer must divide the loss by the accumulated batches

    def __init__(self, *args: Any, mixer: SaliencyGraft, **more: Any) -> None:
        super().__init__(*args, **more)
        self.mixer = mixer.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        images, targets = inputs["pixel_values"], inputs["labels"]
        if model.training:
            self.mixer.set_epoch(int(self.state.epoch or 0))
            images, targets = self.mixer(images, targets)
        outputs = model(pixel_values=images)
        loss = F.cross_entropy(outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss

    # Saved with the states of all other generators; Trainer has no public hook for them.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            torch.save(self.mixer.state_dict(), Path(output_dir, "mixer.pt"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.mixer.load_state_dict(torch.load(Path(checkpoint, "mixer.pt")))
