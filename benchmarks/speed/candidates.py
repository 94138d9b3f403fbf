"""What is timed side by side. A candidate that cannot run here is absent, with the reason."""

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import sg_kernels
from benchmarks import rivals
from benchmarks.cases import Case, Data, features_bytes, fill, floor_bytes
from sg_kernels import backends, reference, rng

Call = Callable[[], Any]


class Candidate(NamedTuple):
    name: str
    build: Callable[[Case, Data], Call]
    """Raises where it cannot run."""
    traffic: Callable[[Case], int] | None = None
    """The floor of its bytes, where it does the work that the floor is counted for."""
    capturable: bool = True
    """False where it draws on the host: a graph would replay one draw, as one box of CutMix."""
    compiled: bool = False
    """By torch.compile."""


COPY = "copy_ of the same bytes"


def own_backends(device: str) -> list[str]:
    """The compiled backends that take tensors of the device, fastest first."""
    names = [name for name in backends.DEVICES if name != "reference"]
    return [name for name in names if device in backends.DEVICES[name]]


def ours(backend: str) -> list[Candidate]:
    """One backend: fresh outputs, a given output, and with labels mixed as the peers mix theirs."""

    def call(case: Case, data: Data, **more: Any) -> Call:
        return partial(
            sg_kernels.saliency_graft,
            data.images,
            data.features,
            seed=data.seed,
            backend=backend,
            **case.options,
            **more,
        )

    def into_out(case: Case, data: Data) -> Call:
        return call(case, data, out=empty_rows(case, data))

    def with_targets(case: Case, data: Data) -> Call:
        return call(case, data, targets=data.labels, num_classes=case.num_classes)

    return [
        Candidate(backend, call, floor_bytes),
        Candidate(f"{backend}, out=", into_out, floor_bytes),
        Candidate(f"{backend}, targets", with_targets, floor_bytes),
    ]


def stages(backend: str) -> list[Candidate]:
    """Its two halves alone."""

    def graft(case: Case, data: Data) -> Call:
        saliency = sg_kernels.channel_saliency(data.features, backend=backend)
        return partial(
            sg_kernels.saliency_graft,
            data.images,
            saliency=saliency,
            seed=data.seed,
            out=empty_rows(case, data),
            backend=backend,
        )

    def saliency(case: Case, data: Data) -> Call:
        return partial(sg_kernels.channel_saliency, data.features, backend=backend)

    return [
        Candidate(f"{backend}, out=, map given", graft, images_bytes),
        Candidate(f"{backend} channel_saliency", saliency, features_bytes),
    ]


def images_bytes(case: Case) -> int:
    return floor_bytes(case) - features_bytes(case)


def empty_rows(case: Case, data: Data) -> Tensor:
    # Filled, so that its pages exist before the clock starts.
    return fill(reference.empty_rows(data.images, case.augmentations * len(data.images)))


