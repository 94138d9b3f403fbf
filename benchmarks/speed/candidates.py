"""What is timed side by side. A candidate that cannot run here is absent, with the reason."""

from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import sg_kernels
from benchmarks import rivals
from benchmarks.rivals import import_library
from benchmarks.speed.cases import MEAN, STD, Case, Data, features_bytes, fill
from sg_kernels import backends, call, rng
from sg_kernels.backends import reference

Run = Callable[[], Any]


class Candidate(NamedTuple):
    name: str
    build: Callable[[Case, Data], Run]
    """Raises where it cannot run."""
    whole: bool = False
    """Whether it does, or moves the bytes of, the whole work whose floor is counted."""
    against: tuple[str, ...] = ()
    """Which of our calls do the same work, by what follows the backend's name: its time is divided
    by theirs."""
    capturable: bool = True
    """False where it draws on the host: a CUDA graph would repeat one draw, as one CutMix box."""
    compiled: bool = False
    """By torch.compile."""


COPY, COMPILED = "copy_ of the same bytes", "compiled reference"
STANDARDIZING, FIRST = "standardising alone", "standardising, then "
IN_TURN, BOTH_OVERLAP = "triton, launches in turn", "triton, both launches overlap"
TARGETS, MAP_GIVEN, SALIENCY = ", targets", ", out=, map given", " channel_saliency"
GRAFT = " graft"


def own_backends(device: str) -> list[str]:
    """The compiled backends that take tensors of the device, fastest first."""
    names = [name for name in backends.DEVICES if name != "reference"]
    return [name for name in names if device in backends.DEVICES[name]]


def ours(backend: str) -> list[Candidate]:
    """One backend: fresh outputs, a given output, and with the labels mixed as the peers do."""

    def graft(case: Case, data: Data, **more: Any) -> Run:
        options = {"seed": data.seed, "backend": backend, **case.options, **more}
        return partial(sg_kernels.saliency_graft, data.images, data.features, **options)

    def into_out(case: Case, data: Data) -> Run:
        return graft(case, data, out=empty_rows(case, data))

    def with_targets(case: Case, data: Data) -> Run:
        return graft(case, data, targets=data.labels, num_classes=case.num_classes)

    return [
        Candidate(backend, graft, whole=True, against=("",)),
        Candidate(f"{backend}, out=", into_out, whole=True),
        Candidate(backend + TARGETS, with_targets, whole=True),
    ]


def in_turn(device: str) -> list[Candidate]:
    """Triton, whose launches wait for the end of the kernel before: SG_KERNELS_OVERLAP=0."""
    return _overlapping(device, IN_TURN, 0)


def both_overlap(device: str) -> list[Candidate]:
    """Triton, neither of whose launches does: SG_KERNELS_OVERLAP=2."""
    return _overlapping(device, BOTH_OVERLAP, 2)


def _overlapping(device: str, name: str, launches: int) -> list[Candidate]:
    def build(case: Case, data: Data) -> Run:
        from sg_kernels.backends.triton import launch

        return replacing(launch, "OVERLAP", launches, ours("triton")[0].build(case, data))

    if "triton" not in own_backends(device):
        return []
    return [Candidate(name, build, whole=True, against=("",))]


def replacing(module: ModuleType, name: str, other: Any, run: Run) -> Run:
    """Calls with a name of a module bound to another object."""

    def replaced() -> Any:
        own = getattr(module, name)
        setattr(module, name, other)
        try:
            return run()
        finally:
            setattr(module, name, own)

    return replaced


def tiles(device: str) -> list[Candidate]:
    """Triton's graft of a given mask: on flat tiles, which are its own, and on three axes."""

    def flat(case: Case, data: Data) -> Run:
        mask = torch.rand(case.images[0], *case.map_size, device=device) < 0.5
        index, out = torch.randperm(case.images[0], device=device), empty_rows(case, data)
        return partial(sg_kernels.graft, data.images, mask, index, out=out, backend="triton")

    def three_axes(case: Case, data: Data) -> Run:
        from benchmarks.speed.tiles import graft_kernel
        from sg_kernels.backends.triton import operators

        return replacing(operators, "graft_kernel", graft_kernel, flat(case, data))

    if "triton" not in own_backends(device):
        return []
    return [
        Candidate("triton" + GRAFT, flat),
        Candidate("triton graft, tiles of three axes", three_axes, against=(GRAFT,)),
    ]


