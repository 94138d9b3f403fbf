"""Saliency Grafting as a callback of Lightning.

    mixer = SaliencyGraft("net.layer3", network=module, num_classes=1000, prob=0.5, seed=0)
    Trainer(callbacks=[Graft(mixer)]).fit(module, loader)

``training_step`` then gets mixed images and soft targets, (B, num_classes).
"""

from typing import Any

import lightning

from sg_kernels import SaliencyGraft


class Graft(lightning.Callback):
    """Grafts every training batch after it has come to the device.

    A callback cannot return another batch, but ``training_step`` gets the list that its hook saw.
    So the batch must be a list [images, targets, ...], as PyTorch's own collate_fn makes it. If
    yours is of another kind, call the mixer in ``on_after_batch_transfer`` of the LightningModule
    instead, if ``self.trainer.training``.

    The mixer is no part of the LightningModule, so Lightning's WeightAveraging leaves its seed
    alone, and checkpoints of the network do not contain it. The callback's own state does.
    """

    def __init__(self, mixer: SaliencyGraft) -> None:
        self.mixer = mixer

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.mixer.to(module.device)

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        self.mixer.set_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(batch, list):
            raise TypeError(f"batch must be a list; got {type(batch).__name__}")
        with trainer.precision_plugin.forward_context():  # the clean pass autocasts too
            batch[:2] = self.mixer(*batch[:2])

    def state_dict(self) -> dict[str, Any]:
        return self.mixer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixer.load_state_dict(state_dict)
