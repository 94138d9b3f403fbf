"""Saliency Grafting as a transform of batches, like torchvision.transforms.v2.CutMix."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map  # as torchvision's transforms do
from torchvision import tv_tensors

from sg_kernels import graft, saliency_graft


class GraftBatch(nn.Module):
    """Takes a batch in any structure and returns it in the same, with images and labels mixed.

    The images are the first tensor of four dimensions. Masks are cut and pasted in the same places;
    boxes and keypoints are refused; all else passes. The draws are those of torch's own generator.

    Args:
        saliency: makes a map (B, h, w) of the images: a filter in a DataLoader's worker; after the
            DataLoader it may ask a network.
        labels_getter: finds the labels in the batch; default: the second item.
        options: of :func:`sg_kernels.saliency_graft`, such as ``num_classes``.
    """

    def __init__(
        self,
        saliency: Callable[[Tensor], Tensor],
        labels_getter: Callable[[Any], Tensor] = lambda batch: batch[1],
        **options: Any,
    ) -> None:
        super().__init__()
        self.saliency, self.labels_getter, self.options = saliency, labels_getter, options

    def forward(self, *batch: Any) -> Any:
        batch = batch if len(batch) > 1 else batch[0]
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        images = next(t for t in tensors if t.dim() == 4 and not isinstance(t, tv_tensors.Mask))
        labels, saliency = self.labels_getter(batch), self.saliency(images)
        result = saliency_graft(images, saliency=saliency, targets=labels, **self.options)

        def mixed(leaf: Any) -> Any:
            if leaf is labels:
                return result.targets
            if leaf is images or isinstance(leaf, tv_tensors.Mask):
                output = result.images if leaf is images else graft(leaf, result.mask, result.index)
                return tv_tensors.wrap(output, like=leaf)
            if isinstance(leaf, tv_tensors.TVTensor):
                raise TypeError(f"GraftBatch does not support {type(leaf).__name__}")
            return leaf

        return tree_map(mixed, batch)


def edges(images: Tensor, cell: int = 4) -> Tensor:
    """A map without a network: how much neighbouring pixels differ, (B, H // cell, W // cell)."""
    grey, (height, width) = images.float().mean(1), images.shape[2:]
    steepness = grey.diff(dim=1).abs()[:, :, 1:] + grey.diff(dim=2).abs()[:, 1:]
    return F.adaptive_avg_pool2d(steepness, (height // cell, width // cell))
