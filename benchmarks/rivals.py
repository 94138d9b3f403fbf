"""Other mixups: how their libraries are imported, and those that no library computes.

The latter follow the papers and the authors' code: image by image where the authors do so, on the
host where they do, in place where they do. Each takes what a training loop has, images (B, C, H, W)
and class ids (B,), and returns mixed images and soft targets (B, num_classes).
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Mixed = tuple[Tensor, Tensor]


def import_library(name: str) -> ModuleType:
    """timm or torchvision, beside a PyTorch without CUDA too.

    torchvision's own operators, which timm imports, may be built for CUDA alone and then do not
    load. The module replaced here describes them and would raise. Nothing we use calls them.
    """
    if torch.version.cuda is None:
        described = "torchvision._meta_registrations"
        sys.modules.setdefault(described, ModuleType(described))
    return importlib.import_module(name)


def mix_labels(labels: Tensor, other: Tensor, lam: float | Tensor, num_classes: int) -> Tensor:
    hot = F.one_hot(labels, num_classes).float()
    return lam * hot + (1 - lam) * hot[other]


def attentive_cutmix(
    images: Tensor, features: Tensor, labels: Tensor, num_classes: int, patches: int = 6
) -> Mixed:
    """Walawalkar et al., ICASSP 2020: pastes the most attended cells of another image, in place.

    The attention is that of ``features``; the authors run a second, pretrained network for it.
    """
    batch, _, h, w = features.shape
    height, width = images.shape[2] // h, images.shape[3] // w
    other = torch.randperm(batch, device=images.device)
    attention = features.abs().mean(1).flatten(1)
    chosen = attention[other].topk(min(patches, h * w), dim=1).indices.tolist()
    # Every patch is cut out before any is pasted: an image may both give and take.
    pasted = []
    for row, (source, cells) in enumerate(zip(other.tolist(), chosen)):
        for cell in cells:
            y, x = cell // w * height, cell % w * width
            box = slice(None), slice(y, y + height), slice(x, x + width)
            pasted.append((row, box, images[source][box].clone()))
    for row, box, patch in pasted:
        images[row][box] = patch
    lam = 1 - len(chosen[0]) / (h * w)
    return images, mix_labels(labels, other, lam, num_classes)


def fine_grained_saliency(image: np.ndarray) -> np.ndarray:
    """Montabone & Soto, 2010: grey values against the mean of windows around them, (H, W).

    Replaces OpenCV's function of that name where its contrib modules are missing.
    """
    grey = image.astype(np.float32) @ np.float32([0.114, 0.587, 0.299])  # BGR, as in OpenCV
    lighter, darker = np.zeros_like(grey), np.zeros_like(grey)
    height, width = grey.shape
    integral = np.pad(grey.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    y, x = np.arange(height)[:, None], np.arange(width)
    for reach in (12, 24, 28, 48, 56, 112):
        top, bottom = np.maximum(y - reach, 0), np.minimum(y + reach + 1, height)
        left, right = np.maximum(x - reach, 0), np.minimum(x + reach + 1, width)
        total = integral[bottom, right] - integral[top, right]
        total += integral[top, left] - integral[bottom, left]
        contrast = grey - total / ((bottom - top) * (right - left))
        lighter += np.maximum(contrast, 0)
        darker -= np.minimum(contrast, 0)
    return lighter / lighter.max() + darker / darker.max()


def opencv_saliency(image: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(image)[1]


def saliencymix(
    images: Tensor, labels: Tensor, num_classes: int, saliency: Callable[[np.ndarray], np.ndarray]
) -> Mixed:
    """Uddin et al., ICLR 2021: a CutMix box around the most salient pixel, in place.

    As in the authors' code, one image decides where the box lies in the whole batch.
    """
    batch, _, height, width = images.shape
    other = torch.randperm(batch, device=images.device)
    image = images[other[0]].float().permute(1, 2, 0).mul(255).byte().cpu().numpy()
    y, x = np.unravel_index(np.argmax(saliency(image)), (height, width))
    cut = np.sqrt(1 - np.random.beta(1.0, 1.0)) / 2
    top, bottom = (int(np.clip(y + s * cut * height, 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(x + s * cut * width, 0, width)) for s in (-1, 1))
    images[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return images, mix_labels(labels, other, lam, num_classes)


def puzzlemix(
    images: Tensor, saliency: Tensor, labels: Tensor, num_classes: int, blocks: int = 8
) -> Mixed:
    """Kim et al., ICML 2020: for each pair the mask of least cost, by a graph cut on the host, with
    the costs and constants of the authors' code.

    ``blocks`` a side: the authors draw it per batch, 2 to 16 in powers of two. ``saliency``
    (B, h, w) is given: the authors take the loss's gradient by the images, one more backward pass.
    Their transport of the blocks is left out. The cuts run one after the other, as by the authors'
    default.
    """
    import gco

    other = torch.randperm(len(images), device=images.device)
    lam = np.random.beta(1.0, 1.0)
    own, foreign, vertical, horizontal = puzzle_costs(images, saliency, other, blocks)

    steps = np.array([0.0, 0.5, 1.0])  # of the other image
    chances = np.array([lam**2, 2 * lam * (1 - lam), (1 - lam) ** 2])
    prior = -0.2 * np.log(chances + 1e-8) / blocks**2
    disagreement = ((steps[:, None] - steps) ** 2).astype(np.float32)
    unary = integers((1 - steps) * own[..., None] + steps * foreign[..., None] + prior, blocks)
    down, across = integers(vertical, blocks), integers(horizontal, blocks)
    masks = np.empty((len(images), blocks, blocks), np.float32)
    for i in range(len(images)):
        cut = gco.cut_grid_graph(unary[i], disagreement, down[i], across[i], algorithm="swap")
        masks[i] = 1 - steps[cut.reshape(blocks, blocks)]
    mask = torch.from_numpy(masks).to(images.device)[:, None]
    kept = mask.mean((1, 2, 3))[:, None]
    mask = F.interpolate(mask.to(images.dtype), images.shape[2:], mode="nearest")
    return mask * images + (1 - mask) * images[other], mix_labels(labels, other, kept, num_classes)


def puzzle_costs(
    images: Tensor, saliency: Tensor, other: Tensor, blocks: int
) -> tuple[np.ndarray, ...]:
    """The cost of a block that shows its own image, and the other: the saliency that is hidden;
    then the costs of neighbours that disagree, below each other and side by side."""
    pooled = min(4, images.shape[3] // blocks)
    every = images.shape[3] // blocks // pooled
    smoothness, locality = 1.2 / blocks / 16, 0.5
    share = F.adaptive_avg_pool2d(saliency, blocks)
    share = share / share.sum((1, 2), keepdim=True)
    own, foreign = share[other], share.clone()
    pixels = F.avg_pool2d(images.float(), pooled)
    joints = []
    for image, mine, theirs in ((pixels, own, foreign), (pixels.mT, own.mT, foreign.mT)):
        pair = image, image[other]
        oo, of, fo, ff = (
            smoothness * locality * seam(above, below, every) for above in pair for below in pair
        )
        mine[:, :-1] += (oo + of) / 2
        mine[:, 1:] += (oo + fo) / 2
        theirs[:, :-1] += (ff + fo) / 2
        theirs[:, 1:] += (ff + of) / 2
        joints.append(smoothness + (of + fo - oo - ff) / 2)
    return tuple(costs.cpu().numpy() for costs in (own, foreign, joints[0], joints[1].mT))


def seam(above: Tensor, below: Tensor, every: int) -> Tensor:
    """How far pixels differ across each border of two blocks, one image above it, one below."""
    difference = above[:, :, every - 1 : -1 : every] - below[:, :, every::every]
    return F.avg_pool2d(difference.abs().mean(1), (1, every))


def integers(costs: np.ndarray, blocks: int) -> np.ndarray:
    """As the graph cut takes them: costs times 1000 blocks**2."""
    return (1000 * blocks**2 * costs).astype(np.int32)