@lru_cache
def plain(case: Case, device: str, mode: str | None) -> Callable[..., Any]:
    """The reference on bare tensors: eager for ``mode`` None, else compiled, once for a case."""
    quantiles = rng.beta_quantiles(1.0).to(device)
    h, w = case.grid_size or case.map_size
    selection = ((h, w), 0.2, "max", 1 / (h * w), None, "l1", 1.0, case.augmentations, False)

    def call(images: Tensor, features: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        if case.token_grid is not None:
            tokens = features[:, case.prefix_tokens :]
            features = tokens.transpose(1, 2).unflatten(2, case.token_grid)
        draws = (None, None, None, seed, None, 0, quantiles, 0.0)
        return reference.saliency_graft(images, features, *draws, *selection, 0, 0.0)

    if mode is None:
        return call
    # Static, as a training run is; another shape must not make this one dynamic.
    if mode == "quick":
        return torch.compile(call, dynamic=False, backend="eager")
    return torch.compile(call, dynamic=False, mode=mode)


def build_plain(case: Case, data: Data, mode: str | None = None) -> Call:
    function = plain(case, data.images.device.type, mode)

    def call() -> Any:
        seed = data.seed
        if seed is None:  # from the host's, the reference would wait, and compile once more
            seed = torch.randint(2**62, (1,), device=data.images.device)
        return function(data.images, data.features, seed)

    return call


EAGER = Candidate("eager reference", build_plain, floor_bytes)


def compiled(device: str, quick: bool) -> list[Candidate]:
    # With graphs of its own a compiled function could not be captured in ours.
    tuned = "max-autotune-no-cudagraphs" if device == "cuda" else "max-autotune"
    modes = {"compiled reference": "default", "compiled reference, max-autotune": tuned}
    if quick:  # traced and not compiled, which takes a second instead of ten
        modes = {"compiled reference": "quick"}
    return [
        Candidate(name, partial(build_plain, mode=mode), floor_bytes, compiled=True)
        for name, mode in modes.items()
    ]


def copies() -> list[Candidate]:
    """The same bytes moved by copy_: what the machine gives."""

    def same_bytes(case: Case, data: Data) -> Call:
        images, features = in_storage_order(data.images), in_storage_order(data.features)
        # Reading and writing half of the floor's bytes moves all of them.
        sources = [images, features[: features_bytes(case) // data.features.itemsize // 2]]
        sources += [images] * ((case.augmentations - 1) // 2)
        if case.augmentations % 2 == 0:
            sources.append(images[: images.numel() // 2])
        pairs = [(fill(torch.empty_like(source)), source) for source in sources]

        def call() -> None:
            for destination, source in pairs:
                destination.copy_(source)

        return call

    def images(case: Case, data: Data) -> Call:
        return partial(fill(torch.empty_like(data.images)).copy_, data.images)

    return [
        Candidate(COPY, same_bytes, floor_bytes),
        Candidate("copy_ of the images", images, images_bytes),
        Candidate("clone of the images", lambda case, data: data.images.clone, images_bytes),
        Candidate("sum of the features", lambda case, data: data.features.sum, features_bytes),
    ]


def in_storage_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def two_launches() -> Candidate:
    """Two kernels with next to nothing to do: what launching costs the device."""

    def build(case: Case, data: Data) -> Call:
        element = torch.rand(1, device=data.images.device)

        def call() -> None:
            element.neg_()
            element.neg_()

        return call

    return Candidate("two launches of one element", build)


def timm_mixup() -> ModuleType:
    """timm/data/mixup.py by itself: the package around it needs a working torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'timm'")
    path = Path(package.submodule_search_locations[0], "data", "mixup.py")
    spec = importlib.util.spec_from_file_location("timm_mixup", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"timm has no {path.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timm(name: str, mode: str) -> Candidate:
    def build(case: Case, data: Data) -> Call:
        alphas = (1.0, 0.0) if name == "Mixup" else (0.0, 1.0)
        mixup = timm_mixup().Mixup(
            *alphas, mode=mode, label_smoothing=0.0, num_classes=case.num_classes
        )
        images = data.images.clone()  # the others need them as they are
        return partial(mixup, images, data.labels)

    return Candidate(f"timm {name}, {mode} (in place)", build, capturable=False)


def torchvision(name: str) -> Candidate:
    def build(case: Case, data: Data) -> Call:
        if torch.version.cuda is None:
            # There are wheels for CUDA alone, whose own operators do not load then. This module
            # describes them, and all that CutMix and MixUp call are PyTorch's.
            described = "torchvision._meta_registrations"
            sys.modules.setdefault(described, ModuleType(described))
        from torchvision.transforms import v2

        return partial(getattr(v2, name)(num_classes=case.num_classes), data.images, data.labels)

    return Candidate(f"torchvision {name}", build, capturable=False)


def kornia(name: str) -> Candidate:
    def build(case: Case, data: Data) -> Call:
        from kornia import augmentation

        mix = getattr(augmentation, name)(p=1.0, data_keys=["input", "class"])
        return partial(mix, data.images, data.labels)

    return Candidate(f"kornia {name}", build, capturable=False)


def attentive_cutmix(case: Case, data: Data) -> Call:
    args = data.images.clone(), data.features, data.labels, case.num_classes
    return partial(rivals.attentive_cutmix, *args)


def saliencymix(case: Case, data: Data, by_opencv: bool) -> Call:
    saliency = rivals.opencv_saliency if by_opencv else rivals.fine_grained_saliency
    args = data.images.clone(), data.labels, case.num_classes
    return partial(rivals.saliencymix, *args, saliency)


def saliencymixes() -> list[Candidate]:
    """By OpenCV; where that has no such function, also by what stands in for it."""
    name, build = "SaliencyMix ({}, adapter, in place)", partial(saliencymix, by_opencv=True)
    found = [Candidate(name.format("OpenCV"), build, capturable=False)]
    try:
        rivals.opencv_saliency(np.zeros((8, 8, 3), np.uint8))
    except Exception:
        build = partial(saliencymix, by_opencv=False)
        found.append(Candidate(name.format("no OpenCV"), build, capturable=False))
    return found


def puzzlemix(case: Case, data: Data) -> Call:
    saliency = reference.channel_saliency(data.features)
    return partial(rivals.puzzlemix, data.images, saliency, data.labels, case.num_classes)


def peers() -> list[Candidate]:
    """Mixup libraries, then the adapters of rivals.py. All mix the labels too."""
    return [
        timm("CutMix", "batch"),
        timm("CutMix", "elem"),
        timm("Mixup", "batch"),
        timm("Mixup", "elem"),
        torchvision("CutMix"),
        torchvision("MixUp"),
        kornia("RandomCutMixV2"),
        kornia("RandomMixUpV2"),
        Candidate("Attentive CutMix (adapter, in place)", attentive_cutmix, capturable=False),
        *saliencymixes(),
        Candidate("PuzzleMix (gco, adapter)", puzzlemix, capturable=False),
    ]


def everything(device: str) -> list[Candidate]:
    """All but what is compiled."""
    own = own_backends(device)
    return [
        *(candidate for backend in own for candidate in [*ours(backend), *stages(backend)]),
        EAGER,
        *copies(),
        *([two_launches()] if device == "cuda" else []),
        *peers(),
    ]