def stages(backend: str) -> list[Candidate]:
    """Its two halves alone."""

    def graft(case: Case, data: Data) -> Run:
        saliency = sg_kernels.channel_saliency(data.features, backend=backend)
        given = {"saliency": saliency, "seed": data.seed, "out": empty_rows(case, data)}
        return partial(sg_kernels.saliency_graft, data.images, **given, backend=backend)

    def saliency(case: Case, data: Data) -> Run:
        return partial(sg_kernels.channel_saliency, data.features, backend=backend)

    return [Candidate(backend + MAP_GIVEN, graft), Candidate(backend + SALIENCY, saliency)]


def empty_rows(case: Case, data: Data) -> Tensor:
    # Filled, so that its pages exist before the clock starts.
    return fill(reference.empty_rows(data.images, case.augmentations * len(data.images)))


def operator_call(case: Case, images: Tensor, features: Tensor, seed: Tensor) -> call.Call:
    """What saliency_graft gives to the operator for its default options."""
    h, w = case.grid_size or case.map_size
    return call.Call(
        images=images,
        features=features,
        seed=seed,
        grid_size=(h, w),
        temperature=0.2,
        threshold=1 / (h * w),
        normalize=call.NORMALIZE.index("max"),
        norm=call.NORM.index("l1"),
        quantiles=rng.beta_quantiles(1.0).to(images.device),
        augmentations=case.augmentations,
    )


