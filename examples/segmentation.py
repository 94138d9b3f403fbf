"""Saliency Grafting for segmentation: images are grafted together with their label maps."""

from torch import Tensor

from sg_kernels import SaliencyGraft, graft


def graft_with_maps(mixer: SaliencyGraft, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images, and the maps cut and pasted in the same places.

    Pixels keep their labels, so the loss stays as it is, and so do pixels of ``ignore_index``.

    Args:
        mixer: without ``augmentations``; it needs no ``num_classes``.
        images: (B, C, H, W).
        maps: (B, H, W) or (B, C, H, W), of any dtype; their size may differ from the images'.
    """
    mixed, _ = mixer(images)
    if mixer.result is None:  # nothing was mixed
        return images, maps
    return mixed, graft(maps, mixer.result.mask, mixer.result.index)
