"""One training step of a ResNet: plain, with CutMix, with Saliency Grafting; what the mixing takes
of it. On CUDA in mixed precision, as torch.autocast has it: weights and images stay float32."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor, cuda, nn
from torch.nn import functional as F

import sg_kernels
from benchmarks.candidates import own_backends, timm_mixup
from benchmarks.measure import reason, synchronize, tqdm
from benchmarks.results import Row, absent, row_of

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck with the 3x3 in its middle."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.body = nn.Sequential(
            *(
                [*conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU()]
                if bottleneck
                else [*conv(inputs, width, 3, stride), nn.ReLU()]
            ),
            *(conv(width, outputs, 1) if bottleneck else conv(width, outputs, 3)),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else conv(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class ResNet(nn.Module):
    """He et al., 2016; with 32x32 images no stem, as usual on CIFAR."""

    def __init__(
        self, depths: tuple[int, ...], width: int, bottleneck: bool, stem: bool, num_classes: int
    ) -> None:
        super().__init__()
        first = [*conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        layers: list[nn.Module] = first if stem else [*conv(3, width, 3), nn.ReLU()]
        channels = width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                layers.append(Block(channels, width << stage, stride, bottleneck))
                channels = (width << stage) * (4 if bottleneck else 1)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def setting(device: str, quick: bool) -> tuple[str, str, nn.Module, Tensor, Tensor]:
    """The name, the shape, the network, images and labels."""
    memory_format, stem = torch.contiguous_format, False
    if quick:
        batch, size, classes = 4, 32, 10
        name, model = "tiny ResNet", ResNet((1, 1), 8, True, False, classes)
    elif device == "cuda":
        batch, size, classes, stem = 256, 224, 1000, True
        name, model = "ResNet-50", ResNet((3, 4, 6, 3), 64, True, stem, classes)
        memory_format = torch.channels_last
    else:
        batch, size, classes = 32, 32, 100
        name, model = "ResNet-18", ResNet((2, 2, 2, 2), 64, False, stem, classes)
    model = model.to(device=device, memory_format=memory_format)
    images = torch.rand(batch, 3, size, size, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    kind = " channels_last, autocast to bfloat16" if device == "cuda" else ""
    shape = f"{batch}x3x{size}x{size} float32{kind}"
    return name, shape, model, images.contiguous(memory_format=memory_format), labels


class Laps:
    """Times between marks: of the host, or of the device's stream while it is kept busy."""

    def __init__(self, device: str, ballast: Tensor) -> None:
        self.device = device
        self.marks: list[int | cuda.Event] = []
        if device == "cuda":
            for _ in range(4):  # for as long the host can run ahead
                ballast.neg_()

    def mark(self) -> None:
        if self.device == "cuda":
            event = cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(perf_counter_ns())

    def read(self) -> list[float]:
        """Nanoseconds from each mark to the next."""
        synchronize()
        if self.device == "cuda":
            return [before.elapsed_time(after) * 1e6 for before, after in pairwise(self.marks)]
        return [float(after - before) for before, after in pairwise(self.marks)]


class Grafting:
    """Saliency Grafting of the images that the network has just seen."""

    def __init__(self, model: ResNet, backend: str, num_classes: int) -> None:
        self.model = model
        graft = sg_kernels.SaliencyGraft(model.features, num_classes=num_classes, backend=backend)
        self.graft = graft.to(model.head.weight.device)

    def look(self, images: Tensor) -> None:
        with torch.no_grad():
            self.model(images)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.graft(images, labels)


def measure_steps(device: str, quick: bool, rounds: int) -> Iterator[list[Row]]:
    case, shape, model, images, labels = setting(device, quick)
    classes = model.head.out_features
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    mixes: dict[str, Mix | None] = {"plain": None}
    rows, cutmix = [], "CutMix (timm, batch)"
    try:
        timm = timm_mixup().Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=classes)
        mixes[cutmix] = lambda x, y: timm(x.clone(), y)
    except Exception as error:
        rows.append(absent(case, shape, cutmix, "training step", reason(error)))
    for backend in own_backends(device):
        mixes[f"Saliency Grafting ({backend})"] = Grafting(model, backend, classes)

    ballast = torch.ones(1 << 28 if device == "cuda" else 1, device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step(mix: Mix | None) -> list[float]:
        laps = Laps(device, ballast)
        laps.mark()
        if isinstance(mix, Grafting):
            with autocast():
                mix.look(images)
        laps.mark()
        mixed, targets = (images, labels) if mix is None else mix(images, labels)
        laps.mark()
        with autocast():
            loss = F.cross_entropy(model(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        laps.mark()
        return laps.read()

    for name in list(mixes):
        try:
            step(mixes[name])
        except Exception as error:
            rows.append(absent(case, shape, name, "training step", reason(error)))
            del mixes[name]
    laps = {name: np.empty((rounds, 3)) for name in mixes}
    orders = np.random.default_rng(0)
    for i in tqdm(range(rounds), desc="training step", leave=False):
        for name in orders.permutation(list(mixes)).tolist():
            laps[name][i] = step(mixes[name])
    for name, times in laps.items():
        whole, (clean, mixing, _) = times.sum(1), times.T
        rows.append(row_of(case, shape, name, "training step", whole / 1e6, "ms"))
        if name == "plain":
            continue
        share = 100 * mixing / whole
        rows.append(row_of(case, shape, name, "mixing", mixing / 1e6, "ms"))
        rows.append(row_of(case, shape, name, "mixing, share of the step", share, "%"))
        if isinstance(mixes[name], Grafting):
            share = 100 * clean / whole
            rows.append(row_of(case, shape, name, "clean forward, share of the step", share, "%"))
        if "plain" in laps:
            over = whole / laps["plain"].sum(1)
            rows.append(row_of(case, shape, name, "step / plain", over, "x"))
    yield rows
