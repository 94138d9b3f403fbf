"""examples/accelerate_loop.py"""

from itertools import pairwise

import pytest
import torch
from digits import CLASSES, Net, loader

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from examples.accelerate_loop import prepare, train_epoch

BATCHES = len(loader())


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def set_up(**options):
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return accelerator, *prepare(accelerator, model, optimizer, loader(), "body", CLASSES)


def test_the_clean_pass_autocasts_and_leaves_the_statistics_alone():
    accelerator, model, optimizer, batches, mixer = set_up(mixed_precision="bf16")
    dtypes = []
    mixer.to_features = lambda features: dtypes.append(features.dtype) or features
    mixer.prob = 1.0
    train_epoch(accelerator, model, optimizer, batches, mixer)
    assert dtypes == [torch.bfloat16] * BATCHES
    assert mixer.step == BATCHES
    assert accelerator.unwrap_model(model).stem[1].num_batches_tracked == BATCHES


def test_accumulated_batches_make_one_step():
    accelerator, model, optimizer, batches, mixer = set_up(gradient_accumulation_steps=2)
    weights = []
    accelerator.unwrap_model(model).head.register_forward_pre_hook(
        lambda head, args: (
            weights.append(head[1].weight.detach().clone()) if head.training else None
        )
    )
    train_epoch(accelerator, model, optimizer, batches, mixer)
    same = [a.equal(b) for a, b in pairwise(weights)]
    assert same == [True, False] * (BATCHES // 2 - 1) + [True]
    assert mixer.step == BATCHES


def test_a_run_resumes_exactly(tmp_path):
    accelerator, model, optimizer, batches, mixer = set_up(mixed_precision="bf16")
    train_epoch(accelerator, model, optimizer, batches, mixer)
    accelerator.save_state(tmp_path)
    train_epoch(accelerator, model, optimizer, batches, mixer)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fresh_state.__wrapped__()

    accelerator, model, optimizer, batches, mixer = set_up(mixed_precision="bf16")
    accelerator.load_state(tmp_path)
    assert mixer.step == BATCHES
    train_epoch(accelerator, model, optimizer, batches, mixer)
    for name, value in model.state_dict().items():
        assert value.equal(expected[name]), name
