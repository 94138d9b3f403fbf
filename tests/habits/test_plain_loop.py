"""examples/plain_loop.py"""

import copy

import pytest
import torch
from digits import CLASSES, Net, digits
from torch.utils.data import DataLoader, TensorDataset

from examples.plain_loop import ACCUMULATED, train
from sg_kernels import SaliencyGraft

BATCHES = 5
"""Not a multiple of ACCUMULATED, so that an epoch ends with a smaller step."""


def run(model, checkpoint, epochs, backend="aot_eager"):
    batches = DataLoader(TensorDataset(*digits(8 * BATCHES)), 8, shuffle=True)
    return train(
        model, batches, epochs, checkpoint, layer="body", num_classes=CLASSES, backend=backend
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch.compiler.reset()
    return Net()


def test_a_run_resumes_exactly(model, tmp_path):
    other = copy.deepcopy(model)
    average = run(model, tmp_path / "whole.pt", 2)
    run(other, tmp_path / "half.pt", 1)
    torch.manual_seed(123)
    resumed = Net()
    again = run(resumed, tmp_path / "half.pt", 2)
    assert not any(p.equal(q) for p, q in zip(model.parameters(), other.parameters()))
    for got, expected in ((resumed, model), (again, average)):
        for name, value in expected.state_dict().items():
            assert got.state_dict()[name].equal(value), name


def test_the_average_holds_no_randomness(model, tmp_path):
    average = run(model, tmp_path / "checkpoint.pt", 1)
    assert not any(isinstance(module, SaliencyGraft) for module in average.modules())
    assert average.n_averaged == -(-BATCHES // ACCUMULATED)
    assert not average.module.head[1].weight.equal(model.head[1].weight)


def test_the_clean_pass_leaves_the_statistics_alone(model, tmp_path):
    run(model, tmp_path / "checkpoint.pt", 1)
    assert model.stem[1].num_batches_tracked == BATCHES
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["mixer"]["seed"] == 0
    assert saved["mixer"]["step"] == BATCHES


def test_the_clean_pass_autocasts(model, tmp_path):
    dtypes = set()

    @torch.compiler.disable
    def note(body, args, output):
        if not body.training:
            dtypes.add(output.dtype)

    model.body.register_forward_hook(note)
    run(model, tmp_path / "checkpoint.pt", 1)
    assert dtypes == {torch.float16}


def test_compiled_code_trains_as_eager_code_does(model, tmp_path):
    other = copy.deepcopy(model)
    run(model, tmp_path / "compiled.pt", 1)
    run(other, tmp_path / "eager.pt", 1, backend="eager")
    for parameter, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(parameter, expected)
