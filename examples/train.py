"""Trains a torchvision network with Saliency Grafting, in one process or several.

    python examples/train.py --output runs/fashion            # Debian's Fashion-MNIST
    torchrun --nproc-per-node 4 examples/train.py --output runs/pets --data pets --size 224 --amp

Run again, it goes on from the last epoch in ``--output``, to the weights that it would have had
without the stop: each epoch has a seed of its own. On a GPU that takes ``--deterministic``.
"""

import argparse
import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from sg_kernels import SaliencyGraft

PROB = {"half": 0.5, "paper": 1.0, "none": 0.0}  # of grafting a batch, see docs/recipes.md


class Idx(Dataset):
    """MNIST's files, compressed or not: grey images as uint8 (3, H, W), and their classes."""

    def __init__(self, folder: Path, split: str, transform: v2.Transform) -> None:
        self.transform = transform
        self.images = self.read(folder, f"{split}-images-idx3-ubyte*")
        self.targets = self.read(folder, f"{split}-labels-idx1-ubyte*")

    @staticmethod
    def read(folder: Path, name: str) -> Tensor:
        (file,) = folder.glob(name)
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(data, ">i4", data[3], offset=4).tolist()
        return torch.tensor(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i].expand(3, -1, -1)), int(self.targets[i])


def datasets(folder: Path, size: int) -> tuple[Dataset, Dataset, int]:
    """The training and the validation set, and the number of classes."""
    colours = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    finish = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), colours])
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), finish])
        whole = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), finish])
        train, val = ImageFolder(folder / "train", crop), ImageFolder(folder / "val", whole)
        return train, val, len(train.classes)
    if any(folder.glob("train-images-idx3-ubyte*")):
        whole = v2.Compose([v2.Resize(size), finish])
        shift = v2.RandomCrop(size, padding=size // 8)
        train = Idx(folder, "train", v2.Compose([v2.RandomHorizontalFlip(), whole, shift]))
        return train, Idx(folder, "t10k", whole), int(train.targets.max()) + 1
    raise SystemExit(
        "--data must be a folder with train/ and val/, each with a folder of images per class, or "
        f"with MNIST's idx files (Debian's package is dataset-fashion-mnist); got {folder}"
    )


def network(name: str, classes: int, size: int) -> nn.Module:
    model = models.get_model(name, num_classes=classes)
    if isinstance(model, models.ResNet) and size < 64:  # as for CIFAR: the stem keeps the size
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def step(args, model, mixer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and how many rows are right."""
    clean = model(images) if args.recipe == "paper" else None  # else mixer makes a clean pass
    mixed, soft = mixer(images, targets)
    logits = model(mixed)
    losses = [F.cross_entropy(logits, soft)]
    if clean is not None:
        losses.append(F.cross_entropy(clean, targets))
    return sum(losses) / len(losses), correct(logits, soft)


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How many rows are right. A mixed row counts as its target weighs the predicted class."""
    chosen = logits.argmax(1)
    return (chosen == targets if targets.dim() == 1 else targets.gather(1, chosen[:, None])).sum()


def means(totals: list[Tensor], count: int) -> list[float]:
    """Per image, over all processes; ``count`` is of this one."""
    summed = torch.stack([*totals, totals[0].new_tensor(count)]).double()
    if dist.is_initialized():
        dist.all_reduce(summed)
    return (summed[:-1] / summed[-1]).tolist()


def train_epoch(args, model, mixer, optimizer, schedule, loader, device) -> list[float]:
    """Loss and accuracy, per image."""
    model.train()
    totals = [torch.zeros((), device=device) for _ in range(2)]
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss, right = step(args, model, mixer, images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        totals = [totals[0] + loss.detach() * len(images), totals[1] + right]
    return means(totals, len(loader) * args.batch)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    rights = (correct(model(images.to(device)), targets.to(device)) for images, targets in loader)
    return means([sum(rights, torch.zeros((), device=device))], len(loader.dataset))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    add("--output", type=Path, required=True, help="the folder of the checkpoint")
    add("--recipe", choices=PROB, default="half")
    add("--model", default="resnet18", help="of torchvision")
    add("--layer", default="layer3", help="of the model; its map must have several cells")
    add("--pass-scale", type=float, default=1.0, help="of the clean pass of half")
    add("--size", type=int, default=28, help="of the images, in pixels")
    add("--epochs", type=int, default=30)
    add("--stop-after", type=int, help="this epoch, though the schedule is for --epochs")
    add("--batch", type=int, default=128, help="images per process")
    add("--lr", type=float, default=0.1)
    add("--workers", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--amp", action="store_true", help="bfloat16 where autocast allows it")
    add("--compile", action="store_true")
    add("--deterministic", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(args.deterministic)
    train(args, device)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data, val_data, classes = datasets(args.data, args.size)
    sampler = DistributedSampler(data, world, rank, seed=args.seed)
    options = {"batch_size": args.batch, "num_workers": args.workers}
    loader = DataLoader(data, sampler=sampler, drop_last=True, **options)
    val_loader = DataLoader(Subset(val_data, range(rank, len(val_data), world)), **options)
    torch.manual_seed(args.seed)
    model = network(args.model, classes, args.size).to(device)
    options = {"num_classes": classes, "prob": PROB[args.recipe], "pass_scale": args.pass_scale}
    mixer = SaliencyGraft(args.layer, network=model, seed=args.seed, **options).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = OneCycleLR(optimizer, args.lr, epochs=args.epochs, steps_per_epoch=len(loader))
    parts = model, mixer, optimizer, schedule
    checkpoint, start = args.output / "checkpoint.pt", 0
    if checkpoint.exists():
        start, *states = torch.load(checkpoint, map_location=device)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    forward = torch.compile(wrapped) if args.compile else wrapped
    for epoch in range(start, min(args.epochs, args.stop_after or args.epochs)):
        torch.manual_seed(args.seed + 1000 * epoch + rank)
        sampler.set_epoch(epoch)
        batches = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=rank > 0)
        loss, trained = train_epoch(args, forward, mixer, optimizer, schedule, batches, device)
        for buffer in model.buffers() if world > 1 else ():
            dist.broadcast(buffer, 0)  # BatchNorm's statistics differ from process to process
        tested = validate(model, val_loader, device)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, training {trained:.4f}, test {tested:.4f}")
            args.output.mkdir(parents=True, exist_ok=True)
            new = checkpoint.with_suffix(".new")
            torch.save([epoch + 1, *(part.state_dict() for part in parts)], new)
            new.replace(checkpoint)  # a run that is killed leaves a whole file


if __name__ == "__main__":
    main()
