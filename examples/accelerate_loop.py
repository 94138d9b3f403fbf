"""Saliency Grafting with Accelerate: mixed precision, gradient accumulation, exact resume."""

from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sg_kernels import SaliencyGraft


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    layer: str,
    num_classes: int,
) -> tuple[nn.Module, Optimizer, DataLoader, SaliencyGraft]:
    """Prepares all but the mixer, which has nothing to train.

    The mixer makes its clean pass with the unwrapped network, which already has Accelerate's
    autocast; a pass without gradient needs no DistributedDataParallel.
    """
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    network = accelerator.unwrap_model(model)
    mixer = SaliencyGraft(layer, network=network, num_classes=num_classes, prob=0.5, seed=0)
    accelerator.register_for_checkpointing(mixer)  # for save_state and load_state
    return model, optimizer, loader, mixer.to(accelerator.device)


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    mixer: SaliencyGraft,
) -> None:
    model.train()
    for images, targets in loader:
        with accelerator.accumulate(model):
            mixed, mixed_targets = mixer(images, targets)
            loss = F.cross_entropy(model(mixed), mixed_targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
