"""Saliency Grafting as a transform of batches, like torchvision.transforms.v2.CutMix.

graft_batch = GraftBatch(edges, num_classes=10)
loader = DataLoader(dataset, 64, collate_fn=lambda batch: graft_batch(default_collate(batch)))
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map  # as torchvision's transforms do
from torchvision import tv_tensors

from sg_kernels import graft, saliency_graft


class GraftBatch(nn.Module):
    """Takes a batch in any structure and returns it in the same, with images and labels mixed.

    The images are the first tensor of four dimensions. ``tv_tensors.Mask`` are cut and pasted in
    the same places. All else passes, but for boxes and keypoints, which are refused. tv_tensors
    stay what they are. As in torchvision, the draws come from torch's own generator.

    Args:
        saliency: makes a map (B, h, w) of the images. In a ``collate_fn`` it runs in a worker, so
            let it be a filter, such as :func:`edges`; after the DataLoader it may ask a network.
        labels_getter: finds the labels in what the module is called with; default: the second item.
        options: of :func:`sg_kernels.saliency_graft`, such as ``num_classes``.
    """

    def __init__(
        self,
        saliency: Callable[[Tensor], Tensor],
        labels_getter: Callable[[Any], Tensor] = lambda inputs: inputs[1],
        **options: Any,
    ) -> None:
        super().__init__()
        self.saliency, self.labels_getter, self.options = saliency, labels_getter, options

    def forward(self, *inputs: Any) -> Any:
        inputs = inputs if len(inputs) > 1 else inputs[0]
        labels = self.labels_getter(inputs)
        images = next(x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() == 4)
        result = saliency_graft(
            images, saliency=self.saliency(images), targets=labels, **self.options
        )

        def mixed(leaf: Any) -> Any:
            if leaf is labels:
                return result.targets
            if leaf is images:
                output = result.images
            elif isinstance(leaf, tv_tensors.Mask):
                output = graft(leaf, result.mask, result.index)
            elif isinstance(leaf, tv_tensors.TVTensor):
                raise TypeError(f"GraftBatch does not support {type(leaf).__name__}")
            else:
                return leaf
            return tv_tensors.wrap(output, like=leaf)

        return tree_map(mixed, inputs)


def edges(images: Tensor, cell: int = 4) -> Tensor:
    """A map without a network: how much neighbouring pixels differ, (B, H // cell, W // cell)."""
    grey = images.float().mean(1)
    steepness = grey.diff(dim=1).abs()[:, :, 1:] + grey.diff(dim=2).abs()[:, 1:]
    height, width = images.shape[2:]
    return F.adaptive_avg_pool2d(steepness, (height // cell, width // cell))
