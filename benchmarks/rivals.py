"""Saliency-guided mixups that no installable library computes, after the papers and the authors'
way of computing them: image by image where they do, on the host where they do.

Each takes and returns what a training loop would: images (B, C, H, W) and class ids (B,) in, new
images and soft targets (B, num_classes) out.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Mixed = tuple[Tensor, Tensor]


def mix_labels(labels: Tensor, other: Tensor, lam: float | Tensor, num_classes: int) -> Tensor:
    hot = F.one_hot(labels, num_classes).float()
    return lam * hot + (1 - lam) * hot[other]


def attentive_cutmix(
    images: Tensor, features: Tensor, labels: Tensor, num_classes: int, patches: int = 6
) -> Mixed:
    """Walawalkar et al., ICASSP 2020: the most attended cells of another image are pasted in.

    The attention is that of ``features``; the authors run a second, pretrained network for it.
    """
    batch, _, h, w = features.shape
    height, width = images.shape[2] // h, images.shape[3] // w
    other = torch.randperm(batch, device=images.device)
    attention = features.abs().mean(1).flatten(1)
    chosen = attention[other].topk(min(patches, h * w), dim=1).indices.tolist()
    out = images.clone()
    for row, (source, cells) in enumerate(zip(other.tolist(), chosen)):
        for cell in cells:
            y, x = cell // w * height, cell % w * width
            patch = images[source, :, y : y + height, x : x + width]
            out[row, :, y : y + height, x : x + width] = patch
    lam = 1 - len(chosen[0]) / (h * w)
    return out, mix_labels(labels, other, lam, num_classes)


def fine_grained_saliency(image: np.ndarray) -> np.ndarray:
    """Montabone & Soto, 2010: grey values against the mean of windows around them, (H, W).

    Stands in for OpenCV's function of that name where its contrib modules are missing.
    """
    grey = image.astype(np.float32) @ np.float32([0.114, 0.587, 0.299])  # BGR, as OpenCV has it
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
    """Uddin et al., ICLR 2021: a CutMix box around the most salient pixel.

    As its authors do, one image of the batch decides where the box of all of them lies.
    """
    batch, _, height, width = images.shape
    other = torch.randperm(batch, device=images.device)
    image = images[other[0]].float().permute(1, 2, 0).mul(255).byte().cpu().numpy()
    y, x = np.unravel_index(np.argmax(saliency(image)), (height, width))
    cut = np.sqrt(1 - np.random.beta(1.0, 1.0)) / 2
    top, bottom = (int(np.clip(y + s * cut * height, 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(x + s * cut * width, 0, width)) for s in (-1, 1))
    out = images.clone()
    out[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return out, mix_labels(labels, other, lam, num_classes)


def puzzlemix(images: Tensor, saliency: Tensor, labels: Tensor, num_classes: int) -> Mixed:
    """Kim et al., ICML 2020: per pair, the mask of least cost by a graph cut on the host.

    ``saliency`` (B, h, w) is given; the authors take the gradient of the loss by the images, one
    more backward pass. Their transport of the patches is left out too, so this is a lower bound.
    """
    import gco

    values, beta, gamma, eta, blocks = np.array([0.0, 0.5, 1.0]), 1.2, 0.5, 0.2, saliency.shape[1]
    batch, _, height, width = images.shape
    other = torch.randperm(batch, device=images.device)
    lam = np.random.beta(1.0, 1.0)
    own = (saliency / saliency.sum((1, 2), keepdim=True)).float().cpu().numpy()
    blurred = F.adaptive_avg_pool2d(images.float(), saliency.shape[1:])
    means = blurred.mean(1).cpu().numpy()
    prior = np.log(np.maximum([(1 - lam) ** 2, 2 * lam * (1 - lam), lam**2], 1e-6))
    disagreement = (values[:, None] - values) ** 2
    masks = []
    for row, source in enumerate(other.tolist()):
        here, there = own[row][..., None], own[source][..., None]
        unary = -(values * here + (1 - values) * there) - eta * prior / blocks**2
        vertical, horizontal = (
            (beta + gamma * np.abs(np.diff(means[row], axis=axis))) / blocks**2 for axis in (0, 1)
        )
        cut = gco.cut_grid_graph(unary, disagreement, vertical, horizontal, algorithm="swap")
        masks.append(values[cut.reshape(own[row].shape)])
    mask = torch.from_numpy(np.stack(masks)).to(images.device, images.dtype)[:, None]
    kept = mask.float().mean((1, 2, 3))[:, None]
    mask = F.interpolate(mask, (height, width), mode="nearest")
    return mask * images + (1 - mask) * images[other], mix_labels(labels, other, kept, num_classes)
