"""Saliency Grafting in a plain PyTorch loop: mixed precision, gradient accumulation, averaged
weights, torch.compile, and a checkpoint that resumes exactly."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sg_kernels import SaliencyGraft

ACCUMULATED = 2


def train(
    model: nn.Module,
    loader: DataLoader,
    epochs: int,
    checkpoint: Path,
    *,
    layer: str,
    num_classes: int,
    backend: str = "inductor",
) -> nn.Module:
    """Trains ``model``, from ``checkpoint`` if there is one, and returns the average."""
    device = next(model.parameters()).device
    # Beside the model, not in it: the average includes buffers, and the mixer's are a seed and a
    # counter.
    mixer = SaliencyGraft(layer, network=model, num_classes=num_classes, prob=0.5, seed=0)
    mixer.to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type)
    parts = dict(model=model, average=average, mixer=mixer, optimizer=optimizer, scaler=scaler)
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        done = saved.pop("epochs")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    compiled = torch.compile(model, backend=backend)  # after the layer is tapped
    for epoch in range(done, epochs):
        torch.manual_seed(epoch)  # the order of the images, and what dropout drops
        for step, (images, targets) in enumerate(loader, 1):
            with torch.autocast(device.type, torch.float16):
                mixed, mixed_targets = mixer(images.to(device), targets.to(device))
                loss = F.cross_entropy(compiled(mixed), mixed_targets) / ACCUMULATED
            scaler.scale(loss).backward()
            if step % ACCUMULATED == 0 or step == len(loader):
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                average.update_parameters(model)
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "epochs": epoch + 1}, checkpoint)
    return average
