"""examples/pairs_across_ranks.py, in two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from examples.pairs_across_ranks import GlobalGraft
from sg_kernels import SaliencyGraft

RANKS, BATCH, CALLS, SEED, CLASSES = 2, 8, 2, 5, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches():
    """Per call the images, classes and maps of all ranks."""
    from digits import digits  # the processes below do not need it

    images, targets = digits(CALLS * RANKS * BATCH)
    images = images.contiguous(memory_format=torch.channels_last)
    maps = images.mean(1)[:, ::4, ::4]
    size = RANKS * BATCH
    return list(zip(images.split(size), targets.split(size), maps.split(size)))


def work(rank, folder, batches):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    mixer = GlobalGraft(CLASSES, SEED, CPU)
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    outputs = [mixer(*(part[own] for part in batch)) for batch in batches]
    torch.save(outputs, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, batches):
    """What each rank returned."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder, batches), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_the_ranks_together_make_what_one_process_makes(outputs, batches):
    mixer = SaliencyGraft(num_classes=CLASSES, seed=SEED)
    for call, (images, targets, maps) in enumerate(batches):
        expected, expected_targets = mixer(images, targets, saliency=maps)
        mixed = torch.cat([own[call][0] for own in outputs])
        assert mixed.equal(expected)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.cat([own[call][1] for own in outputs]).equal(expected_targets)
        across = mixer.result.index // BATCH != torch.arange(RANKS * BATCH) // BATCH
        assert across.any()
        assert not across.all()