@lru_cache
def plain(case: Case, device: str, mode: str | None) -> Callable[..., Any]:
    """The reference on bare tensors: eager for ``mode`` None, else compiled, once per case."""
    blank = torch.empty(0, device=device)
    common = operator_call(case, blank, blank, blank)

    def graft(images: Tensor, features: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        given = {"images": images, "features": features, "seed": seed}
        return reference.saliency_graft(common._replace(**given))

    if mode is None:
        return graft
    # Static, as in a training run: another case must not make this one's shapes dynamic.
    if mode == "quick":
        return torch.compile(graft, dynamic=False, backend="eager")
    return torch.compile(graft, dynamic=False, mode=mode)


def build_plain(case: Case, data: Data, mode: str | None = None) -> Run:
    function = plain(case, data.images.device.type, mode)

    def run() -> Any:
        seed = data.seed
        if seed is None:  # drawn on the device: from the host's the reference would wait
            seed = torch.randint(2**62, (1,), device=data.images.device)
        return function(data.images, data.features, seed)

    return run


EAGER = Candidate("eager reference", build_plain, whole=True, against=("",))


def compiled(device: str, quick: bool) -> list[Candidate]:
    # A function with CUDA graphs of its own could not be captured in ours.
    tuned = "max-autotune-no-cudagraphs" if device == "cuda" else "max-autotune"
    modes = {COMPILED: "default", f"{COMPILED}, max-autotune": tuned}
    if quick:  # traced but not compiled: a second instead of ten
        modes = {COMPILED: "quick"}
    return [
        EAGER._replace(name=name, build=partial(build_plain, mode=mode), compiled=True)
        for name, mode in modes.items()
    ]


def copies() -> list[Candidate]:
    """What the machine can do: the floor's bytes moved by copy_, and the parts of that work."""

    def same_bytes(case: Case, data: Data) -> Run:
        images, features = in_storage_order(data.images), in_storage_order(data.features)
        # A copy reads and writes, so it moves all of the floor's bytes by copying half of them.
        sources = [images, features[: features_bytes(case) // data.features.itemsize // 2]]
        sources += [images] * ((case.augmentations - 1) // 2)
        if case.augmentations % 2 == 0:
            sources.append(images[: images.numel() // 2])
        pairs = [(fill(torch.empty_like(source)), source) for source in sources]
        return lambda: [destination.copy_(source) for destination, source in pairs]

    def images(case: Case, data: Data) -> Run:
        return partial(fill(torch.empty_like(data.images)).copy_, data.images)

    return [
        Candidate(COPY, same_bytes, whole=True, against=(", out=", "")),
        Candidate("copy_ of the images", images, against=(MAP_GIVEN,)),
        Candidate("clone of the images", lambda case, data: data.images.clone, against=("",)),
        Candidate("sum of the features", lambda case, data: data.features.sum, against=(SALIENCY,)),
    ]


def in_storage_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def standardizing() -> Candidate:
    """What a loader does to uint8 before a network sees it, in plain PyTorch as timm's does."""

    def build(case: Case, data: Data) -> Run:
        dtype = case.standardized or case.dtype
        mean, std = (torch.tensor(each, device=data.images.device) for each in (MEAN, STD))
        mean, std = (each.to(dtype).view(-1, 1, 1) for each in (mean, std))
        return lambda: data.images.to(dtype).sub_(mean).div_(std)

    return Candidate(STANDARDIZING, build, against=("",))


def standardizing_first(backend: str) -> Candidate:
    """Standardising in one kernel of PyTorch, then grafting what comes out."""

    def build(case: Case, data: Data) -> Run:
        dtype = case.standardized or case.dtype
        mean, std = (torch.tensor(each, device=data.images.device) for each in (MEAN, STD))
        shift, scale = (each.to(dtype).view(-1, 1, 1) for each in (-mean / std, 1 / std))
        options = {**case.options, "standardize": None, "dtype": None}
        graft = partial(sg_kernels.saliency_graft, seed=data.seed, backend=backend, **options)
        return lambda: graft(torch.addcmul(shift, data.images, scale), data.features)

    return Candidate(FIRST + backend, build, against=("",))


def two_launches() -> Candidate:
    """Two kernels with next to nothing to do: what launching costs the device."""

    def build(case: Case, data: Data) -> Run:
        element = torch.rand(1, device=data.images.device)
        return lambda: element.neg_().neg_()

    return Candidate("two launches of one element", build, against=("",))


def timm(name: str, mode: str, case: Case, data: Data) -> Run:
    alphas = (1.0, 0.0) if name == "Mixup" else (0.0, 1.0)
    options = {"mode": mode, "label_smoothing": 0.0, "num_classes": case.num_classes}
    mixup = import_library("timm.data").Mixup(*alphas, **options)
    return partial(mixup, data.images.clone(), data.labels)  # in place: the others need theirs


def torchvision(name: str, case: Case, data: Data) -> Run:
    transforms = import_library("torchvision.transforms.v2")
    mix = getattr(transforms, name)(num_classes=case.num_classes)
    return partial(mix, data.images, data.labels)


def kornia(name: str, case: Case, data: Data) -> Run:
    from kornia import augmentation

    mix = getattr(augmentation, name)(p=1.0, data_keys=["input", "class"])
    return partial(mix, data.images, data.labels)


def attentive_cutmix(case: Case, data: Data) -> Run:
    given = data.images.clone(), data.features, data.labels, case.num_classes
    return partial(rivals.attentive_cutmix, *given)


def saliencymix(saliency: Callable[[np.ndarray], np.ndarray], case: Case, data: Data) -> Run:
    given = data.images.clone(), data.labels, case.num_classes, saliency
    return partial(rivals.saliencymix, *given)


def puzzlemix(case: Case, data: Data) -> Run:
    saliency = reference.channel_saliency(data.features)
    return partial(rivals.puzzlemix, data.images, saliency, data.labels, case.num_classes)


def peers() -> list[Candidate]:
    """Other mixups, which mix the labels too: of libraries, then the adapters of rivals.py."""
    builds: dict[str, Callable[[Case, Data], Run]] = {
        "timm CutMix, batch (in place)": partial(timm, "CutMix", "batch"),
        "timm CutMix, elem (in place)": partial(timm, "CutMix", "elem"),
        "timm Mixup, batch (in place)": partial(timm, "Mixup", "batch"),
        "timm Mixup, elem (in place)": partial(timm, "Mixup", "elem"),
        "torchvision CutMix": partial(torchvision, "CutMix"),
        "torchvision MixUp": partial(torchvision, "MixUp"),
        "kornia RandomCutMixV2": partial(kornia, "RandomCutMixV2"),
        "kornia RandomMixUpV2": partial(kornia, "RandomMixUpV2"),
        "Attentive CutMix (adapter, in place)": attentive_cutmix,
        "SaliencyMix (OpenCV, adapter, in place)": partial(saliencymix, rivals.opencv_saliency),
        "PuzzleMix (gco, adapter)": puzzlemix,
    }
    try:
        rivals.opencv_saliency(np.zeros((8, 8, 3), np.uint8))
    except Exception:  # OpenCV, or its contrib modules, are missing
        replaced = partial(saliencymix, rivals.fine_grained_saliency)
        builds["SaliencyMix (no OpenCV, adapter, in place)"] = replaced
    return [
        Candidate(name, build, against=(TARGETS,), capturable=False)
        for name, build in builds.items()
    ]


def everything(device: str) -> list[Candidate]:
    """All but what is compiled."""
    own = [each for name in own_backends(device) for each in (*ours(name), *stages(name))]
    launches = [two_launches()] if device == "cuda" else []
    variants = [*in_turn(device), *both_overlap(device), *tiles(device)]
    return [*own, *variants, EAGER, *copies(), *launches, *peers()]
