"""Pairs images across the ranks of torch.distributed, as torchrun starts them.

SaliencyGraft pairs within a rank. Here each rank grafts its own rows, onto images of any rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sg_kernels import SaliencyGraft, graft


class GlobalGraft:
    """Grafts a rank's batch onto images of the global batch: ``mixed, soft = mixer(...)``.

    All ranks draw alike, from one seed, for the whole global batch. What that takes is small, maps
    and targets, and is gathered. Of the images only the destinations are sent. Batches have the
    same size on all ranks (``drop_last=True``); there is no gradient to the images.
    """

    def __init__(self, num_classes: int, seed: int, device: torch.device) -> None:
        mixer = SaliencyGraft(num_classes=num_classes, seed=seed, rank=0)
        self.mixer = mixer.to(device)  # its state_dict resumes the draws

    def __call__(self, images: Tensor, targets: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W), targets (B,) or (B, num_classes), saliency (B, h, w)."""
        maps = gathered(saliency)
        _, mixed_targets = self.mixer(maps[:, None], gathered(targets), saliency=maps)
        index, mask = self.mixer.result.index, self.mixer.result.mask
        batch = len(images)
        own = slice(dist.get_rank() * batch, (dist.get_rank() + 1) * batch)
        both = torch.cat([images, fetch(images, index)])
        destination = torch.arange(batch, 2 * batch, device=images.device).repeat(2)
        # graft makes a row of every image; those of the destinations are not needed.
        return graft(both, mask[own].repeat(2, 1, 1), destination)[:batch], mixed_targets[own]


def gathered(part: Tensor) -> Tensor:
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def fetch(images: Tensor, index: Tensor) -> Tensor:
    """The images that this rank's rows of the global ``index`` name, whichever rank has them."""
    batch, rank = len(images), dist.get_rank()
    wanted = index.view(-1, batch)  # a row per rank
    owner, place = wanted // batch, wanted % batch
    sent = [images[place[other][owner[other] == rank]] for other in range(len(wanted))]
    order = owner[rank].argsort(stable=True)
    received = images.new_empty(images.shape)
    dist.all_to_all_single(
        received,
        torch.cat(sent).contiguous(),
        owner[rank].bincount(minlength=len(wanted)).tolist(),
        [len(part) for part in sent],
    )
    return torch.empty_like(images).index_copy_(0, order, received)
